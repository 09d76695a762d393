"""Which labels to buy: what a label is expected to tell, and batches of labels picked by it. Arrays in, arrays out.

Every question is a vector z in the space of the parameters θ ~ N(θ̂, Σ): its label flips a coin whose logit has the
gradient z. A preference has z = φ(y) - φ(y'), a verdict the gradient of its answer's log-odds. A pick is an index into
the questions. First come scores, one number a question; then the pickers, which know what a batch holds already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

_CHUNK = 4096  # rows of queries in one product: bounds the memory


class Batch(NamedTuple):
    """Questions to ask, in the order in which they were picked.

    ``picks`` [n]: indices. ``values`` [n]: what each is predicted to gain per unit of cost, given those picked before.
    """

    picks: Int[ndarray, " n"]
    values: Float[ndarray, " n"]


# ---- scores ----


def query_information(p: Float[ndarray, " N"], flip_rate: float) -> Float[ndarray, " N"]:
    """Return the Fisher information ω that a label carries about its logit.

    p̃ = ε + (1-2ε)p; ω = (1-2ε)² p²(1-p)² / [p̃(1-p̃)]: (dp̃/dm)² over the variance of the label, with dp/dm = p(1-p).
    Without flips that is p(1-p).

    Args:
        p: probability that an errorless labeller says yes, in [0, 1].
        flip_rate: ε, probability that a label is flipped, in [0, 0.5).

    Raises:
        ValueError: either out of its range.
    """
    p = np.asarray(p, float)
    if not 0 <= flip_rate < 0.5:
        raise ValueError(f"query_information: flip_rate={flip_rate} must be in [0, 0.5); at 0.5 a label says nothing")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"query_information: p must be in [0, 1], got {p.min()} to {p.max()}; give probabilities")
    keep = 1 - 2 * flip_rate
    noisy = flip_rate + keep * p
    slope = p * (1 - p)
    variance = noisy * (1 - noisy)
    return np.asarray((keep * slope) ** 2 / np.where(slope > 0, variance, 1.0))  # a certain answer tells nothing


# ---- pickers ----


def v_optimal_batch(
    queries: Float[ndarray, "N D"],
    information: Float[ndarray, " N"],
    covariance: Float[ndarray, "D D"],
    target: Float[ndarray, "D D"],
    costs: Float[ndarray, " N"],
    groups: Int[ndarray, " N"],
    count: int,
    per_group: int = 2,
    base: Float[ndarray, " N"] | None = None,
    strength: float = 1.0,
) -> Batch:
    """Pick questions greedily by how much an answer shrinks the variance of what the update will use.

    a(q) = ω·zᵀΣTΣz / [(1 + ω·zᵀΣz)·cost], the drop of tr(TΣ) per unit of cost, and after each pick
    Σ ← Σ - ω·ΣzzᵀΣ/(1 + ω·zᵀΣz): V-optimal design, the expected variance reduction of Cohn, Ghahramani and Jordan 1996,
    https://arxiv.org/abs/cs/9603104. In a linear model with Gaussian noise of variance 1/ω the drop is exact and does
    not depend on the answer; for labels it is that of the Laplace posterior with ω held at its value now.

    zᵀΣz and zᵀΣTΣz are kept for every question and changed by rank one: O(N·D²) at the start, then O(N·D + D²) a pick;
    besides the arguments O(N + D²) memory.

    Args:
        queries: z, a row for each question.
        information: ω of each, at least 0 (see `query_information`).
        covariance: Σ, symmetric.
        target: T, symmetric (see `target_matrix`).
        costs: of each label, above 0.
        groups: whose question it is: prompt index.
        count: at most so many picks.
        per_group: at most so many of one prompt.
        base: with it the score is base + strength·a(q): what else the label is worth; -inf: never picked.
        strength: λ, the weight of a(q) in the score.

    Returns:
        The picks and a(q) of each at the time of its pick, without ``base`` and ``strength``. Of equal scores the
        earlier index goes first.

    Raises:
        ValueError: shapes that do not fit, values out of range or not finite.
    """
    return _greedy(
        "v_optimal_batch", queries, information, covariance, target, costs, groups, count, per_group, base, strength
    )


def d_optimal_batch(
    queries: Float[ndarray, "N D"],
    information: Float[ndarray, " N"],
    covariance: Float[ndarray, "D D"],
    costs: Float[ndarray, " N"],
    groups: Int[ndarray, " N"],
    count: int,
    per_group: int = 2,
    base: Float[ndarray, " N"] | None = None,
    strength: float = 1.0,
) -> Batch:
    """Pick questions greedily by how much an answer shrinks the volume of the posterior: `v_optimal_batch` untargeted.

    a(q) = ln(1 + ω·zᵀΣz) / cost, the drop of ln det Σ per unit of cost: D-optimal design, twice the information gained
    about θ (MacKay 1992, https://doi.org/10.1162/neco.1992.4.4.590). Arguments, update and errors are those of
    `v_optimal_batch`.
    """
    return _greedy(
        "d_optimal_batch", queries, information, covariance, None, costs, groups, count, per_group, base, strength
    )


def top_batch(
    scores: Float[ndarray, " N"],
    groups: Int[ndarray, " N"],
    kinds: Sequence[Hashable],
    count: int,
    per_group: int = 2,
) -> Int[ndarray, " n"]:
    """Pick greedily by score / (1 + picks of that kind so far), at most ``per_group`` of one prompt.

    Diminishing returns keep one kind from taking all the labels; a kind whose best questions are worth little is still
    picked little. With one kind for all it is a plain sort.

    Args:
        scores: at least 0; -inf: never picked.
        groups: prompt index of each question.
        kinds: kind of each question, anything that can be compared.
        count: at most so many picks.
        per_group: at most so many of one prompt.

    Raises:
        ValueError: lengths that differ, a negative or undefined score, a count below 0 or a limit below 1.
    """
    scores, groups = np.asarray(scores, float), np.asarray(groups)
    same_lengths("top_batch", scores=scores, groups=groups, kinds=kinds)
    bad = ~((scores >= 0) | (scores == -np.inf))
    if bad.any():
        raise ValueError(
            f"top_batch: scores must be at least 0, or -inf for what is never picked, got {scores[bad][0]}; dividing a "
            "negative score would raise it"
        )
    numbers: dict[Hashable, int] = {}
    kind = np.array([numbers.setdefault(name, len(numbers)) for name in kinds], int)
    limit = _Limit("top_batch", groups, count, per_group)
    limit.open &= scores > -np.inf
    picked = np.zeros(len(numbers))
    picks: list[int] = []
    while len(picks) < count and limit.open.any():
        best = int(np.argmax(np.where(limit.open, scores / (1 + picked[kind]), -np.inf)))
        picks.append(best)
        picked[kind[best]] += 1
        limit.take(best)
    return np.array(picks, int)


# ---- shared ----


class _Limit:
    """At most ``per_group`` picks of one group: which questions are still open."""

    def __init__(self, function: str, groups: Int[ndarray, " N"], count: int, per_group: int) -> None:
        if count < 0:
            raise ValueError(f"{function}: count={count} must be at least 0; give the number of labels to buy")
        if per_group < 1:
            raise ValueError(f"{function}: per_group={per_group} must be at least 1; else nothing can be picked")
        self.open: Bool[ndarray, " N"] = np.ones(len(groups), bool)
        self._groups, self._per_group = groups, per_group
        self._picked: Counter[int] = Counter()

    def take(self, index: int) -> None:
        """Count a pick; no question is picked twice."""
        self.open[index] = False
        group = int(self._groups[index])
        self._picked[group] += 1
        if self._picked[group] >= self._per_group:
            self.open[self._groups == group] = False


def _greedy(
    function: str,
    queries: Float[ndarray, "N D"],
    information: Float[ndarray, " N"],
    covariance: Float[ndarray, "D D"],
    target: Float[ndarray, "D D"] | None,
    costs: Float[ndarray, " N"],
    groups: Int[ndarray, " N"],
    count: int,
    per_group: int,
    base: Float[ndarray, " N"] | None,
    strength: float,
) -> Batch:
    """Pick by base + strength·gain/cost; the gain is the drop of tr(TΣ), or of ln det Σ without T."""
    z, omega = np.asarray(queries, float), np.asarray(information, float)
    costs, groups = np.asarray(costs, float), np.asarray(groups)
    base = np.zeros(len(z)) if base is None else np.asarray(base, float)
    same_lengths(function, queries=z, information=omega, costs=costs, groups=groups, base=base)
    sigma = np.array(covariance, float)
    _check_design(function, z, omega, sigma, target, costs, base)
    limit = _Limit(function, groups, count, per_group)
    limit.open &= base > -np.inf
    spread = _quadratic(z, sigma)  # zᵀΣz
    aim = np.zeros(len(z)) if target is None else _quadratic(z, sigma @ target @ sigma)  # zᵀΣTΣz
    picks: list[int] = []
    values: list[float] = []
    while len(picks) < count and limit.open.any():
        gain = np.log1p(omega * spread) if target is None else omega * aim / (1 + omega * spread)
        best = int(np.argmax(np.where(limit.open, base + strength * gain / costs, -np.inf)))
        picks.append(best)
        values.append(float(gain[best] / costs[best]))
        limit.take(best)
        h = sigma @ z[best]
        shrink = omega[best] / (1 + omega[best] * (z[best] @ h))
        if target is None:
            along = z @ h
        else:  # with Σ' = Σ - shrink·hhᵀ: zᵀΣ'TΣ'z = zᵀΣTΣz - 2·shrink·(zᵀh)(zᵀΣTh) + shrink²·(zᵀh)²·hᵀTh
            th = target @ h
            along, across = (z @ np.stack([h, sigma @ th], 1)).T
            aim = np.maximum(aim + shrink * along * (shrink * (h @ th) * along - 2 * across), 0.0)
        spread = np.maximum(spread - shrink * along**2, 0.0)
        sigma -= shrink * np.outer(h, h)
    return Batch(np.array(picks, int), np.array(values, float))


def _quadratic(z: Float[ndarray, "N D"], matrix: Float[ndarray, "D D"]) -> Float[ndarray, " N"]:
    """Return zᵀMz for every row, a chunk of rows at a time."""
    parts = [z[start : start + _CHUNK] for start in range(0, len(z), _CHUNK)]
    return np.concatenate([np.einsum("nd,nd->n", part @ matrix, part) for part in parts] or [np.zeros(0)])


def _check_design(
    function: str,
    z: Float[ndarray, "N D"],
    omega: Float[ndarray, " N"],
    sigma: Float[ndarray, "D D"],
    target: Float[ndarray, "D D"] | None,
    costs: Float[ndarray, " N"],
    base: Float[ndarray, " N"],
) -> None:
    """Refuse what would give picks without meaning."""
    for name, matrix in (("covariance", sigma), ("target", target)):
        if matrix is None:
            continue
        if matrix.shape != (z.shape[1], z.shape[1]):
            raise ValueError(
                f"{function}: {name} has shape {matrix.shape}; queries of {z.shape[1]} dimensions need a square of that"
            )
        if not np.isfinite(matrix).all() or not np.allclose(
            matrix, matrix.T, rtol=1e-6, atol=1e-9 * np.abs(matrix).max()
        ):
            raise ValueError(f"{function}: {name} must be finite and symmetric; (M + Mᵀ)/2 mends rounding errors")
    if not (np.isfinite(omega) & (omega >= 0)).all():
        raise ValueError(f"{function}: information must be finite and at least 0; see query_information")
    if not (np.isfinite(costs) & (costs > 0)).all():
        raise ValueError(
            f"{function}: costs must be finite and above 0, got {costs.min()}; a free label has no rank here"
        )
    if np.isnan(base).any() or (base == np.inf).any():
        raise ValueError(f"{function}: base must be finite, or -inf for what is never picked")
    rows = np.flatnonzero(~np.isfinite(z.sum(1)))
    if rows.size:
        raise ValueError(f"{function}: {rows.size} queries are not finite, the first is row {rows[0]}; drop them")


def same_lengths(function: str, **arrays: Sequence[object] | ndarray) -> None:
    """Raise ValueError unless all arrays have one entry a question."""
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {n}" for name, n in lengths.items())
        raise ValueError(f"{function}: expected equal lengths, got {found}; give one entry a question")
