"""Held-out prompts: never trained on, so that they show what training does elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from trlhf.knowledge import Knowledge
from trlhf.targeting.choose import Candidate
from trlhf.types import Label, Prompt, Rollout

TIMES = 4  # as many samples of each as training draws: so few prompts need more to tell rounds apart
FEWEST = 5  # prompts; fewer say nothing
FEWEST_TO_CHOOSE = 8  # for rl.interpolate: fewer choose by chance


def held_out_prompts(pool: Sequence[Prompt], held_out: Collection[str], labels: Iterable[Label]) -> list[Prompt]:
    """Return the held-out prompts whose right answer was known before the stage began; none if there are too few.

    They stay the same for the whole stage: what is not known by then is trained on like any other prompt.

    Args:
        pool: all prompts.
        held_out: ids of those that the reward model never learned from.
        labels: all so far; those that this stage buys (round 1 and later) are passed over.
    """
    knowledge = Knowledge([label for label in labels if label.round < 1])
    found = [p for p in pool if p.id in held_out and p.task == "exact" and knowledge.right_answer(p.id) is not None]
    return found if len(found) >= FEWEST else []


def pass_rates(
    prompts: Sequence[Prompt], sampled: Sequence[Sequence[Rollout]], knowledge: Knowledge
) -> dict[str, float]:
    """Return prompt id → share of its samples that labels say are right.

    Raises:
        ValueError: the right answer of a prompt is not known.
    """
    rates = {}
    for prompt, rollouts in zip(prompts, sampled, strict=True):
        rate = Candidate(prompt, tuple(rollouts)).pass_rate(knowledge)
        if rate is None:
            raise ValueError(f"pass_rates: no label says what is right for {prompt.id}")
        rates[prompt.id] = rate
    return rates
