"""Stage 2: labelled responses become a reward model that knows what it does not know."""
