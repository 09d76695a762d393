"""Which prompts to learn from and which labels to buy: NumPy in, NumPy out, usable without the pipeline."""

from trlhf.targeting.choose import Candidate, choose_pairs, choose_verdicts, training_weights
from trlhf.targeting.frontier import fit_top_answer_model, frontier_value, top_answer_probability

__all__ = [
    "Candidate",
    "choose_pairs",
    "choose_verdicts",
    "fit_top_answer_model",
    "frontier_value",
    "top_answer_probability",
    "training_weights",
]
