"""The embedded default: a generated world of small problems and a tiny Mistral that was pretrained on plain text about it."""
