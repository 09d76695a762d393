"""What a response's answer is, and what a table of them is worth. Import the modules; this package loads nothing."""
