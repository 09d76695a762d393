"""Stage 1: supervised fine-tuning on native chain of thought."""
