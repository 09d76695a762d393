"""Labels kept for training and labels held out, apart by prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from trlhf.data import LabelledPair, LabelledResponse
from trlhf.errors import UserError
from trlhf.reward.features import prompt_key
from trlhf.reward.table import group_numbers, prompts_of
from trlhf.seeding import torch_generator

Label = LabelledResponse | LabelledPair


@dataclass(frozen=True)
class Labels:
    """Verdicts and preferences that belong together."""

    responses: Sequence[LabelledResponse]
    pairs: Sequence[LabelledPair]

    def __len__(self) -> int:
        """Return how many labels there are."""
        return len(self.responses) + len(self.pairs)

    def keep(self, wanted: Callable[[Label], bool]) -> Labels:
        """Return the labels that satisfy a condition."""
        return Labels([r for r in self.responses if wanted(r)], [p for p in self.pairs if wanted(p)])


def split_by_prompt(labels: Labels, share: float, seed: int) -> tuple[Labels, Labels]:
    """Hold out about ``share`` of the labels, never one prompt on both sides.

    Prompts with verdicts and prompts with preferences only are drawn apart, so that both kinds are held out. At least
    one prompt of a kind stays in training.
    """
    generator = torch_generator(seed, "reward", "held out")
    prompts = prompts_of(labels.responses, labels.pairs)
    groups = group_numbers(prompts)
    with_verdict = set(groups[: len(labels.responses)])
    chosen: set[int] = set()
    for stratum in (with_verdict, set(groups) - with_verdict):
        members = sorted(stratum)
        wanted = share * sum(group in stratum for group in groups)
        order = torch.randperm(len(members), generator=generator).tolist()
        taken = 0
        for index in order[:-1]:
            size = groups.count(members[index])
            if taken + size / 2 > wanted:
                break
            chosen.add(members[index])
            taken += size
    keys = {prompt_key(prompt) for prompt, group in zip(prompts, groups, strict=True) if group in chosen}
    training = labels.keep(lambda label: prompt_key(label.prompt) not in keys)
    return training, labels.keep(lambda label: prompt_key(label.prompt) in keys)


def at_most(labels: Labels, count: int, seed: int) -> Labels:
    """Return no more than ``count`` labels, all those of prompts drawn at random; 0 returns them all."""
    if not count or len(labels) <= count:
        return labels
    groups = group_numbers(prompts_of(labels.responses, labels.pairs))
    sizes = Counter(groups)
    taken: set[int] = set()
    total = 0
    for group in torch.randperm(len(sizes), generator=torch_generator(seed, "reward", "at most")).tolist():
        total += sizes[group]
        if taken and total > count:
            break
        taken.add(group)
    verdicts = len(labels.responses)
    return Labels(
        [label for label, group in zip(labels.responses, groups[:verdicts], strict=True) if group in taken],
        [label for label, group in zip(labels.pairs, groups[verdicts:], strict=True) if group in taken],
    )


def check_apart(training: Labels, held_out: Labels) -> None:
    """Refuse a prompt that is on both sides: the measures would be of memory.

    Raises:
        UserError: names the first such prompt.
    """
    seen = {prompt_key(prompt) for prompt in prompts_of(training.responses, training.pairs)}
    both = [prompt for prompt in prompts_of(held_out.responses, held_out.pairs) if prompt_key(prompt) in seen]
    if both:
        raise UserError(
            f"reward model: prompt {both[0].id!r} is in the training labels and in the held-out ones "
            f"({len(both)} such labels); split them by prompt"
        )
