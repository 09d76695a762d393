"""How often do labels err? From what the answer model expects of them, and from verdicts that contradict each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.interpolate import PchipInterpolator

from trlhf.targeting.answers import FLIP_RATE

RATES = (0.005, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4)  # ε at which the evidence is computed; between them it is interpolated
LOWEST, HIGHEST, POINTS = 0.0025, 0.45, 500  # of the grid that the posterior lies on
DIGITS = 4  # kept: the others depend on where in memory a matrix happens to lie


def flip_rate_from(evidence: Sequence[float]) -> float:
    """Return the posterior median of ε, the chance that a verdict is the opposite of the truth.

    The prior is half-Cauchy with median `FLIP_RATE`, 1/(1 + (ε/0.02)²): people seldom err, but its tail is so heavy
    that some fifty labels say otherwise. Evidence that is the same everywhere gives the prior's median.

    Args:
        evidence: log P(labels | ε) at each of `RATES`, in nats; a constant in it does not matter.

    Raises:
        ValueError: another number of values, or values that are not finite.
    """
    if len(evidence) != len(RATES) or not np.isfinite(evidence).all():
        raise ValueError(
            f"flip_rate_from: evidence={list(evidence)} must be {len(RATES)} finite numbers, one for each of {RATES}"
        )
    grid = np.linspace(LOWEST, HIGHEST, POINTS)
    logs = PchipInterpolator(np.sqrt(RATES), evidence)(np.sqrt(grid)) - np.log1p((grid / FLIP_RATE) ** 2)
    weights = np.exp(logs - logs.max())
    return round(float(np.interp(0.5, np.cumsum(weights) / weights.sum(), grid)), DIGITS)
