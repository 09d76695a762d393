"""What to ask next, and what to train on: the uniform and the frontier acquisition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from trlhf.knowledge import Knowledge
from trlhf.targeting.acquisition import top_batch
from trlhf.targeting.frontier import frontier_value, top_answer_probability
from trlhf.types import Prompt, Question, Rollout


@dataclass(frozen=True)
class Candidate:
    """A prompt with the current policy's samples."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]

    def top_answer(self, knowledge: Knowledge) -> tuple[str, float, int] | None:
        """Return the most frequent answer that no label has judged; None if there is none.

        With it come its share of the samples that labels have not ruled out, and how many samples gave it.
        """
        known = [knowledge.known(self.prompt.id, r.answer) for r in self.rollouts]
        counts = Counter(r.answer for r, fact in zip(self.rollouts, known, strict=True) if r.answer and fact is None)
        if not counts:
            return None
        answer, count = max(counts.items(), key=lambda item: (item[1], item[0]))
        possible = sum(r.answer is None or fact is not False for r, fact in zip(self.rollouts, known, strict=True))
        return answer, count / possible, count

    def pass_rate(self, knowledge: Knowledge) -> float | None:
        """Return the share of samples known to be right; None while the right answer is unknown."""
        if knowledge.right_answer(self.prompt.id) is None:
            return None
        return float(np.mean([knowledge.known(self.prompt.id, r.answer) is True for r in self.rollouts]))


def spread(scores: Float[ndarray, " N"], kinds: Sequence[str], count: int) -> list[int]:
    """Pick ``count`` indices greedily by score / (1 + picks of that kind so far), so that no kind takes all the labels.

    A kind whose best prompts are worth little is still picked little: the rule trades value against variety.
    """
    return [int(i) for i in top_batch(np.maximum(scores, 0), np.arange(len(scores)), kinds, count, per_group=1)]


def verdict_values(
    shares: Float[ndarray, " N"],
    counts: Float[ndarray, " N"],
    samples: int,
    coefficients: Float[ndarray, " 2"],
    group: int,
) -> Float[ndarray, " N"]:
    """Return what a verdict on each prompt's top answer is expected to buy: P(right) · P(mixed group | right).

    A right verdict makes the prompt verifiable for ever; it is worth as much as its samples will be mixed. With the top
    answer right, the pass rate is Beta(1 + count, 1 + k - count) after k samples, of which ``count`` gave that answer.

    Args:
        shares: share of the top answer among the samples that labels have not ruled out.
        counts: how many of the k samples gave the top answer.
        samples: k, how many samples were drawn.
        coefficients: of `fit_top_answer_model`.
        group: samples per prompt in an update.
    """
    right = top_answer_probability(coefficients, shares)
    mixed = frontier_value(1 + counts, 1 + samples - counts, group)
    return np.asarray(right * mixed)


def choose_verdicts(
    candidates: Sequence[Candidate],
    knowledge: Knowledge,
    count: int,
    coefficients: Float[ndarray, " 2"] | None,
    group: int,
    rng: np.random.Generator,
    round_number: int = 0,
) -> list[Question]:
    """Choose whose top answer to have judged, one question a prompt.

    Args:
        candidates: prompts with samples; those whose right answer is known, or without an open answer, are passed over.
        knowledge: what the labels so far say.
        count: at most so many.
        coefficients: of `fit_top_answer_model` for the frontier acquisition; None for uniform.
        group: samples per prompt in an update.
        rng: for the uniform choice.
        round_number: noted in the ledger.
    """
    usable: list[tuple[Candidate, str, float, int]] = []
    for candidate in candidates:
        if candidate.prompt.task != "exact" or knowledge.right_answer(candidate.prompt.id) is not None:
            continue
        top = candidate.top_answer(knowledge)
        if top is not None:
            usable.append((candidate, *top))
    if not usable:
        return []
    if coefficients is None:
        chosen = [int(i) for i in rng.permutation(len(usable))[:count]]
        why = ["uniform: drawn at random from the pool"] * len(usable)
    else:
        shares = np.array([share for _, _, share, _ in usable])
        counts = np.array([number for _, _, _, number in usable])
        samples = len(usable[0][0].rollouts)
        values = verdict_values(shares, counts, samples, coefficients, group)
        chosen = spread(values, [candidate.prompt.kind for candidate, _, _, _ in usable], count)
        right = top_answer_probability(coefficients, shares)
        why = [
            f"frontier: top answer {answer!r} has {number} of {samples} samples, {share:.0%} of those not ruled out; "
            f"P(right) {p:.2f}, value {value:.2f}"
            for (_, answer, share, number), p, value in zip(usable, right, values, strict=True)
        ]
    questions = []
    for i in chosen:
        candidate, answer, _, _ = usable[i]
        response = next(r.text for r in candidate.rollouts if r.answer == answer)
        questions.append(Question("verdict", candidate.prompt, (response,), answer, why[i], round_number))
    return questions


def last_pass_rates(
    pass_rates: Sequence[float | None], samples: int
) -> tuple[Float[ndarray, " N"], Float[ndarray, " N"]]:
    """Return α and β of Beta posteriors that rest on the last samples alone, over Jeffreys' prior.

    Args:
        pass_rates: known pass rate of the last samples; None where there were none (counted as 0.5).
        samples: how many samples the rates come from.
    """
    rates = np.array([0.5 if rate is None else rate for rate in pass_rates], float)
    return 0.5 + rates * samples, 0.5 + (1 - rates) * samples


def training_weights(
    alpha: Float[ndarray, " N"],
    beta: Float[ndarray, " N"],
    group: int,
    hardness: float | Float[ndarray, " N"] = 0.0,
    trust: float | Float[ndarray, " N"] = 1.0,
) -> Float[ndarray, " N"]:
    """Return the probability with which each prompt is drawn for an update, in proportion to U·E[1-p]^η·c.

    Args:
        alpha: of each pass rate's posterior, p ~ Beta(α, β).
        beta: of the same.
        group: samples per prompt in an update, of which U is the probability to be mixed.
        hardness: η, of all or of each; above 0 what is seldom right goes before what is mostly right.
        trust: c, of all or of each, in [0, 1].
    """
    values = frontier_value(alpha, beta, group) * (beta / (alpha + beta)) ** hardness * trust
    return np.asarray(values / values.sum())
