"""How often do labels err? From what the answer model expects of them, and from verdicts that contradict each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.interpolate import PchipInterpolator

from trlhf.targeting.answers import FLIP_RATE

RATES = (0.005, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4)  # ε at which the evidence is computed; between them it is interpolated
HIGHEST, POINTS = 0.45, 500  # of the grid that the posterior lies on
LOWEST = FLIP_RATE**2 / HIGHEST  # as far below `FLIP_RATE` as `HIGHEST` is above
DIGITS = 4  # kept: the others depend on where in memory a matrix happens to lie


def flip_rate_from(evidence: Sequence[float]) -> float:
    """Return the posterior median of ε, the chance that a verdict is the opposite of the truth.

    The prior is log-uniform on [`LOWEST`, `HIGHEST`], p(ε) ∝ 1/ε, whose median is `FLIP_RATE`: people seldom err, but
    how seldom is not known to within a factor of ten. (A half-Cauchy of this median falls with 1/ε² and drew estimates
    from 250 labels down by a point more.) Below the least of `RATES` the evidence counts as at it. Evidence that is the
    same everywhere gives the prior's median.

    Args:
        evidence: log P(labels | ε) at each of `RATES`, in nats; a constant in it does not matter.

    Raises:
        ValueError: another number of values, or values that are not finite.
    """
    if len(evidence) != len(RATES) or not np.isfinite(evidence).all():
        raise ValueError(
            f"flip_rate_from: evidence={list(evidence)} must be {len(RATES)} finite numbers, one for each of {RATES}"
        )
    grid = np.geomspace(LOWEST, HIGHEST, POINTS)  # points of equal prior weight
    logs = PchipInterpolator(np.sqrt(RATES), evidence)(np.sqrt(np.maximum(grid, RATES[0])))
    weights = np.exp(logs - logs.max())
    return round(float(np.interp(0.5, np.cumsum(weights) / weights.sum(), grid)), DIGITS)
