"""Which of two responses is liked better? A small Bayesian model of comparisons with ties, noise and position bias."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.linalg import cho_factor, cho_solve, cholesky
from scipy.optimize import minimize
from scipy.special import expit

from trlhf.targeting.swaps import Noise

SPREADS = (0.5, 1.0, 2.0, 4.0)  # candidates for the prior standard deviation of w·φ over responses, in logits
DEFAULT_SPREAD, SPREAD_SD = 1.0, 0.7  # before there is anything to choose from; of its logarithm
FEWEST = 16  # decided comparisons from which cross-validation chooses the spread
FOLDS = 5
TYPICAL_SLOPE, TYPICAL_SD = 0.5, 1.0  # prior of the coefficients of the typicality columns
DECIDED_SPREAD, DECIDED_SD = 1.0, 2.0  # of the model of ties: its features, and its constant
NEWTON_STEPS = 50


@dataclass(frozen=True)
class Compared:
    """n comparisons.

    Attributes:
        first: features of A, [n, D + E]: D on a sphere of radius √D, then E typicality columns of standard deviation 1
            (larger: more like what the model does when it is sure).
        second: of B.
        outcomes: 1 where A was preferred, 0 where B was, 0.5 for a tie, [n].
        typical: E.
    """

    first: Float[ndarray, "n Q"]
    second: Float[ndarray, "n Q"]
    outcomes: Float[ndarray, " n"]
    typical: int = 0

    def __getitem__(self, rows: ndarray) -> Compared:
        """Return some of the comparisons."""
        return Compared(self.first[rows], self.second[rows], self.outcomes[rows], self.typical)


@dataclass(frozen=True)
class PreferenceModel:
    """P(A preferred to B | not a tie) = σ(θ·(φ_A - φ_B)), P(not a tie) = σ(v·[1, (φ_A + φ_B)/2]); θ ~ N(θ̂, Σ).

    Bradley and Terry 1952 on the comparisons that are decided, as in Davidson's model (1970,
    https://doi.org/10.1080/01621459.1970.10481082), but with the odds of a tie depending on the two responses: where
    both miss the task, neither is better, and a label is wasted.

    Attributes:
        mean: θ̂, [Q].
        covariance: Σ, Laplace's approximation with the expected information, [Q, Q].
        decided: v, the most likely, [1 + Q].
        noise: flip rate and position bias of whoever answers.
        spread: prior standard deviation of θ·φ that was chosen, in logits.
        compared: how many comparisons it was fitted on, ties included.
    """

    mean: Float[ndarray, " Q"]
    covariance: Float[ndarray, "Q Q"]
    decided: Float[ndarray, " Q+1"]
    noise: Noise
    spread: float
    compared: int

    def draws(self, rows: Float[ndarray, "N Q"], count: int, rng: np.random.Generator) -> Float[ndarray, "N S"]:
        """Return the liking θ·φ of each row under ``count`` draws of θ."""
        root = cholesky(self.covariance + 1e-12 * np.eye(len(self.mean)), lower=True)
        return np.asarray(rows @ (self.mean[:, None] + root @ rng.standard_normal((len(self.mean), count))))

    def told_apart(self, first: Float[ndarray, "N Q"], second: Float[ndarray, "N Q"]) -> Float[ndarray, " N"]:
        """Return the probability that an errorless person prefers one of the two: no tie."""
        return np.asarray(expit(_pair_rows(first, second) @ self.decided))

    def information(self, first: Float[ndarray, "N Q"], second: Float[ndarray, "N Q"]) -> Float[ndarray, " N"]:
        """Return the Fisher information of each comparison about its margin θ·(φ_A - φ_B); see `information`."""
        return information((first - second) @ self.mean, self.told_apart(first, second), self.noise)


def information(margins: Float[ndarray, " N"], decided: Float[ndarray, " N"], noise: Noise) -> Float[ndarray, " N"]:
    """Return ω = (β·p(1-p))²·[1/P(A) + 1/P(B)], the information of an answer about the margin m, p = σ(m).

    P(A) = b + (1-b)εd̄ + βp and P(B) = (1-b)εd̄ + β(1-p), with d the probability of no tie, β = (1-b)(1-2ε)d and
    d̄ = d + (1-d)/2. Without noise and bias it is d·p(1-p). P(tie) does not depend on m. Position bias lowers it where A
    is expected less than where B is: an A may be unread, a B never is.

    Args:
        margins: in logits, A over B.
        decided: d, in [0, 1].
        noise: ε and b.
    """
    first, second, beta = _answers(decided, noise)
    p = expit(margins)
    slope = beta * p * (1 - p)
    chances = np.maximum(first + beta * p, 1e-12), np.maximum(second + beta * (1 - p), 1e-12)
    return np.asarray(slope**2 * (1 / chances[0] + 1 / chances[1]))


def fit_preferences(compared: Compared, noise: Noise) -> PreferenceModel:
    """Fit both halves of the model to comparisons.

    The prior of θ is N(0, spread²/D) on the features and N(½, 1) on the typicality columns; the spread is the candidate
    under which comparisons left out of the fit are likeliest, from `FEWEST` decided ones on.

    Raises:
        ValueError: rows that do not fit together, or outcomes other than 1, 0.5 and 0.
    """
    n, size = compared.first.shape
    if compared.second.shape != (n, size) or len(compared.outcomes) != n:
        raise ValueError(
            f"fit_preferences: first {compared.first.shape}, second {compared.second.shape} and "
            f"{len(compared.outcomes)} outcomes; there must be one of each for every comparison"
        )
    if not np.isin(compared.outcomes, (0.0, 0.5, 1.0)).all():
        raise ValueError(
            f"fit_preferences: outcomes must be 1, 0.5 or 0, got {sorted(set(compared.outcomes.tolist()))}"
        )
    mean = np.zeros(size)
    mean[size - compared.typical :] = TYPICAL_SLOPE
    decided = _fit_decided(compared, noise)
    told = compared[compared.outcomes != 0.5]
    rows, first = told.first - told.second, told.outcomes == 1
    open_ = expit(_pair_rows(told.first, told.second) @ decided)
    spread = DEFAULT_SPREAD
    if len(rows) >= FEWEST:
        fold = np.arange(len(rows)) % FOLDS
        losses = []
        for candidate in SPREADS:
            loss = 0.5 * (np.log(candidate / DEFAULT_SPREAD) / SPREAD_SD) ** 2
            for k in range(FOLDS):
                kept, out = fold != k, fold == k
                theta, _ = _fit(rows[kept], first[kept], open_[kept], noise, mean, _variance(compared, candidate))
                loss += float(_loss(rows[out] @ theta, first[out], open_[out], noise)[0].sum())
            losses.append(loss)
        spread = SPREADS[int(np.argmin(losses))]
    theta, covariance = _fit(rows, first, open_, noise, mean, _variance(compared, spread))
    return PreferenceModel(theta, covariance, decided, noise, spread, n)


def _variance(compared: Compared, spread: float) -> Float[ndarray, " Q"]:
    size = compared.first.shape[1]
    variance = np.full(size, TYPICAL_SD**2)
    variance[: size - compared.typical] = spread**2 / max(1, size - compared.typical)
    return variance


def _answers(decided: ndarray, noise: Noise) -> tuple[ndarray, ndarray, ndarray]:
    """Return α_A, α_B and β: P(A) = α_A + β·p, P(B) = α_B + β·(1-p)."""
    e, b = noise
    second = (1 - b) * e * (decided + (1 - decided) / 2)
    return b + second, second, (1 - b) * (1 - 2 * e) * decided


def _loss(margins: ndarray, first: ndarray, decided: ndarray, noise: Noise) -> tuple[ndarray, ndarray]:
    """Return -log P(answer) of each comparison that was no tie, and its derivative in the margin."""
    low_first, low_second, beta = _answers(decided, noise)
    p = expit(margins)
    chance = np.maximum(np.where(first, low_first + beta * p, low_second + beta * (1 - p)), 1e-300)
    return -np.log(chance), np.where(first, -1.0, 1.0) * beta * p * (1 - p) / chance


def _fit(
    rows: ndarray, first: ndarray, decided: ndarray, noise: Noise, mean: ndarray, variance: ndarray
) -> tuple[Float[ndarray, " Q"], Float[ndarray, "Q Q"]]:
    """Return the maximum a posteriori θ and Laplace's covariance, by Fisher scoring in the space of the comparisons.

    With V the prior's variances, K = ZVZᵀ and θ = μ + VZᵀa it needs n x n systems only. A step that does not lower the
    objective is halved.
    """
    scaled = rows * variance
    kernel, start = scaled @ rows.T, rows @ mean
    a = np.zeros(len(rows))

    def objective(a: ndarray) -> float:
        return float(_loss(start + kernel @ a, first, decided, noise)[0].sum() + 0.5 * a @ kernel @ a)

    value = objective(a)
    for _ in range(NEWTON_STEPS):
        margins = start + kernel @ a
        slope = _loss(margins, first, decided, noise)[1]
        omega = np.maximum(information(margins, decided, noise), 1e-9)
        step = np.linalg.solve(np.diag(1 / omega) + kernel, -(slope + a) / omega)
        size = 1.0
        while size > 1e-6 and objective(a + size * step) > value:
            size /= 2
        a = a + size * step
        before, value = value, objective(a)
        if before - value < 1e-12 * (1 + abs(value)):
            break
    omega = np.maximum(information(start + kernel @ a, decided, noise), 1e-12)
    half = np.sqrt(omega)[:, None] * scaled
    factor = cho_factor(np.eye(len(rows)) + np.sqrt(omega)[:, None] * kernel * np.sqrt(omega), lower=True)
    covariance = np.diag(variance) - half.T @ cho_solve(factor, half)
    return mean + scaled.T @ a, np.asarray((covariance + covariance.T) / 2)


def _pair_rows(first: ndarray, second: ndarray) -> Float[ndarray, "N Q+1"]:
    return np.hstack([np.ones((len(first), 1)), (first + second) / 2])


def _fit_decided(compared: Compared, noise: Noise) -> Float[ndarray, " Q+1"]:
    """Return the most likely v of P(no tie) = σ(v·x): a tie is answered with probability κ(1-d), κ = (1-b)(1-ε)."""
    keep = (1 - noise.bias) * (1 - noise.flip_rate)
    rows, tied = _pair_rows(compared.first, compared.second), compared.outcomes == 0.5
    size = rows.shape[1] - 1 - compared.typical
    precision = np.concatenate(
        [[1 / DECIDED_SD**2], np.full(size, size / DECIDED_SPREAD**2), np.full(compared.typical, 1 / TYPICAL_SD**2)]
    )
    mean = np.concatenate([np.zeros(1 + size), np.full(compared.typical, TYPICAL_SLOPE)])

    def objective(v: ndarray) -> tuple[float, ndarray]:
        d = expit(rows @ v)
        chance = np.maximum(np.where(tied, keep * (1 - d), 1 - keep * (1 - d)), 1e-300)
        slope = np.where(tied, 1.0, -1.0) * keep * d * (1 - d) / chance
        value = -np.log(chance).sum() + 0.5 * (precision * (v - mean) ** 2).sum()
        return float(value), rows.T @ slope + precision * (v - mean)

    return np.asarray(minimize(objective, mean, jac=True, method="L-BFGS-B", options={"maxiter": 300}).x)
