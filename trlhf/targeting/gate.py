"""What never gets a label: truncated, repetitive and outlying responses. The gate comes before any score.

Scores of uncertainty like junk best, since the model knows least about it (Karamcheti et al. 2021, collective outliers,
https://arxiv.org/abs/2107.02331).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.linalg import solve_triangular

COPIES = 4  # back to back
RUN_TOKENS = 16  # that the copies cover together
NGRAM = 4  # tokens
DISTINCT_SHARE = 0.5  # of the n-grams
DISTINCT_NGRAMS = 32  # fewer n-grams say nothing about their share
OUTLIER_PERCENTILE = 99.0  # of the distances of what is usual: beyond it lies an outlier
FEWEST_USUAL = 20  # prompts that a measure of what is usual must come from


def repetition(token_ids: Sequence[int]) -> str | None:
    """Say how a response repeats itself, in words; None if it does not.

    Two rules, either is enough:

    - back to back: some block of tokens comes at least `COPIES` times in a row, and the copies, with a last one that
      may be cut off, cover at least `RUN_TOKENS` tokens;
    - vocabulary: the response has at least `DISTINCT_NGRAMS` n-grams of `NGRAM` tokens, and fewer than `DISTINCT_SHARE`
      of them are distinct (distinct-n, Li et al. 2016, https://arxiv.org/abs/1510.03055).

    False alarms with the embedded tokenizer: 7 of the 8,792 solutions of GSM8K, none of 3,447 samples of the embedded
    policies after SFT and RL.
    """
    ids = np.asarray(token_ids, np.int64)
    for block in range(1, len(ids) // COPIES + 1):
        run = block + _longest_run(ids[block:] == ids[:-block])
        if run >= max(COPIES * block, RUN_TOKENS):
            return f"a block of {block} {'token' if block == 1 else 'tokens'} comes {run // block} times in a row"
    if len(ids) >= DISTINCT_NGRAMS + NGRAM - 1:
        ngrams = np.lib.stride_tricks.sliding_window_view(ids, NGRAM)
        share = len(np.unique(ngrams, axis=0)) / len(ngrams)
        if share < DISTINCT_SHARE:
            return f"{share:.0%} of its {NGRAM}-token sequences are distinct, fewer than {DISTINCT_SHARE:.0%}"
    return None


def is_repetitive(token_ids: Sequence[int]) -> bool:
    """Say whether a response repeats itself, by the rules of `repetition`."""
    return repetition(token_ids) is not None


def shrunk_covariance(rows: Float[ndarray, "M D"]) -> Float[ndarray, "D D"]:
    """Return the covariance shrunk towards a multiple of the identity, invertible even with fewer rows than dimensions.

    Σ = (1-ρ)S + ρ·m·I with S = XᵀX/M of the centred rows x, m = tr(S)/D and ρ = min(1, b²/d²), d² = ‖S - mI‖²_F,
    b² = (Σ‖x‖⁴/M - ‖S‖²_F)/M: Ledoit and Wolf 2004, section 3.2, https://doi.org/10.1016/S0047-259X(03)00096-4.

    Raises:
        ValueError: fewer than 2 rows, rows that are all equal, or values that are not finite.
    """
    rows = np.asarray(rows, float)
    if len(rows) < 2:
        raise ValueError(f"shrunk_covariance: {len(rows)} rows have no covariance; give at least 2")
    if not np.isfinite(rows).all():
        raise ValueError("shrunk_covariance: rows must be finite; drop those that are not")
    centred = rows - rows.mean(0)
    covariance = centred.T @ centred / len(rows)
    scale = float(np.trace(covariance)) / rows.shape[1]
    if not scale > 1e-20 * float(np.mean(rows**2)):
        raise ValueError(f"shrunk_covariance: all {len(rows)} rows are equal; give rows that differ")
    square = float((covariance**2).sum())
    distance = square - rows.shape[1] * scale**2  # d²
    noise = max(0.0, (float((np.square(centred).sum(1) ** 2).mean()) - square) / len(rows))  # b²
    share = noise / distance if noise < distance else 1.0
    return np.asarray((1 - share) * covariance + share * scale * np.eye(rows.shape[1]))


def mahalanobis_distances(features: Float[ndarray, "N D"], reference: Float[ndarray, "M D"]) -> Float[ndarray, " N"]:
    """Return √((φ-μ)ᵀΣ⁻¹(φ-μ)) of every row, with the mean and the `shrunk_covariance` of the reference rows.

    Raises:
        ValueError: other dimensions than the reference's, and for the reference as `shrunk_covariance`.
    """
    features, reference = np.asarray(features, float), np.asarray(reference, float)
    if features.shape[1:] != reference.shape[1:]:
        raise ValueError(
            f"mahalanobis_distances: features have {features.shape[1]} dimensions, the reference {reference.shape[1]}; "
            "both must come from the same model"
        )
    root = np.linalg.cholesky(shrunk_covariance(reference))
    whitened = solve_triangular(root, (features - reference.mean(0)).T, lower=True, check_finite=False)
    return np.asarray(np.linalg.norm(whitened, axis=0))


def outlier_bound(
    reference: Float[ndarray, "M D"],
    percentile: float = 99.0,
    groups: Int[ndarray, " M"] | None = None,
    folds: int = 10,
    seed: int = 0,
) -> float:
    """Return the distance above which a row is an outlier: a percentile of the reference rows' own distances.

    Out of sample: each fold is measured against the other folds. Distances of rows to a covariance that they made
    themselves are too small, all equal in the extreme of fewer rows than dimensions, and would make everything new an
    outlier. With the default percentile 0.5% to 2.2% of new normal rows are outliers (40 to 1,000 rows,
    16 to 512 dimensions; more rows than dimensions or fewer), in sample 6% to 100%. The percentile is an observed
    distance, the next above; with few rows that is the largest.

    Args:
        reference: responses to prompts that are known to be sound.
        percentile: in (0, 100).
        groups: prompt index of each row; a prompt's rows stay in one fold, since they resemble one another.
        folds: at least 2; at most one a group.
        seed: of the order in which groups go to folds.

    Raises:
        ValueError: fewer than 4 rows or 2 groups, or values out of range.
    """
    reference = np.asarray(reference, float)
    if not 0 < percentile < 100:
        raise ValueError(f"outlier_bound: percentile={percentile} must be between 0 and 100; 99 lets a hundredth out")
    if folds < 2:
        raise ValueError(
            f"outlier_bound: folds={folds} must be at least 2; one fold has nothing to be measured against"
        )
    if groups is not None and len(groups) != len(reference):
        raise ValueError(f"outlier_bound: {len(groups)} groups for {len(reference)} rows; give one entry a row")
    codes = np.arange(len(reference)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    number = len(np.unique(codes))
    if len(reference) < 4 or number < 2:
        raise ValueError(
            f"outlier_bound: {len(reference)} reference rows from {number} prompts are too few; give at least 4 from 2"
        )
    folds = min(folds, number)
    fold = np.random.default_rng(seed).permutation(np.arange(number) % folds)[codes]
    distances = [mahalanobis_distances(reference[fold == k], reference[fold != k]) for k in range(folds)]
    return float(np.percentile(np.concatenate(distances), percentile, method="higher"))


def gate(
    token_ids: Sequence[Sequence[int]],
    finished: Sequence[bool],
    distances: Float[ndarray, " N"] | None = None,
    bound: float | None = None,
) -> list[str | None]:
    """Say for each response why it must not be labelled; None where it may.

    Args:
        token_ids: of each response.
        finished: whether it ended by itself (`Rollout.finished`).
        distances: of `mahalanobis_distances`; None where there are no features.
        bound: of `outlier_bound`; beyond it, or not a number, is an outlier. None: no bound.

    Raises:
        ValueError: lengths that differ, or only one of distances and bound.
    """
    if (distances is None) != (bound is None):
        raise ValueError("gate: distances and bound belong together; give both or none")
    lengths = {len(token_ids), len(finished), len(token_ids if distances is None else distances)}
    if len(lengths) > 1:
        raise ValueError(f"gate: expected equal lengths, got {sorted(lengths)}; give one entry a response")
    return [
        _reason(ids, ended, None if distances is None else float(distances[i]), bound)
        for i, (ids, ended) in enumerate(zip(token_ids, finished, strict=True))
    ]


def _reason(token_ids: Sequence[int], finished: bool, distance: float | None, bound: float | None) -> str | None:
    if not finished:
        return f"truncated: no end within {len(token_ids)} tokens"
    repeats = repetition(token_ids)
    if repeats is not None:
        return f"repetitive: {repeats}"
    if distance is not None and bound is not None and not distance <= bound:
        return f"outlier: Mahalanobis distance {distance:.1f} from the reference responses, above the bound {bound:.1f}"
    return None


def _longest_run(flags: ndarray) -> int:
    """Return the length of the longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return int((edges[1::2] - edges[::2]).max(initial=0))
