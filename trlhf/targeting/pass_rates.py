"""What is believed of each prompt's pass rate: counts that fade as the policy moves, over a prior that needs no label.

After MoPPS (Qu et al. 2025, https://arxiv.org/abs/2507.04632), whose discount is a constant and whose prior is flat.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypedDict

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import beta as beta_distribution

PRIOR_SAMPLES = 4.0  # κ: samples that the prior counts for
DRIFT_RATE = 1.0  # c, per nat: at a KL of 0.7 nats a response, what was counted before counts half
CERTAINTY = 0.8  # probability from which a prompt is said to be mastered, or hopeless
MASTERED, HOPELESS = 0.9, 0.05  # pass rates
DIGITS = 6  # kept of a fit: those after depend on where in memory a matrix happens to lie

# Of 1, the share of the top answer, the entropy of the answers and the mean log-probability. Before any label a sample
# is right with probability 0.5 where half of them agree, and with 0.88 where all do.
_PRIOR_COEFFICIENTS = np.array([-2.0, 4.0, 0.0, 0.0])
_PRIOR_PRECISION = 1.0
Set = Literal["frontier", "mastered", "hopeless"]


class Look(TypedDict):
    """What the samples of one prompt have shown; plain values, so that it can lie in a checkpoint.

    ``features``: of the last samples (`describe_samples`). ``told``: of the last samples, the shares that labels say
    are right, and wrong. ``counts``: right and wrong samples so far, faded. ``drift``: how far the policy had moved by
    then, in nats a response since the stage began.
    """

    features: list[float]
    told: list[float]
    counts: list[float]
    drift: float


def describe_samples(answers: Sequence[str | None], logprobs: Sequence[Sequence[float]]) -> list[float]:
    """Return what samples show without labels: share of the top answer, entropy of the answers, mean log-probability.

    Args:
        answers: of each sample; None where it has none, which counts as an answer that is never the top one.
        logprobs: of each sample's tokens, in nats.

    Returns:
        The share in [0, 1]; the entropy in nats; the mean over samples of the mean over tokens, in nats.

    Raises:
        ValueError: no samples.
    """
    if not answers:
        raise ValueError("describe_samples: no samples; give at least 1")
    counts = Counter(answers)
    top = max((count for answer, count in counts.items() if answer is not None), default=0)
    shares = [count / len(answers) for count in counts.values()]
    entropy = -math.fsum(share * math.log(share) for share in shares)
    means = [math.fsum(row) / len(row) for row in logprobs if len(row)]
    return [top / len(answers), entropy + 0.0, math.fsum(means) / max(1, len(means))]


def fit_prior(looks: Sequence[Look]) -> list[float]:
    """Fit p̃(x) = σ(w·[1, share, entropy, log-probability]) to what labels tell of the last samples.

    Maximum a posteriori with a Gaussian prior of precision 1 around a label-free guess, which is what is returned
    without labels. A prompt counts as one observation where labels decide all of its samples, and as the share of them
    that they decide elsewhere: a wrong verdict alone tells of some samples that they are wrong, and of none that it is
    right.

    Args:
        looks: of any prompts; those of which labels tell nothing change nothing.

    Returns:
        The four coefficients.
    """
    told = [look for look in looks if sum(look["told"]) > 0]
    if not told:
        return [float(value) for value in _PRIOR_COEFFICIENTS]
    design = _design([look["features"] for look in told])
    right, wrong = np.array([look["told"] for look in told], float).T

    def objective(w: ndarray) -> tuple[float, ndarray]:
        logits, deviation = design @ w, w - _PRIOR_COEFFICIENTS
        value = (right + wrong) @ np.logaddexp(0, logits) - right @ logits
        gradient = design.T @ ((right + wrong) * expit(logits) - right)
        return float(value + 0.5 * _PRIOR_PRECISION * deviation @ deviation), gradient + _PRIOR_PRECISION * deviation

    return [round(float(value), DIGITS) for value in minimize(objective, _PRIOR_COEFFICIENTS, jac=True).x]


def prior_pass_rates(coefficients: Sequence[float], features: Float[ndarray, "N 3"]) -> Float[ndarray, " N"]:
    """Return p̃ for some prompts, in (0, 1)."""
    logits: ndarray = (_design(features) * np.asarray(coefficients, float)).sum(1)
    return np.asarray(expit(np.clip(logits, -10, 10)))


def looked(
    before: Look | None,
    features: Sequence[float],
    told: tuple[float, float],
    samples: int,
    drift: float,
    expected: tuple[float, float] | None = None,
) -> Look:
    """Take a prompt's newest samples into account; what was counted before fades, as in `faded`.

    Args:
        before: what was known of it; None: nothing.
        features: of `describe_samples`.
        told: how many of the samples labels say are right, and wrong; those that they do not decide count neither way.
        samples: how many there are.
        drift: how far the policy has moved since the stage began, in nats a response.
        expected: counts in place of ``told``, where something else than labels says what is right.
    """
    old = (0.0, 0.0) if before is None else faded(before, drift)
    new = told if expected is None else expected
    return {
        "features": list(features),
        "told": [told[0] / samples, told[1] / samples],
        "counts": [old[0] + new[0], old[1] + new[1]],
        "drift": drift,
    }


def faded(look: Look, drift: float) -> tuple[float, float]:
    """Return a prompt's counts times ρ = exp(-c·KL(π_now ‖ π_then)), the KL taken as what was moved since."""
    factor = math.exp(-DRIFT_RATE * max(0.0, drift - look["drift"]))
    return factor * look["counts"][0], factor * look["counts"][1]


def posterior(
    looks: Sequence[Look | None], coefficients: Sequence[float], drift: float, unseen: float = 0.5
) -> tuple[Float[ndarray, " N"], Float[ndarray, " N"]]:
    """Return α and β of each prompt's pass rate: α = κp̃ + faded right, β = κ(1-p̃) + faded wrong.

    That is α ← α₀ + ρ(α-α₀) + #right with a prior that follows the newest samples.

    Args:
        looks: of each prompt; None where it was never sampled.
        coefficients: of `fit_prior`.
        drift: how far the policy has moved since the stage began, in nats a response.
        unseen: p̃ of a prompt that was never sampled.
    """
    features = [look["features"] if look else [0.0] * 3 for look in looks]
    rates = prior_pass_rates(coefficients, np.array(features, float).reshape(-1, 3))
    rates = np.where([look is None for look in looks], unseen, rates)
    counts = np.array([faded(look, drift) if look else (0.0, 0.0) for look in looks], float).reshape(-1, 2)
    return PRIOR_SAMPLES * rates + counts[:, 0], PRIOR_SAMPLES * (1 - rates) + counts[:, 1]


def sets(alpha: Float[ndarray, " N"], beta: Float[ndarray, " N"]) -> list[Set]:
    """Say of each prompt whether it is mastered, P(p > 0.9) > 0.8, hopeless, P(p < 0.05) > 0.8, or on the frontier."""
    mastered = np.asarray(beta_distribution.sf(MASTERED, alpha, beta)) > CERTAINTY
    hopeless = np.asarray(beta_distribution.cdf(HOPELESS, alpha, beta)) > CERTAINTY
    return ["mastered" if m else "hopeless" if h else "frontier" for m, h in zip(mastered, hopeless, strict=True)]


def _design(features: Sequence[Sequence[float]] | Float[ndarray, "N 3"]) -> Float[ndarray, "N 4"]:
    rows = np.asarray(features, float).reshape(-1, 3)
    return np.hstack([np.ones((len(rows), 1)), rows])
