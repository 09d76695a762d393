"""One temperature for each kind of label, fitted on labels that the model has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from trlhf.data import LabelledPair, LabelledResponse
from trlhf.reward.model import RewardModel
from trlhf.reward.table import tabulate

MIN_LABELS = 10  # fewer say too little about a temperature
LOG_BOUND = 3.0  # temperatures stay within e^-3 … e^3

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RawMargins:
    """What the mean head says about labels before any temperature.

    Attributes:
        verdicts: logit of being right, for each verdict.
        right: 1 or 0, for each verdict.
        preferences: score of the first less score of the second, for each comparison.
        preferred: probability that the first is better (1, 0.5, 0), for each comparison.
    """

    verdicts: Floats
    right: Floats
    preferences: Floats
    preferred: Floats


@torch.no_grad()
def raw_margins(model: RewardModel, labelled: Sequence[LabelledResponse], pairs: Sequence[LabelledPair]) -> RawMargins:
    """Score labels with the nuisance of length left out, as everything is scored after training."""
    table, prompts, responses = tabulate(labelled, pairs)
    if not prompts:
        return RawMargins(*(np.zeros(0) for _ in range(4)))
    pooled = model.pool_samples(model.encode(prompts, responses))
    pooled = type(pooled)(pooled.response.to(model.device), pooled.prompt.to(model.device))
    scores = model.heads.scores(pooled).mean(dim=1).double().cpu()
    right = scores + model.heads.intercepts(pooled).mean(dim=1).double().cpu()
    return RawMargins(
        right[table.verdict_rows].numpy(),
        table.verdicts.double().numpy(),
        (scores[table.first_rows] - scores[table.second_rows]).numpy(),
        table.preferences.double().numpy(),
    )


def calibrate(model: RewardModel, labelled: Sequence[LabelledResponse], pairs: Sequence[LabelledPair]) -> list[str]:
    """Fit both temperatures on labels that ``model`` was not trained on, and store them in it.

    Returns:
        A sentence for each temperature that had to stay 1 although there are labels of its kind.
    """
    margins = raw_margins(model, labelled, pairs)
    notes: list[str] = []
    temperatures = {}
    for kind, values, targets in (
        ("verdict", margins.verdicts, margins.right),
        ("preference", margins.preferences, margins.preferred),
    ):
        temperatures[kind] = 1.0
        if not len(values):
            continue
        if len(values) < MIN_LABELS:
            notes.append(f"{kind} temperature left at 1: {len(values)} held-out labels, {MIN_LABELS} are needed")
        elif kind == "verdict" and len(set(targets.tolist())) == 1:
            notes.append("verdict temperature left at 1: the held-out labels are all alike")
        else:
            temperatures[kind] = fit_temperature(values, targets)
    model.calibration = replace(
        model.calibration,
        verdict_temperature=temperatures["verdict"],
        preference_temperature=temperatures["preference"],
    )
    return notes


def fit_temperature(margins: Floats, targets: Floats) -> float:
    """Return the temperature that minimises the negative log-likelihood, held near 1 by a prior log T ~ N(0, 1).

    Temperature scaling: Guo et al. 2017, sec. 4.2 (https://arxiv.org/abs/1706.04599). The prior costs nothing at T = 1,
    so the likelihood itself can only rise, and a dozen labels cannot claim certainty.

    Args:
        margins: logits.
        targets: probabilities of the event whose logit they are: 1, 0 or 0.5.
    """

    def objective(log_temperature: float) -> float:
        scaled = margins / np.exp(log_temperature)
        nll = np.logaddexp(0.0, scaled) - targets * scaled
        return float(nll.sum() + 0.5 * log_temperature**2)

    found = minimize_scalar(objective, bounds=(-LOG_BOUND, LOG_BOUND), method="bounded")
    best = float(found.x)
    return float(np.exp(best)) if objective(best) < objective(0.0) else 1.0
