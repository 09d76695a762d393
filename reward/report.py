"""What a reward model is worth, on labels that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from trlhf.data import LabelledPair, LabelledResponse
from trlhf.evaluation.statistics import (
    Estimate,
    auc,
    brier,
    expected_calibration_error,
    nll,
    wilson_interval,
    within_group_auc,
)
from trlhf.reward.calibration import RawMargins, raw_margins
from trlhf.reward.model import RewardModel
from trlhf.reward.table import group_numbers, prompts_of

Report = dict[str, Any]
Floats = NDArray[np.float64]


def describe_labels(labelled: Sequence[LabelledResponse], pairs: Sequence[LabelledPair]) -> Report:
    """Count labels by kind and outcome, and the prompts that they are on."""
    decided = sum(pair.preference != 0.5 for pair in pairs)
    return {
        "verdicts": len(labelled),
        "right": sum(label.right for label in labelled),
        "preferences": len(pairs),
        "ties": len(pairs) - decided,
        "prompts": len(set(group_numbers(prompts_of(labelled, pairs)))),
    }


def assess(
    model: RewardModel, labelled: Sequence[LabelledResponse], pairs: Sequence[LabelledPair], confidence: float = 0.95
) -> Report:
    """Measure a calibrated model on held-out labels.

    A number that the labels cannot give (an AUC without both classes, say) is None. The temperatures were fitted on
    these same labels, one number for each kind: ``after`` is that much optimistic.

    Returns:
        ``verdicts`` (accuracy with interval, AUC over all and within prompts, ECE, NLL and Brier score before and after
        calibration), ``preferences`` (the same without AUC; ties left out), and ``scores`` (Spearman correlation with
        the response's length, mean variance within prompts).
    """
    margins = raw_margins(model, labelled, pairs)
    return {
        "verdicts": _verdicts(model, margins, labelled, confidence),
        "preferences": _preferences(model, margins, pairs, confidence),
        "scores": _scores(model, labelled, pairs),
    }


def summarise(report: Report) -> list[str]:
    """Say in a few lines what the report of a reward stage says."""
    train, held, measured = report["labels"]["train"], report["labels"]["held_out"], report["held_out"]
    lines = [
        f"reward model: {train['verdicts']} verdicts ({train['right']} right) and {train['preferences']} preferences "
        f"on {train['prompts']} prompts; held out: {held['verdicts']} and {held['preferences']} on {held['prompts']}"
    ]
    verdicts, preferences = measured["verdicts"], measured["preferences"]
    if verdicts is not None:
        overall, within = _number(verdicts["auc"]), _number(verdicts["auc_within_prompts"])
        accuracy = _share(verdicts["accuracy"])
        lines.append(f"  held-out verdicts: AUC {overall}, within prompts {within}, accuracy {accuracy}")
    if preferences is not None:
        lines.append(f"  held-out preferences: accuracy {_share(preferences['accuracy'])}")
    return [*lines, *(f"  {note}" for note in report["notes"])]


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def _share(accuracy: Report) -> str:
    return f"{accuracy['value']:.0%} [{accuracy['low']:.0%}, {accuracy['high']:.0%}] of {accuracy['n']}"


def _verdicts(
    model: RewardModel, margins: RawMargins, labelled: Sequence[LabelledResponse], confidence: float
) -> Report | None:
    if not labelled:
        return None
    raw, right = margins.verdicts, margins.right
    groups = group_numbers(label.prompt for label in labelled)
    return {
        "accuracy": clustered_accuracy((raw > 0) == (right == 1), groups, confidence),
        "auc": auc(raw, right),
        "auc_within_prompts": within_group_auc(raw, right, groups),
        **_calibration(raw, right, model.calibration.verdict_temperature),
    }


def _preferences(
    model: RewardModel, margins: RawMargins, pairs: Sequence[LabelledPair], confidence: float
) -> Report | None:
    decided = margins.preferred != 0.5
    if not decided.any():
        return None
    first_better = margins.preferred[decided] == 1
    raw = margins.preferences[decided]
    agreeing = np.where(first_better, raw, -raw)  # > 0: the model likes the chosen one better
    groups = np.array(group_numbers(pair.prompt for pair in pairs))[decided]
    report: Report = {"accuracy": clustered_accuracy(agreeing > 0, groups, confidence)}
    # As a set, comparisons have no first and no second: judge the model's confidence in what it likes better.
    return report | _calibration(np.abs(raw), (agreeing > 0).astype(float), model.calibration.preference_temperature)


def clustered_accuracy(
    correct: NDArray[np.bool_], groups: Sequence[int] | NDArray[np.int64], confidence: float = 0.95
) -> Estimate:
    """Return the share of right answers with an interval that knows that labels of one prompt say much the same.

    Wilson's interval at the effective sample size n / deff. The design effect deff = v / (p̂(1-p̂)/n) compares the
    between-prompts variance of a ratio, v = G/(G-1) Σ_g (k_g - p̂ n_g)² / n², with that of independent labels (Cochran,
    Sampling Techniques, 1977, eq. 6.13; Kish, Survey Sampling, 1965, sec. 8.2); it counts as 1 where it is smaller.
    If all answers are alike (or there is one prompt) v says nothing, and each prompt counts as one answer: resampling
    the prompts would give an interval of width 0 there, which held-out sets of few prompts do reach.

    Args:
        correct: whether each answer is right.
        groups: number of the prompt of each answer.

    Returns:
        ``n`` is how many answers there are, not the effective number.
    """
    n, p = len(correct), float(np.mean(correct))
    _, codes, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    effective = len(sizes)
    if len(sizes) > 1 and 0 < p < 1:
        off = np.bincount(codes, weights=correct) - p * sizes
        variance = len(sizes) / (len(sizes) - 1) * float(np.sum(off**2)) / n**2
        effective = max(1, int(n / max(1.0, variance * n / (p * (1 - p)))))
    low, high = wilson_interval(p * effective, effective, confidence)
    return {"value": p, "low": low, "high": high, "n": n}


def _calibration(margins: Floats, outcomes: Floats, temperature: float) -> Report:
    report: Report = {"temperature": temperature, "ece": {}, "nll": {}, "brier": {}}
    for when, scaled in (("before", margins), ("after", margins / temperature)):
        probabilities = 0.5 * (1 + np.tanh(scaled / 2))
        report["ece"][when] = expected_calibration_error(probabilities, outcomes)
        report["nll"][when] = nll(probabilities, outcomes)
        report["brier"][when] = brier(probabilities, outcomes)
    return report


def _scores(model: RewardModel, labelled: Sequence[LabelledResponse], pairs: Sequence[LabelledPair]) -> Report | None:
    responses = [(label.prompt, label.response) for label in labelled]
    responses += [(pair.prompt, text) for pair in pairs for text in (pair.first, pair.second)]
    if not responses:
        return None
    prompts, texts = [prompt for prompt, _ in responses], [text for _, text in responses]
    scores = model.score(prompts, texts)
    means = np.array([score.mean for score in scores])
    lengths = np.array([sample.response_length for sample in model.encode(prompts, texts)], dtype=float)
    groups = np.array(group_numbers(prompts))
    variances = [means[groups == group].var() for group in set(groups) if (groups == group).sum() > 1]
    return {
        "mean": float(means.mean()),
        "sd": float(means.std()),
        "uncertainty": float(np.mean([score.sd for score in scores])),
        "variance_within_prompts": float(np.mean(variances)) if variances else None,
        "length_correlation": rank_correlation(means, lengths),
    }


def rank_correlation(first: Floats, second: Floats) -> float | None:
    """Return Spearman's ρ; None where one side never varies."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(spearmanr(first, second).statistic)
