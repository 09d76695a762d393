"""The model card: what a finished run says of itself, in the form that the Hugging Face hub reads."""
