"""Which prompts to learn from and which labels to buy: NumPy in, NumPy out, usable without the pipeline."""

from trlhf.targeting.acquisition import d_optimal_batch, query_information, v_optimal_batch
from trlhf.targeting.answer_fit import fit_answers
from trlhf.targeting.answers import AnswerModel, Answers, label_likelihood
from trlhf.targeting.choose import Candidate, choose_verdicts, last_pass_rates, training_weights
from trlhf.targeting.frontier import fit_top_answer_model, frontier_value, top_answer_probability
from trlhf.targeting.pairs import choose_pairs, pick_pairs
from trlhf.targeting.preferences import Compared, PreferenceModel, fit_preferences
from trlhf.targeting.swaps import Noise, estimate_noise
from trlhf.targeting.targets import target_matrix
from trlhf.targeting.trust import trust_test

__all__ = [
    "AnswerModel",
    "Answers",
    "Candidate",
    "Compared",
    "Noise",
    "PreferenceModel",
    "choose_pairs",
    "choose_verdicts",
    "d_optimal_batch",
    "estimate_noise",
    "fit_answers",
    "fit_preferences",
    "fit_top_answer_model",
    "frontier_value",
    "label_likelihood",
    "last_pass_rates",
    "pick_pairs",
    "query_information",
    "target_matrix",
    "top_answer_probability",
    "training_weights",
    "trust_test",
    "v_optimal_batch",
]
