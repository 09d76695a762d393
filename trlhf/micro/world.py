"""The embedded world: seeded splits of generated prompts that share no question.

A question belongs to a split by the hash of its text, so that train, pool, dev and test are disjoint whatever the
seeds. The test and dev sets are the same in every run; train and pool follow the run's seed.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

from trlhf.micro.plain import Plain, every_plain
from trlhf.micro.reasoning import FAMILIES, LONG_FAMILIES, Problem
from trlhf.types import Demonstration, Message, Prompt

Split = Literal["train", "pool", "dev", "test"]
_BUCKETS: dict[Split, range] = {
    "train": range(0, 40),
    "pool": range(40, 70),
    "dev": range(70, 78),
    "test": range(78, 100),
}
_PLAIN_SHARE = 0.25  # of every split: enough to keep, and to measure, that plain prompts are answered plainly


@dataclass(frozen=True)
class Item:
    """A prompt with what the world knows about it: gold answer (None where taste decides) and one good reply."""

    prompt: Prompt
    answer: str | None
    response: str

    @property
    def demonstration(self) -> Demonstration:
        """The chat to imitate."""
        reply: Message = {"role": "assistant", "content": self.response}
        return Demonstration((*self.prompt.messages, reply), source=self.prompt.id, kind=self.prompt.kind)


def split_of(question: str) -> Split:
    """Return the split that a question belongs to, from a hash of its text."""
    bucket = int.from_bytes(hashlib.sha256(question.encode()).digest()[:4], "big") % 100
    return next(split for split, buckets in _BUCKETS.items() if bucket in buckets)


def generate(split: Split, count: int, seed: int = 0) -> list[Item]:
    """Return ``count`` different items of a split: most reasoning, up to a quarter plain.

    Families come in turn, those of three and four steps twice as often; plain kinds come in turn too. The
    demonstrations (train) keep to products that are not doubtful (see `trlhf.micro.reasoning`). The world has 528 plain
    questions in all, so that a large split holds less than a quarter of them.

    Args:
        split: train, pool, dev or test.
        count: number of items.
        seed: varies train and pool; dev and test are fixed.
    """
    rng = random.Random(f"{split}-{seed if split in ('train', 'pool') else 'fixed'}")
    plain = _plain(split, round(count * _PLAIN_SHARE), rng)
    items = [
        *(_item(split, problem, problem.solution) for problem in _problems(split, count - len(plain), rng)),
        *(_item(split, thing, thing.reply(rng)) for thing in plain),
    ]
    rng.shuffle(items)
    return items


def _problems(split: Split, count: int, rng: random.Random) -> list[Problem]:
    families = FAMILIES + LONG_FAMILIES  # what takes three or four steps comes twice as often
    seen: dict[str, Problem] = {}
    while len(seen) < count:
        problem = families[len(seen) % len(families)](rng)
        doubtful = any(step.doubtful for step in problem.steps)
        if split_of(problem.question) == split and not (doubtful and split == "train"):
            seen.setdefault(problem.question, problem)
    return list(seen.values())


def _plain(split: Split, most: int, rng: random.Random) -> list[Plain]:
    """Take the split's plain questions kind by kind in turn; a small kind may run out before the others."""
    kinds = [[plain for plain in kind if split_of(plain.question) == split] for kind in every_plain().values()]
    for kind in kinds:
        rng.shuffle(kind)
    return [plain for turn in zip_longest(*kinds) for plain in turn if plain is not None][:most]


def _item(split: Split, thing: Problem | Plain, response: str) -> Item:
    digest = hashlib.sha256(thing.question.encode()).hexdigest()[:12]
    prompt = Prompt(
        id=f"micro/{split}/{digest}",
        messages=({"role": "user", "content": thing.question},),
        kind=thing.kind,
        task="exact" if thing.answer is not None else "open",
        reasoning=isinstance(thing, Problem),
    )
    return Item(prompt, thing.answer, response)
