"""Which of the answers that a model samples is right? A small Bayesian model over the answers of each prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.linalg import cho_factor, cho_solve, cholesky
from scipy.optimize import minimize

SPREADS = (1.0, 2.0, 3.0, 4.0, 8.0)  # candidates for the prior standard deviation of w·φ over answers, in logits
DEFAULT_SPREAD = 3.0
FEWEST = 16  # labelled prompts from which cross-validation chooses the spread
FOLDS = 4
DRAWS = 64  # of θ, that foretell what was left out
SPREAD_SD = 0.5  # prior standard deviation of log spread: a few labels cannot tell spreads apart
SHARE_SLOPE, SHARE_SD = 2.0, 2.0  # prior of the coefficient of an answer's share of the samples
NONE_SD = 2.0  # prior standard deviation of the logit that none of the answers is right
NEWTON_STEPS = 3
FLIP_RATE = 0.02  # chance that a verdict is the opposite of the truth, where nothing else is known


@dataclass(frozen=True)
class Whitening:
    """Features → points on a sphere: whitened (mean 0, variance 1, uncorrelated), then scaled to length √D.

    The length is dropped because it says how unusual a response is, and little else: with it, the optimal designs
    spend their labels on what is rare (benchmarks/LOG.md).

    Attributes:
        mean: of the features, [F].
        map: [F, D]; whitened = (features - mean) @ map.
    """

    mean: Float[ndarray, " F"]
    map: Float[ndarray, "F D"]

    @classmethod
    def fit(cls, features: Float[ndarray, "N F"], most: int = 512, smallest: float = 0.02) -> Whitening:
        """Fit to features: principal components, without those below ``smallest`` times the largest in spread.

        Args:
            features: N rows of any scale, at least one.
            most: directions kept at most.
            smallest: singular values below this share of the largest are noise, and are left out.
        """
        features = np.asarray(features, float)
        mean = features.mean(0)
        _, spread, directions = np.linalg.svd(features - mean, full_matrices=False)
        kept = min(most, int((spread > smallest * max(spread[0], 1e-12)).sum()))
        return cls(mean, directions[:kept].T / np.maximum(spread[:kept], 1e-12) * np.sqrt(len(features)))

    def __call__(self, features: Float[ndarray, "N F"]) -> Float[ndarray, "N D"]:
        """Return the features on the sphere."""
        white = (np.asarray(features, float) - self.mean) @ self.map
        length = np.linalg.norm(white, axis=1, keepdims=True)
        return np.asarray(white / np.maximum(length, 1e-12) * np.sqrt(white.shape[1]))


@dataclass(frozen=True)
class Answers:
    """The distinct answers to P prompts, C in all, the answers of a prompt side by side.

    Attributes:
        features: whitened, of each answer: mean over the samples that end in it, [C, D].
        shares: of its prompt's samples that end in it, [C], in (0, 1]; those of a policy that learned from no reward.
        prompts: number of each answer's prompt, 0 … P-1, not falling, none left out, [C].
        likelihood: P(the labels on the prompt | this answer is the right one), [C]; 1 without labels.
        likelihood_none: the same if none of the answers is right, [P].
    """

    features: Float[ndarray, "C D"]
    shares: Float[ndarray, " C"]
    prompts: Int[ndarray, " C"]
    likelihood: Float[ndarray, " C"]
    likelihood_none: Float[ndarray, " P"]

    @property
    def count(self) -> int:
        """Return P."""
        return len(self.likelihood_none)

    def design(self) -> Float[ndarray, "C+P D+2"]:
        """Return the rows of all alternatives, "none of these" last: 1 for none, the share, the features."""
        answers = np.hstack([np.zeros((len(self.shares), 1)), self.shares[:, None], self.features])
        none = np.zeros((self.count, answers.shape[1]))
        none[:, 0] = 1
        return np.vstack([answers, none])

    def groups(self) -> Int[ndarray, " C+P"]:
        """Return the prompt of each row of `design`."""
        return np.concatenate([self.prompts, np.arange(self.count)])

    def likelihoods(self) -> Float[ndarray, " C+P"]:
        """Return the likelihood of each row of `design`."""
        return np.concatenate([self.likelihood, self.likelihood_none])


def label_likelihood(
    answers: Sequence[str], verdicts: Sequence[tuple[str, bool]], flip_rate: float = FLIP_RATE
) -> tuple[Float[ndarray, " C"], float]:
    """Return P(verdicts | answer c is right) for each answer of a prompt, and the same for "none of these".

    A verdict on an answer is what the truth says with probability 1 - ε, its opposite with ε, each for itself.

    Args:
        answers: distinct, canonical.
        verdicts: each an answer, as written there or any other, and whether it was found right.
        flip_rate: ε in (0, 0.5).

    Raises:
        ValueError: an ε outside of that.
    """
    if not 0 < flip_rate < 0.5:
        raise ValueError(f"label_likelihood: flip_rate={flip_rate} must be in (0, 0.5); at 0.5 a label says nothing")
    log_same, log_other = np.log1p(-flip_rate), np.log(flip_rate)

    def log_probability(truth: str | None) -> float:
        return float(sum(log_same if right == (about == truth) else log_other for about, right in verdicts))

    return np.exp([log_probability(answer) for answer in answers]), float(np.exp(log_probability(None)))


@dataclass(frozen=True)
class AnswerModel:
    """P(answer c of prompt x is right) ∝ exp(θ·x_c), over the prompt's answers and "none of these"; θ ~ N(θ̂, Σ).

    A conditional logit model (McFadden 1974) whose alternatives exclude each other, so that a wrong verdict on one
    answer speaks for the others. x_c holds the answer's share of the samples and its features; the constant of "none"
    is 0. Departure from one logistic verdict each (docs/targeting.md says why).

    Attributes:
        mean: θ̂, [D+2].
        covariance: Σ, [D+2, D+2]: Laplace's approximation with the expected information of each verdict.
        spread: prior standard deviation of w·φ that was chosen, in logits.
        labelled: prompts with labels that it was fitted on.
    """

    mean: Float[ndarray, " Q"]
    covariance: Float[ndarray, "Q Q"]
    spread: float
    labelled: int

    def probabilities(self, answers: Answers) -> Float[ndarray, " C"]:
        """Return P(right) of each answer at θ̂, given the labels on its prompt."""
        return _posterior(answers, (answers.design() @ self.mean)[:, None])[: len(answers.shares), 0]

    def draws(self, answers: Answers, count: int, rng: np.random.Generator) -> Float[ndarray, "C S"]:
        """Return P(right) of each answer, given the labels on its prompt, for ``count`` draws of θ."""
        root = cholesky(self.covariance + 1e-12 * np.eye(len(self.mean)), lower=True)
        theta = self.mean[:, None] + root @ rng.standard_normal((len(self.mean), count))
        return _posterior(answers, answers.design() @ theta)[: len(answers.shares)]

    def queries(self, answers: Answers) -> tuple[Float[ndarray, "C Q"], Float[ndarray, " C"]]:
        """Return the gradient in θ of each answer's logit of a right verdict, and P(right), given the labels so far.

        logit P(c) = log p_c - log(1 - p_c) has the gradient z_c = x_c - E[x_c' | c' is right, c' ≠ c].
        """
        rows, groups = answers.design(), answers.groups()
        p = _posterior(answers, (rows @ self.mean)[:, None])[:, 0]
        sums = np.zeros((answers.count, rows.shape[1]))
        np.add.at(sums, groups, p[:, None] * rows)
        c = len(answers.shares)
        others = (sums[answers.prompts] - p[:c, None] * rows[:c]) / np.maximum(1 - p[:c, None], 1e-9)
        return rows[:c] - others, p[:c]


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


def _posterior(answers: Answers, logits: Float[ndarray, "M S"]) -> Float[ndarray, "M S"]:
    """Return P(alternative is right | labels), each column a θ of its own."""
    groups = answers.groups()
    top = np.full((answers.count, logits.shape[1]), -np.inf)
    np.maximum.at(top, groups, logits)
    weight = np.exp(logits - top[groups]) * answers.likelihoods()[:, None]
    totals = np.zeros_like(top)
    np.add.at(totals, groups, weight)
    return np.asarray(weight / np.maximum(totals[groups], 1e-300))
