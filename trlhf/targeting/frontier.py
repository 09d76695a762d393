"""Where learning happens: prompts on which a group of samples is likely to be mixed, part right and part wrong."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import minimize
from scipy.special import betaln, expit


def frontier_value(alpha: Float[ndarray, " N"], beta: Float[ndarray, " N"], group: int) -> Float[ndarray, " N"]:
    """Return the posterior probability that ``group`` samples of a prompt are neither all right nor all wrong.

    U = 1 - B(α+n, β)/B(α, β) - B(α, β+n)/B(α, β) for a pass rate p ~ Beta(α, β): all-right and all-wrong groups teach
    nothing (Yu et al. 2025, DAPO, https://arxiv.org/abs/2503.14476). With n = 8: Beta(1,1) 0.78, Beta(5,5) 0.96,
    Beta(1,17) 0.32.

    Args:
        alpha: pseudo-count of right samples, > 0.
        beta: pseudo-count of wrong samples, > 0.
        group: n, samples per prompt in an update, at least 2.

    Raises:
        ValueError: a count that is not positive, or a group of fewer than 2.
    """
    alpha, beta = np.asarray(alpha, float), np.asarray(beta, float)
    if group < 2:
        raise ValueError(f"frontier_value: a group of {group} cannot be mixed; it needs at least 2 samples")
    if (alpha <= 0).any() or (beta <= 0).any():
        raise ValueError("frontier_value: alpha and beta must be positive")
    base = betaln(alpha, beta)
    return np.asarray(1 - np.exp(betaln(alpha + group, beta) - base) - np.exp(betaln(alpha, beta + group) - base))


# The share of the top answer among the samples, as a logistic regressor of "the top answer is right". Before any label
# the model says that an answer given by half of the samples is right with probability 0.5, and one given by all with
# 0.88.
_PRIOR_COEFFICIENTS = np.array([-2.0, 4.0])
_PRIOR_PRECISION = 1.0


def fit_top_answer_model(share: Float[ndarray, " N"], right: Float[ndarray, " N"]) -> Float[ndarray, " 2"]:
    """Fit P(top answer is right) = σ(w₀ + w₁·share) on the verdicts so far.

    Maximum a posteriori with a Gaussian prior of precision 1 around a label-free guess, which is what is returned
    without labels.

    Args:
        share: of the samples that gave the answer that was judged, in (0, 1].
        right: 1 for a right verdict, 0 for a wrong one.
    """
    share, right = np.asarray(share, float), np.asarray(right, float)
    if not len(share):
        return _PRIOR_COEFFICIENTS.copy()
    design = np.stack([np.ones_like(share), share], 1)

    def objective(w: ndarray) -> tuple[float, ndarray]:
        logits = design @ w
        deviation = w - _PRIOR_COEFFICIENTS
        value = np.logaddexp(0, logits).sum() - right @ logits + 0.5 * _PRIOR_PRECISION * deviation @ deviation
        return float(value), design.T @ (expit(logits) - right) + _PRIOR_PRECISION * deviation

    return np.asarray(minimize(objective, _PRIOR_COEFFICIENTS, jac=True).x)


def top_answer_probability(coefficients: Float[ndarray, " 2"], share: Float[ndarray, " N"]) -> Float[ndarray, " N"]:
    """Return P(top answer is right) for the share of samples that gave it."""
    return np.asarray(expit(coefficients[0] + coefficients[1] * np.asarray(share, float)))
