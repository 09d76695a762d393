"""How often a person errs in a comparison, and how often the first place wins unread: from repeats in swapped order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import minimize

OUTCOMES = ("A", "B", "tie")
SWAPPED = {"A": "B", "B": "A", "tie": "tie"}
PRIOR_NOISE, PRIOR_BIAS, PRIOR_WEIGHT = 0.02, 0.02, 25.0  # what is expected before any repeat, worth so many answers
LEAST, MOST_NOISE, MOST_BIAS = 0.001, 0.45, 0.9


class Noise(NamedTuple):
    """What stands between an honest answer and the one given.

    ``flip_rate`` ε: chance that an answer that was thought about is the opposite. ``bias`` b: chance that the answer is
    A whatever the responses are.
    """

    flip_rate: float = PRIOR_NOISE
    bias: float = PRIOR_BIAS


def outcome_table(noise: Noise) -> Float[ndarray, "3 3"]:
    """Return P(answer | honest answer): a row for each honest A, B, tie; a column for each answer A, B, tie.

    A person answers A unread with probability b. Otherwise an honest A or B is flipped with probability ε, and an
    honest tie becomes A or B, ε/2 each:

    P(A|A) = b + (1-b)(1-ε), P(A|B) = b + (1-b)ε, P(A|tie) = b + (1-b)ε/2, P(tie|tie) = (1-b)(1-ε), P(tie|A) = 0.
    """
    e, b = noise
    read = np.array([[1 - e, e, 0], [e, 1 - e, 0], [e / 2, e / 2, 1 - e]])
    return np.asarray((1 - b) * read + b * np.array([1.0, 0.0, 0.0]))


def estimate_noise(once: Sequence[str], swapped: Sequence[tuple[str, str]]) -> Noise:
    """Estimate ε and b from comparisons asked once and from those asked again with the order swapped.

    With t the share of honest ties and the order drawn at random, an honest answer is A or B with probability (1-t)/2
    each. The likelihood of a swapped pair is Σ_h π_h P(o₁|h) P(o₂|h swapped), of a single answer Σ_h π_h P(o|h), by
    `outcome_table`: a person without noise turns A into B when the order turns; A both times points to b, and b also to
    more A than B; a tie that does not stay one, or B both times, to ε. Maximised over (t, ε, b), with priors
    Beta(1 + w·m, 1 + w·(1-m)) of ε and b, m = 0.02 and w = 25.

    Args:
        once: answers of A, B or tie to comparisons in random order.
        swapped: first answer, and the answer in the other order, each in the words of its own order.

    Raises:
        ValueError: another word than A, B or tie.
    """
    for word in [*once, *(word for both in swapped for word in both)]:
        if word not in OUTCOMES:
            raise ValueError(f"estimate_noise: {word!r} must be one of {', '.join(OUTCOMES)}")
    singles = np.array([sum(word == name for word in once) for name in OUTCOMES], float)
    pairs = np.zeros((3, 3))
    for first, second in swapped:
        pairs[OUTCOMES.index(first), OUTCOMES.index(second)] += 1
    turned = [OUTCOMES.index(SWAPPED[name]) for name in OUTCOMES]

    def loss(free: ndarray) -> float:
        ties, e, b = free
        honest = np.array([(1 - ties) / 2, (1 - ties) / 2, ties])
        table = outcome_table(Noise(e, b))
        both = np.einsum("h,ha,hb->ab", honest, table, table[turned])
        value = (singles * np.log(honest @ table)).sum() + (pairs * np.log(both)).sum()
        for x, m in ((e, PRIOR_NOISE), (b, PRIOR_BIAS)):
            value += PRIOR_WEIGHT * (m * np.log(x) + (1 - m) * np.log1p(-x))
        return -float(value)

    bounds = [(LEAST, 1 - LEAST), (LEAST, MOST_NOISE), (LEAST, MOST_BIAS)]
    starts = [(0.3, e, b) for e in (0.02, 0.2) for b in (0.02, 0.3)]
    found = min((minimize(loss, start, bounds=bounds, method="L-BFGS-B") for start in starts), key=lambda x: x.fun)
    return Noise(round(float(found.x[1]), 4), round(float(found.x[2]), 4))
