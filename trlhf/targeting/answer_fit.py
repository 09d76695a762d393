"""Fitting the answer model to labels: the posterior of θ, the width of its prior, and how well labels are foretold."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.linalg import cho_factor, cho_solve, cholesky
from scipy.optimize import minimize

from trlhf.targeting.answers import FLIP_RATE, AnswerModel, Answers

SPREADS = (1.0, 2.0, 3.0, 4.0, 8.0)  # candidates for the prior standard deviation of w·φ over answers, in logits
DEFAULT_SPREAD = 3.0
FEWEST = 16  # labelled prompts from which cross-validation chooses the spread
FOLDS = 4
DRAWS = 64  # of θ, that foretell what was left out
SPREAD_SD = 0.5  # prior standard deviation of log spread: a few labels cannot tell spreads apart
SHARE_SLOPE, SHARE_SD = 2.0, 2.0  # prior of the coefficient of an answer's share of the samples
NONE_SD = 2.0  # prior standard deviation of the logit that none of the answers is right
NEWTON_STEPS = 3


def fit_answers(answers: Answers, flip_rate: float = FLIP_RATE) -> AnswerModel:
    """Fit the model to the labels in ``answers``; unlabelled prompts add nothing.

    The log-likelihood of a labelled prompt is log Σ_c p_c·P(labels | c), the prior θ ~ N((0, 2, 0 …), diag). The spread
    of the features' prior is the candidate under which labelled prompts left out of the fit are likeliest (`FOLDS`-fold
    cross-validation), from `FEWEST` labelled prompts on; before, it is `DEFAULT_SPREAD`. (The Laplace evidence always
    chose the widest on the embedded world, where 3 told more answers apart than 8.)

    Raises:
        ValueError: rows that do not fit together.
    """
    c, size = answers.features.shape
    if len(answers.shares) != c or len(answers.prompts) != c or len(answers.likelihood) != c:
        raise ValueError(
            f"fit_answers: {c} feature rows, {len(answers.shares)} shares, {len(answers.prompts)} prompts and "
            f"{len(answers.likelihood)} likelihoods; there must be one of each for every answer"
        )
    rows, groups, likelihood = _labelled(answers)
    mean, count = _prior_mean(size), len(set(groups.tolist()))
    if not count:
        return AnswerModel(mean, np.diag(1 / _precision(size, DEFAULT_SPREAD)), DEFAULT_SPREAD, 0)
    spread = DEFAULT_SPREAD
    if count >= FEWEST:
        scores = [
            _left_out(rows, groups, likelihood, candidate) - 0.5 * (np.log(candidate / DEFAULT_SPREAD) / SPREAD_SD) ** 2
            for candidate in SPREADS
        ]
        spread = SPREADS[int(np.argmax(scores))]
    precision = _precision(size, spread)
    theta = _maximise(rows, groups, likelihood, mean, precision, mean)
    return AnswerModel(theta, _covariance(rows, groups, likelihood, precision, theta, flip_rate), spread, count)


def left_out_log_likelihood(answers: Answers, flip_rate: float) -> float:
    """Return log P(labels) where what foretells those of a prompt was fitted without them, in nats.

    `FOLDS`-fold cross-validation over labelled prompts under `DEFAULT_SPREAD`, averaged over `DRAWS` draws of θ. As a
    function of ε it says how often labels err: verdicts that contradict each other, and those that contradict what is
    foretold. (Without the average the model is too sure of itself, and takes its own errors for those of the labels.) 0
    with fewer than `FEWEST` labelled prompts.

    Args:
        answers: with the likelihoods of their labels under ``flip_rate``.
        flip_rate: ε.
    """
    rows, groups, likelihood = _labelled(answers)
    if len(set(groups.tolist())) < FEWEST:
        return 0.0
    most, least = _extremes(answers)
    total = float(np.log(most[~_differ(most, least)]).sum())  # labels that speak for all answers alike
    size = answers.features.shape[1]
    mean, precision = _prior_mean(size), _precision(size, DEFAULT_SPREAD)
    noise = np.random.default_rng(0).standard_normal((size + 2, DRAWS))
    for inside, numbers, outside in _folds(groups):
        fitted = rows[inside], numbers, likelihood[inside]
        theta = _maximise(*fitted, mean, precision, mean)
        covariance = _covariance(*fitted, precision, theta, flip_rate)
        draws = theta[:, None] + cholesky(covariance + 1e-12 * np.eye(size + 2), lower=True) @ noise
        foretold = [_weigh(column, outside, likelihood[~inside])[2] for column in (rows[~inside] @ draws).T]
        total += float(np.log(np.mean(foretold, 0)).sum())
    return total


def _labelled(answers: Answers) -> tuple[Float[ndarray, "M Q"], Int[ndarray, " M"], Float[ndarray, " M"]]:
    """Return the design's rows of the prompts whose labels tell answers apart, renumbered from 0; and likelihoods."""
    rows, groups = answers.design(), answers.groups()
    labelled = np.flatnonzero(_differ(*_extremes(answers)))
    kept = np.isin(groups, labelled)
    return rows[kept], np.searchsorted(labelled, groups[kept]), answers.likelihoods()[kept]


def _extremes(answers: Answers) -> tuple[Float[ndarray, " P"], Float[ndarray, " P"]]:
    """Return the largest and the smallest likelihood of each prompt's alternatives."""
    most, least = np.zeros(answers.count), np.full(answers.count, np.inf)
    np.maximum.at(most, answers.groups(), answers.likelihoods())
    np.minimum.at(least, answers.groups(), answers.likelihoods())
    return most, least


def _differ(most: Float[ndarray, " P"], least: Float[ndarray, " P"]) -> Bool[ndarray, " P"]:
    return np.asarray(most > least * (1 + 1e-9))


