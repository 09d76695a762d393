"""Training data against evaluation sets: near duplicates by edit distance, and n-gram overlap. No torch here."""
