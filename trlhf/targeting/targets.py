"""What a batch of labels is chosen for: the matrix T of a sum of variances, E (θᵀd)² over differences d of samples."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from trlhf.targeting.acquisition import same_lengths


def target_factor(
    features: Float[ndarray, "R D"],
    prompts: Int[ndarray, " R"],
    weights: Float[ndarray, " R"],
    values: Float[ndarray, " P"],
) -> Float[ndarray, "R D"]:
    """Return A with AᵀA = `target_matrix`: row r is √(2 U w_r / (n-1)) · (φ_r - mean of the prompt's φ)."""
    features, weights, values = np.asarray(features, float), np.asarray(weights, float), np.asarray(values, float)
    prompts = np.asarray(prompts)
    same_lengths("target_matrix", features=features, prompts=prompts, weights=weights)
    if prompts.size and not 0 <= prompts.min() <= prompts.max() < len(values):
        raise ValueError(
            f"target_matrix: prompts go from {prompts.min()} to {prompts.max()}; they must be indices into the "
            f"{len(values)} values"
        )
    for name, array in (("weights", weights), ("values", values)):
        if not (array >= 0).all():
            raise ValueError(f"target_matrix: {name} must be at least 0, got {array.min()}; drop such rows")
    totals = np.bincount(prompts, weights, minlength=len(values))
    sums = np.zeros((len(values), features.shape[1]))
    np.add.at(sums, prompts, weights[:, None] * features)
    centred = features - (sums / np.where(totals > 0, totals, 1.0)[:, None])[prompts]
    scale = np.where(totals > 1, 2 * values / np.where(totals > 1, totals - 1, 1.0), 0.0)[prompts] * weights
    return np.asarray(np.sqrt(scale)[:, None] * centred)


def target_matrix(
    features: Float[ndarray, "R D"],
    prompts: Int[ndarray, " R"],
    weights: Float[ndarray, " R"],
    values: Float[ndarray, " P"],
) -> Float[ndarray, "D D"]:
    """Return which differences between rollouts a policy update will use, T = Σ_x U(x)·mean_{i<j}(φ_i-φ_j)(φ_i-φ_j)ᵀ.

    The mean is over all pairs of a prompt's n rollouts. No pair is looped over: Σ_{i<j}(φ_i-φ_j)(φ_i-φ_j)ᵀ =
    n Σ_i(φ_i-φ̄)(φ_i-φ̄)ᵀ, so that the mean is 2/(n-1)·Σ_i(φ_i-φ̄)(φ_i-φ̄)ᵀ: twice the covariance. tr(TΣ) is then the
    U-weighted posterior variance of those differences in reward.

    Args:
        features: φ, a row for each rollout, or for each cluster of rollouts that share their features.
        prompts: whose row it is, an index into ``values``.
        weights: how many rollouts the row stands for; n is their sum over the prompt, and a prompt with n ≤ 1 has no
            pairs.
        values: U(x) of each prompt, at least 0.

    Raises:
        ValueError: lengths that differ, a prompt without a value, a negative weight or value.
    """
    factor = target_factor(features, prompts, weights, values)
    return np.asarray(factor.T @ factor)


def balanced_target(
    rows: Float[ndarray, "C Q"],
    prompts: Int[ndarray, " C"],
    counts: Int[ndarray, " C"],
    value: Float[ndarray, " P"],
    covariance: Float[ndarray, "Q Q"],
) -> Float[ndarray, "Q Q"]:
    """Return T = Σ_x U(x)·T_x/tr(T_xΣ), T_x the mean over pairs of x's samples of (x_i-x_j)(x_i-x_j)ᵀ.

    Each prompt counts U(x), however far apart its responses are; one whose variance is 0 counts nothing.

    Args:
        rows: of the distinct responses.
        prompts: of each, its prompt's number.
        counts: of each, how many samples it stands for.
        value: U of each prompt.
        covariance: Σ.
    """
    factor = target_factor(rows, prompts, counts, np.ones(len(value)))
    variance = np.bincount(prompts, ((factor @ covariance) * factor).sum(1), len(value))
    scale = np.where(variance > 1e-9, value / np.maximum(variance, 1e-9), 0.0)
    return target_matrix(rows, prompts, counts, scale)
