"""Statistics of accuracy against labels: arrays in, floats out.

Axes: B label budgets, S paired seeds, I test items, D bootstrap draws. An arm's right answers are ``[B S I]``. Accuracy
and the area under its curve are means over seeds and items of linear functions of that array, and so are comparisons of
arms: one bootstrap of ``[S I]`` values serves them all, and arrays of one shape meet the same resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypedDict

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.stats import t

DRAWS = 10_000
BLOCK = 500  # draws that are in memory at once
CONFIDENCE = 0.95


class Estimate(TypedDict):
    """A mean over seeds and items with its bootstrap interval.

    ``p`` is two-sided, against a mean of 0. ``by_seed`` holds each seed's own mean, and ``student`` the interval that
    Student's t gives them: with few seeds a bootstrap of seeds is too narrow, and this one is not.
    """

    value: float
    low: float
    high: float
    p: float
    by_seed: list[float]
    student: list[float] | None


def area_weights(labels: Sequence[float]) -> Float[ndarray, " B"]:
    """Return the weights w with w·accuracy = area under accuracy against log₂ labels, as an average accuracy.

    The trapezoid rule over x = log₂ labels, divided by the width: w_b = (x_{b+1} - x_{b-1}) / 2(x_B - x_1), at the ends
    with the end itself in place of the missing neighbour. A single budget has weight 1.

    Args:
        labels: budgets, > 0, rising.

    Raises:
        ValueError: budgets that do not rise, or none.
    """
    x = np.log2(np.asarray(labels, float)) if len(labels) and min(labels) > 0 else np.array([])
    if not len(x) or (np.diff(x) <= 0).any():
        raise ValueError(f"area_weights: labels={list(labels)} must be positive and rising; sort them, each once")
    if len(x) == 1:
        return np.ones(1)
    padded = np.concatenate([x[:1], x, x[-1:]])
    return np.asarray((padded[2:] - padded[:-2]) / (2 * (x[-1] - x[0])))


def resampled_means(
    values: Float[ndarray, "K S I"], draws: int = DRAWS, seed: int = 0, crossed: bool = False
) -> Float[ndarray, "K D"]:
    """Return the means of K quantities over seeds and items in hierarchical bootstrap resamples.

    Each draw takes S seeds with replacement, and for each of them I of its items with replacement. The draws depend on
    S, I and ``seed`` alone.

    Args:
        values: one number for each quantity, seed and item.
        draws: D.
        seed: of the draws.
        crossed: items are drawn once for all seeds of a draw, as befits items that all seeds share: wider where an
            item is hard for every seed (Owen 2007, the pigeonhole bootstrap, https://doi.org/10.1214/07-AOAS122).
    """
    quantities, seeds, items = values.shape
    columns, counts = values.reshape(quantities, -1).T, _resamples(seeds, items, draws, seed, crossed)
    blocks = [counts[start : start + BLOCK] @ columns for start in range(0, draws, BLOCK)]  # a block is made float
    return np.asarray(np.concatenate(blocks).T / (seeds * items))


@lru_cache(maxsize=8)
def _resamples(seeds: int, items: int, draws: int, seed: int, crossed: bool) -> Int[ndarray, "D SI"]:
    """Return how often each draw takes each item of each seed."""
    rng, blocks = np.random.default_rng(seed), []
    for start in range(0, draws, BLOCK):
        rows = min(BLOCK, draws - start)
        of_seed = rng.integers(seeds, size=(rows, seeds, 1))
        item = rng.integers(items, size=(rows, 1 if crossed else seeds, items))
        cell = (np.arange(rows)[:, None, None] * seeds + of_seed) * items + item
        counts = np.bincount(cell.ravel(), minlength=rows * seeds * items).reshape(rows, -1)
        blocks.append(counts.astype(np.uint16))
    return np.concatenate(blocks)


def interval(resampled: Float[ndarray, " D"], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the percentile interval of resampled values, which may be infinite (but not nan)."""
    ranked, tail = np.sort(resampled), (1 - confidence) / 2
    last = len(ranked) - 1
    return float(ranked[int(np.floor(tail * last))]), float(ranked[int(np.ceil((1 - tail) * last))])


def bootstrap_p(resampled: Float[ndarray, " D"]) -> float:
    """Return the two-sided bootstrap p-value against 0: 2·min(#{≤ 0} + 1, #{≥ 0} + 1) / (D + 1), at most 1."""
    below, above = int((resampled <= 0).sum()), int((resampled >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (len(resampled) + 1))


def student_interval(values: Float[ndarray, " S"], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Return the interval of a mean over seeds: mean ± t_{S-1}·sd/√S; None for a single seed."""
    if len(values) < 2:
        return None
    half = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * float(values.std(ddof=1)) / len(values) ** 0.5
    return float(values.mean()) - half, float(values.mean()) + half


def estimate(values: Float[ndarray, "S I"], draws: int = DRAWS, seed: int = 0, crossed: bool = False) -> Estimate:
    """Return the mean of a quantity (an accuracy, an area, a difference of either) and how sure it is."""
    resampled = resampled_means(values[None], draws, seed, crossed)[0]
    low, high = interval(resampled)
    by_seed = values.mean(1)
    student = student_interval(by_seed)
    return {
        "value": float(values.mean()),
        "low": low,
        "high": high,
        "p": bootstrap_p(resampled),
        "by_seed": by_seed.tolist(),
        "student": None if student is None else list(student),
    }


def factorial(
    neither: Float[ndarray, "S I"],
    first: Float[ndarray, "S I"],
    second: Float[ndarray, "S I"],
    both: Float[ndarray, "S I"],
) -> dict[str, Float[ndarray, "S I"]]:
    """Return the main effects and the interaction of two factors, from the outcome without, with one, and with both.

    Main effect of a factor: the mean of its effects without and with the other. Interaction: the difference of these.
    """
    return {
        "first": ((first - neither) + (both - second)) / 2,
        "second": ((second - neither) + (both - first)) / 2,
        "interaction": (both - second) - (first - neither),
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values: p̃_(k) = max_{j ≤ k} min(1, (m-j+1)·p_(j)), https://www.jstor.org/stable/4615733."""
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


def labels_to_reach(
    labels: Sequence[float], accuracy: Float[ndarray, "*D B"], target: float | Float[ndarray, "*D"]
) -> Float[ndarray, "*D"]:
    """Return with how many labels curves first reach a target, accuracy being linear in log₂ labels between budgets.

    Returns:
        The first budget where the curve is there already (so few or fewer), infinity where it never gets there.
    """
    x, goal = np.log2(np.asarray(labels, float)), np.asarray(target, float)[..., None]
    reached = accuracy >= goal
    at = reached.argmax(-1)
    after = np.take_along_axis(accuracy, at[..., None], -1)[..., 0]
    before = np.take_along_axis(accuracy, np.maximum(at - 1, 0)[..., None], -1)[..., 0]
    rise = np.where(after > before, after - before, 1.0)
    share = np.where(at > 0, (goal[..., 0] - before) / rise, 0.0)
    found = 2 ** (x[np.maximum(at - 1, 0)] + share * (x[at] - x[np.maximum(at - 1, 0)]))
    return np.asarray(np.where(reached.any(-1), found, np.inf))
