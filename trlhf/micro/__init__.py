"""The embedded default: a generated world of small problems, and a tiny Mistral pretrained on plain text about it."""
