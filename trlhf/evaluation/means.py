"""Means with intervals where the values are not all 0 or 1, come in clusters, or are themselves means."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from trlhf.evaluation.statistics import Estimate, accuracy_summary, bootstrap_interval


def mean_summary(
    values: ArrayLike, confidence: float = 0.95, interval: Literal["wilson", "bootstrap"] = "wilson", seed: int = 0
) -> Estimate:
    """Return the mean with its interval: Wilson's where asked for and every value is 0 or 1, else the bootstrap's."""
    array = np.asarray(values, dtype=np.float64)
    if np.isin(array, (0.0, 1.0)).all():
        return accuracy_summary(array, confidence, interval, seed)
    low, high = bootstrap_interval(array, confidence, seed)
    return {"value": float(array.mean()), "low": low, "high": high, "n": len(array)}


def clustered_mean(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 10_000,
) -> Estimate:
    """Return the mean of values that come in clusters (samples of one question, say), with its bootstrap interval.

    Whole clusters are drawn, for values of one cluster are no independent evidence: Σ values / Σ sizes over the drawn
    ones (Davison & Hinkley 1997, Bootstrap Methods and their Application, sec. 3.8).

    Returns:
        The mean over all values; ``n`` counts the clusters.
    """
    if not values or len(values) != len(clusters):
        raise ValueError(f"clustered_mean: expected as many values as clusters, got {len(values)} and {len(clusters)}")
    places = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
    codes = [places[name] for name in clusters]
    sums, sizes = np.bincount(codes, weights=values), np.bincount(codes)
    generator = np.random.default_rng(seed)
    at_once = max(1, 2**22 // len(sums))
    drawn: list[float] = []
    while len(drawn) < resamples:
        rows = generator.integers(len(sums), size=(min(at_once, resamples - len(drawn)), len(sums)))
        drawn += (sums[rows].sum(1) / sizes[rows].sum(1)).tolist()
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return {"value": float(np.mean(values)), "low": float(low), "high": float(high), "n": len(sums)}


def mean_of_means(estimates: Sequence[Estimate]) -> Estimate:
    """Return the unweighted mean of independent estimates, as cards average over tasks, with its interval.

    m ± √Σ(distance of each estimate to its own limit)² / number of them: the limits of each are recovered as variances,
    which keeps them sound near 0 and 1 (Zou & Donner 2008, eq. 2, https://doi.org/10.1002/sim.3095).

    Returns:
        ``n`` counts the observations of all.
    """
    if not estimates:
        raise ValueError("mean_of_means: expected at least one estimate")
    if len(estimates) == 1:
        return estimates[0]
    value = float(np.mean([entry["value"] for entry in estimates]))
    below = float(np.sqrt(sum((entry["value"] - entry["low"]) ** 2 for entry in estimates))) / len(estimates)
    above = float(np.sqrt(sum((entry["high"] - entry["value"]) ** 2 for entry in estimates))) / len(estimates)
    return {"value": value, "low": value - below, "high": value + above, "n": sum(entry["n"] for entry in estimates)}
