"""Labels kept for training and labels held out, apart by prompt, once and for all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trlhf import files
from trlhf.data import LabelledPair, LabelledResponse
from trlhf.errors import UserError
from trlhf.reward.features import PromptKey, message_key, prompt_key
from trlhf.reward.table import group_numbers, prompts_of
from trlhf.seeding import torch_generator

Label = LabelledResponse | LabelledPair
SPLIT = "split.jsonl"


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


def split_by_prompt(
    labels: Labels, share: float, seed: int, decided: Mapping[PromptKey, bool] | None = None
) -> tuple[Labels, Labels]:
    """Hold out about ``share`` of the labels, never one prompt on both sides.

    Prompts with verdicts and prompts with preferences only are drawn apart, so that both kinds are held out. At least
    one prompt of a kind stays in training.

    Args:
        labels: of any number of prompts.
        share: of the labels on prompts that are not decided yet.
        seed: of the draw.
        decided: prompts that stay on their side, whatever is drawn: True for held out (see :func:`read_split`).

    Returns:
        Training labels and held-out ones, each in their order.
    """
    decided = decided or {}
    keys = {key for key, held_out in decided.items() if held_out}
    keys |= _draw(labels.keep(lambda label: prompt_key(label.prompt) not in decided), share, seed)
    training = labels.keep(lambda label: prompt_key(label.prompt) not in keys)
    return training, labels.keep(lambda label: prompt_key(label.prompt) in keys)


def _draw(labels: Labels, share: float, seed: int) -> set[PromptKey]:
    """Return the prompts to hold out."""
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
    return {prompt_key(prompt) for prompt, group in zip(prompts, groups, strict=True) if group in chosen}


def write_split(directory: Path, training: Labels, held: Labels) -> None:
    """Keep in ``split.jsonl`` which prompts a backbone may have learned from, and which it never saw."""
    sides: dict[PromptKey, dict[str, object]] = {}
    for labels, held_out in ((training, False), (held, True)):
        for prompt in prompts_of(labels.responses, labels.pairs):
            row = {"prompt": prompt.id, "held_out": held_out, "messages": list(prompt.messages)}
            sides.setdefault(prompt_key(prompt), row)
    files.write_jsonl(directory / SPLIT, sides.values())


def read_split(directory: Path) -> dict[PromptKey, bool]:
    """Return whether each prompt of :func:`write_split` was held out; by messages, since ids may be given twice.

    Raises:
        UserError: there is no such file, or it is broken.
    """
    path = directory / SPLIT
    if not path.exists():
        raise UserError(
            f"{path} is missing, so nobody knows what the reward model has learned from; "
            f"delete the folder {directory} and run stage=reward again"
        )
    try:
        return {message_key(row["messages"]): bool(row["held_out"]) for row in files.read_jsonl(path)}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read; delete the folder {directory} and run stage=reward again") from error


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
