"""Which of the answers that a model samples is right? A small Bayesian model over the answers of each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.linalg import cholesky

FLIP_RATE = 0.02  # chance that a verdict is the opposite of the truth, where nothing else is known


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


def _posterior(answers: Answers, logits: Float[ndarray, "M S"]) -> Float[ndarray, "M S"]:
    """Return P(alternative is right | labels), each column a θ of its own."""
    groups = answers.groups()
    top = np.full((answers.count, logits.shape[1]), -np.inf)
    np.maximum.at(top, groups, logits)
    weight = np.exp(logits - top[groups]) * answers.likelihoods()[:, None]
    totals = np.zeros_like(top)
    np.add.at(totals, groups, weight)
    return np.asarray(weight / np.maximum(totals[groups], 1e-300))
