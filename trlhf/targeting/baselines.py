"""Other ways to choose labels, from the literature: what `acquisition` has to beat. Arrays in, arrays out.

Scores, one number a question (see `acquisition.top_batch` for batches of them), and double Thompson sampling.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.special import entr

from trlhf.targeting.acquisition import same_lengths


def max_entropy_scores(p: Float[ndarray, " N"]) -> Float[ndarray, " N"]:
    """Return the entropy of each label in nats, -p·ln p - (1-p)·ln(1-p): uncertainty sampling.

    Lewis and Gale 1994, https://arxiv.org/abs/cmp-lg/9407020. It does not ask what the label is good for, nor whether
    the uncertainty can be reduced.

    Raises:
        ValueError: a value outside [0, 1].
    """
    p = np.asarray(p, float)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"max_entropy_scores: p must be in [0, 1], got {p.min()} to {p.max()}; give probabilities")
    return np.asarray(entr(p) + entr(1 - p))


def least_agreed_scores(top_share: Float[ndarray, " N"]) -> Float[ndarray, " N"]:
    """Return 1 - share of the samples that gave the most frequent answer: what majority voting is least sure of."""
    return np.asarray(1 - np.asarray(top_share, float))


def apl_scores(
    entropy: Float[ndarray, " N"], margin: Float[ndarray, " N"], keep_share: float = 0.5
) -> Float[ndarray, " N"]:
    """Return |margin| where the policy's entropy is among the largest, -inf elsewhere: active preference learning.

    Muldrew et al. 2024, https://arxiv.org/abs/2402.08114: of the prompts with the largest predictive entropy, those
    pairs first whose implicit rewards β·ln(π/π_ref) differ the most.

    Args:
        entropy: predictive entropy of the policy's response to the prompt, in nats.
        margin: difference of the implicit rewards of the pair; its sign does not count.
        keep_share: so much of the prompts passes, rounded up, in (0, 1]; of equal entropies the earlier.

    Raises:
        ValueError: a share out of range, or lengths that differ.
    """
    if not 0 < keep_share <= 1:
        raise ValueError(f"apl_scores: keep_share={keep_share} must be in (0, 1]; 1 keeps every prompt")
    entropy, margin = np.asarray(entropy, float), np.asarray(margin, float)
    same_lengths("apl_scores", entropy=entropy, margin=margin)
    kept = np.argsort(-entropy, kind="stable")[: math.ceil(keep_share * len(entropy) - 1e-9)]
    scores = np.full(len(margin), -np.inf)
    scores[kept] = np.abs(margin[kept])
    return scores


def double_thompson(
    draws: Float[ndarray, "S C"],
    prompts: Int[ndarray, " C"],
    count: int,
    rng: np.random.Generator,
    tries: int = 30,
) -> Int[ndarray, " n"]:
    """Pick answers to judge by double Thompson sampling, at most one a prompt, prompts in random order.

    The original (Dwaracherla et al. 2024, https://arxiv.org/abs/2402.00396) compares two responses, each the best under
    a reward function drawn from the posterior; see `double_thompson_pair`. A verdict is about one answer, so here, for
    each prompt: draw a posterior sample and take its best answer; draw again, up to ``tries`` times, until another
    answer is best. Such a prompt is contested, and the first draw's best answer is asked about. Prompts on which all
    draws agree follow only when the contested ones are used up: the stand-in for the original's random second response.

    Args:
        draws: score of each answer under each of S ≥ 2 posterior samples.
        prompts: whose answer it is: prompt index.
        count: at most so many picks.
        rng: order of the prompts and draws.
        tries: second draws before a prompt counts as not contested.

    Raises:
        ValueError: fewer than 2 posterior samples, lengths that differ, or no tries.
    """
    draws, prompts = _drawn("double_thompson", draws, tries), np.asarray(prompts)
    same_lengths("double_thompson", columns_of_draws=draws.T, prompts=prompts)
    if count < 0:
        raise ValueError(f"double_thompson: count={count} must be at least 0; give the number of labels to buy")
    order = np.argsort(prompts, kind="stable")
    clusters = np.split(order, np.flatnonzero(np.diff(prompts[order])) + 1) if len(prompts) else []
    contested: list[int] = []
    agreed: list[int] = []
    for turn in rng.permutation(len(clusters)):
        if len(contested) == count:
            break
        members = clusters[turn]
        best = np.argmax(draws[:, members], 1)
        first = best[rng.integers(len(draws))]
        others = best[rng.integers(len(draws), size=tries)]
        (contested if (others != first).any() else agreed).append(int(members[first]))
    return np.array((contested + agreed)[:count], int)


def double_thompson_pair(draws: Float[ndarray, "S R"], rng: np.random.Generator, tries: int = 30) -> tuple[int, int]:
    """Return two different responses to compare, each the best under a reward function drawn from the posterior.

    Double Thompson sampling, Dwaracherla et al. 2024, https://arxiv.org/abs/2402.00396: the second is drawn again, up
    to ``tries`` times, until it differs from the first; then any other response, uniformly.

    Args:
        draws: score of each of R ≥ 2 responses of one prompt under each of S ≥ 2 posterior samples.
        rng: of the draws.
        tries: second draws before chance decides.

    Raises:
        ValueError: fewer than 2 posterior samples or responses, or no tries.
    """
    draws = _drawn("double_thompson_pair", draws, tries)
    if draws.shape[1] < 2:
        raise ValueError(f"double_thompson_pair: {draws.shape[1]} responses cannot be compared; give at least 2")
    best = np.argmax(draws, 1)
    first = int(best[rng.integers(len(draws))])
    for _ in range(tries):
        second = int(best[rng.integers(len(draws))])
        if second != first:
            return first, second
    other = int(rng.integers(draws.shape[1] - 1))
    return first, other + (other >= first)


def _drawn(function: str, draws: Float[ndarray, "S C"], tries: int) -> Float[ndarray, "S C"]:
    if len(draws) < 2:
        raise ValueError(f"{function}: {len(draws)} posterior samples cannot disagree; give at least 2 rows")
    if tries < 1:
        raise ValueError(f"{function}: tries={tries} must be at least 1; 30 is the default")
    return np.asarray(draws, float)