def _prior_mean(size: int) -> Float[ndarray, " Q"]:
    mean = np.zeros(size + 2)
    mean[1] = SHARE_SLOPE
    return mean


def _precision(size: int, spread: float) -> Float[ndarray, " Q"]:
    sd = np.full(size + 2, spread / np.sqrt(max(1, size)))
    sd[0], sd[1] = NONE_SD, SHARE_SD
    return np.asarray(1 / sd**2)


def _folds(groups: Int[ndarray, " M"]) -> Iterator[tuple[Bool[ndarray, " M"], Int[ndarray, " I"], Int[ndarray, " O"]]]:
    """Yield for each fold of prompts which rows are of the others, and the renumbered prompts of these and of its own.

    In the order of the prompts, which knows nothing of them.
    """
    fold = np.arange(groups.max() + 1) % FOLDS
    for left_out in range(FOLDS):
        inside = fold[groups] != left_out
        yield (
            inside,
            np.unique(groups[inside], return_inverse=True)[1],
            np.unique(groups[~inside], return_inverse=True)[1],
        )


def _left_out(rows: ndarray, groups: ndarray, likelihood: ndarray, spread: float) -> float:
    """Return the log-likelihood of the labels of each fold of prompts at the optimum of the other folds."""
    size = rows.shape[1] - 2
    mean, precision, total = _prior_mean(size), _precision(size, spread), 0.0
    for inside, numbers, outside in _folds(groups):
        theta = _maximise(rows[inside], numbers, likelihood[inside], mean, precision, mean)
        total += float(np.log(_weigh(rows[~inside] @ theta, outside, likelihood[~inside])[2]).sum())
    return total


def _maximise(
    rows: ndarray, groups: ndarray, likelihood: ndarray, mean: ndarray, precision: ndarray, start: ndarray
) -> Float[ndarray, " Q"]:
    """Return the maximum a posteriori θ."""

    def objective(theta: ndarray) -> tuple[float, ndarray]:
        deviation = theta - mean
        p, joint, total = _weigh(rows @ theta, groups, likelihood)
        value = -np.log(total).sum() + 0.5 * deviation @ (precision * deviation)
        return float(value), rows.T @ (p - joint) + precision * deviation

    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 300}).x
    return _polish(rows, groups, likelihood, mean, precision, np.asarray(found))


def _polish(
    rows: ndarray, groups: ndarray, likelihood: ndarray, mean: ndarray, precision: ndarray, theta: ndarray
) -> Float[ndarray, " Q"]:
    """Take Newton's steps to the last digits, so that the end does not depend on the way there.

    H = Λ + Σ_x [Cov_p(x_c) - Cov_r(x_c)], p before the labels and r given them. Where it is not positive definite the
    point is left as it is.
    """
    count = groups.max() + 1
    for _ in range(NEWTON_STEPS):
        p, joint, _ = _weigh(rows @ theta, groups, likelihood)
        means = np.zeros((2, count, rows.shape[1]))
        np.add.at(means[0], groups, p[:, None] * rows)
        np.add.at(means[1], groups, joint[:, None] * rows)
        curvature = rows.T @ ((p - joint)[:, None] * rows) - means[0].T @ means[0] + means[1].T @ means[1]
        gradient = rows.T @ (p - joint) + precision * (theta - mean)
        try:
            step = cho_solve(cho_factor(np.diag(precision) + curvature, lower=True), gradient)
        except np.linalg.LinAlgError:
            return theta
        theta = theta - step
    return theta


def _covariance(
    rows: ndarray, groups: ndarray, likelihood: ndarray, precision: ndarray, theta: ndarray, flip_rate: float
) -> Float[ndarray, "Q Q"]:
    """Return Laplace's covariance at the optimum.

    What the labels of a prompt say is taken for one verdict on the answer that they say most about: a Bernoulli draw
    with logit gradient z and information ω = (1-2ε)² p²(1-p)² / [p̃(1-p̃)], p̃ = ε + (1-2ε)p.
    """
    p, joint, _ = _weigh(rows @ theta, groups, likelihood)
    sums = np.zeros((groups.max() + 1, rows.shape[1]))
    np.add.at(sums, groups, p[:, None] * rows)
    order = np.lexsort((-np.abs(joint - p), groups))
    judged = order[np.searchsorted(groups[order], np.arange(groups.max() + 1))]
    q = np.clip(p[judged], 1e-9, 1 - 1e-9)
    z = (rows[judged] - sums) / (1 - q)[:, None]
    seen = flip_rate + (1 - 2 * flip_rate) * q
    omega = (1 - 2 * flip_rate) ** 2 * (q * (1 - q)) ** 2 / (seen * (1 - seen))
    half = np.sqrt(omega)[:, None] * z
    scaled = half / precision
    factor = cho_factor(np.eye(len(half)) + scaled @ half.T, lower=True)
    covariance = np.diag(1 / precision) - scaled.T @ cho_solve(factor, scaled)
    return np.asarray((covariance + covariance.T) / 2)


def _weigh(
    logits: Float[ndarray, " M"], groups: Int[ndarray, " M"], likelihood: Float[ndarray, " M"]
) -> tuple[Float[ndarray, " M"], Float[ndarray, " M"], Float[ndarray, " P"]]:
    """Return the prior and the posterior probability of each alternative, and each group's evidence Σ_c p_c·l_c."""
    top = np.full(groups.max() + 1, -np.inf)
    np.maximum.at(top, groups, logits)
    p = np.exp(logits - top[groups])
    p /= np.bincount(groups, p)[groups]
    joint = p * likelihood
    total = np.maximum(np.bincount(groups, joint), 1e-300)
    return p, joint / total[groups], total
