"""The worlds of ``failure_modes.py``: people who err, junk in the pool, noise in place of confidence."""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any
from unittest import mock

import numpy as np

import trlhf.rl.buy
import trlhf.tasks
from trlhf.config import Config
from trlhf.labelers.simulated import SimulatedPerson
from trlhf.ledger import question_key
from trlhf.micro.world import generate
from trlhf.rl.ask import Outlook, look
from trlhf.seeding import derive_seed, python_rng
from trlhf.tasks import Task
from trlhf.types import Labeler, Prompt, Question

JUNK_SHARE = 0.15  # of the pool
JUNK = ("gibberish", "unanswerable", "truncated")
NO_ANSWER = "no answer"  # what the gold answers of junk say: whatever is answered is wrong
LENGTH_FLIPS = 0.2  # share of all verdicts that the length-biased person flips, on average
SWAPPED = {"right": "wrong", "wrong": "right", "A": "B", "B": "A", "tie": "tie"}
Person = Callable[[Task, Config], Labeler]


class CountedAnswers(dict[str, str]):
    """Gold answers that count how often they are read."""

    reads = 0

    def __getitem__(self, key: str) -> str:
        """Return an answer and count it."""
        self.reads += 1
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return an answer, if there is one, and count it."""
        self.reads += 1
        return super().get(key, default)

    def items(self) -> Any:
        """Return all answers and count each."""
        self.reads += len(self)
        return super().items()

    def values(self) -> Any:
        """Return all answers and count each."""
        self.reads += len(self)
        return super().values()


@dataclass(frozen=True)
class OddTask(Task):
    """A task with a labeller of its own, which remembers whom it gave out."""

    person: Person | None = None
    given: list[Labeler] = field(default_factory=list)

    def labeler(self, config: Config) -> Labeler:
        """Return the world's own labeller where it has one."""
        labeler = super().labeler(config) if self.person is None else self.person(self, config)
        self.given.append(labeler)
        return labeler


class Biased:
    """A person who is honest but for verdicts that are flipped with a chance that depends on question and truth.

    Args:
        honest: answers without error.
        chance: of a flip, from the question and the true outcome.
        seed: of the flips; the same question is always answered alike.

    Attributes:
        calls: how many questions were answered.
    """

    name = "biased"

    def __init__(self, honest: Labeler, chance: Callable[[Question, str], float], seed: int) -> None:
        self._honest, self._chance, self._seed = honest, chance, seed
        self.calls = 0

    def answer(self, questions: Sequence[Question]) -> list[str]:
        """Return one outcome for each question, in order."""
        self.calls += len(questions)
        return [self._one(*pair) for pair in zip(questions, self._honest.answer(questions), strict=True)]

    def _one(self, question: Question, truth: str) -> str:
        digest = hashlib.sha256(f"{self._seed}:{question_key(question)}:bias".encode()).digest()
        flipped = int.from_bytes(digest[:6], "big") / 2**48 < self._chance(question, truth)
        return SWAPPED[truth] if flipped and question.kind == "verdict" else truth


def length_biased(task: Task, config: Config) -> Labeler:
    """Return a person who calls long responses right more often than they are, and short ones wrong.

    P(flip) is 2·`LENGTH_FLIPS`·r for a wrong response and 2·`LENGTH_FLIPS`·(1-r) for a right one, r the share of the
    demonstrations' responses that are no longer than it.
    """
    lengths = sorted(len(shown.messages[-1]["content"]) for shown in task.demonstrations)

    def chance(question: Question, truth: str) -> float:
        rank = bisect_right(lengths, len(question.responses[0])) / len(lengths)
        return 2 * LENGTH_FLIPS * (rank if truth == "wrong" else 1 - rank)

    return Biased(SimulatedPerson(task._pool_answers, taste_of(task), seed=config.seed), chance, config.seed)


def length_lover(task: Task, config: Config) -> Labeler:
    """Return a person whose taste is length as much as taste: 0.05 for each character."""
    taste = taste_of(task)
    return SimulatedPerson(task._pool_answers, lambda p, text: taste(p, text) + 0.05 * len(text), seed=config.seed)


def taste_of(task: Task) -> Callable[[Prompt, str], float]:
    """Return the true taste of a task that has one."""
    assert task.taste is not None, "the embedded world has a taste"
    return task.taste


def with_junk(task: Task, config: Config) -> Task:
    """Return the task with so much junk that it is `JUNK_SHARE` of the pool, mixed in at random."""
    junk = junk_prompts(round(len(task.pool) * JUNK_SHARE / (1 - JUNK_SHARE)), config.seed)
    pool = [*task.pool, *junk]
    python_rng(config.seed, "junk", "order").shuffle(pool)
    return replace(task, pool=pool, _pool_answers=task._pool_answers | {prompt.id: NO_ANSWER for prompt in junk})


def junk_prompts(count: int, seed: int) -> list[Prompt]:
    """Return prompts that nobody can answer, of the kinds of `JUNK` in turn.

    Gibberish: words of random letters and numbers. Unanswerable: a question whose story lacks a sentence with a number
    that matters. Truncated: a question cut off before its last sentence.
    """
    rng = python_rng(seed, "junk")
    asked = [item.prompt for item in generate("pool", 4 * count + 8, derive_seed(seed, "junk") % 2**32)]
    stories = [prompt.messages[-1]["content"] for prompt in asked if prompt.reasoning]
    makers = {"gibberish": _gibberish, "unanswerable": _without_a_number, "truncated": _cut}
    found = []
    for number in range(count):
        kind = JUNK[number % len(JUNK)]
        text = makers[kind](stories[number], rng)
        found.append(Prompt(f"junk/{kind}/{number}", ({"role": "user", "content": text},), kind=kind))
    return found


def _gibberish(_: str, rng: random.Random) -> str:
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(rng.randint(8, 20))]
    return " ".join(word if rng.random() > 0.15 else str(rng.randint(2, 99)) for word in words).capitalize() + "?"


def _without_a_number(story: str, rng: random.Random) -> str:
    sentences = story.split(". ")
    numbered = [n for n, text in enumerate(sentences[:-1]) if any(map(str.isdigit, text)) and _matters(text)]
    lost = rng.choice(numbered or [0])
    return ". ".join(text for n, text in enumerate(sentences) if n != lost)


def _matters(sentence: str) -> bool:
    """Say whether a sentence is no distractor of `trlhf.micro.reasoning`."""
    return not any(mark in sentence for mark in ("also has", "years old", "There are"))


def _cut(story: str, rng: random.Random) -> str:
    words = story.split(" ")
    return " ".join(words[: max(2, round(len(words) * rng.uniform(0.3, 0.7)))])


@dataclass(frozen=True)
class World:
    """What is wrong in a benchmark's world.

    Attributes:
        overrides: of every run in it.
        person: who labels; None: as the configuration says.
        junk: whether there is junk in the pool.
        noisy_trust: whether the answer model's confidence is replaced by noise.
        first: how many labels of a budget the reward stage buys; None: as usual.
    """

    overrides: tuple[str, ...] = ()
    person: Person | None = None
    junk: bool = False
    noisy_trust: bool = False
    first: Callable[[int], int] | None = None


@contextmanager
def living_in(world: World) -> Iterator[list[tuple[Config, OddTask]]]:
    """Make every stage that runs inside load its task from a world; yield those that were loaded, one after another."""
    loaded: list[tuple[Config, OddTask]] = []
    original = trlhf.tasks.load_task

    def load(config: Config) -> OddTask:
        task = original(config)
        task = with_junk(task, config) if world.junk else task
        values = {entry.name: getattr(task, entry.name) for entry in fields(task)}
        values["_pool_answers"] = CountedAnswers(task._pool_answers)
        values["test_answers"] = CountedAnswers(task.test_answers)
        loaded.append((config, OddTask(**values, person=world.person)))
        return loaded[-1][1]

    with mock.patch("trlhf.tasks.load_task", load):
        if not world.noisy_trust:
            yield loaded
            return
        with mock.patch("trlhf.rl.buy.look", _look_through_noise):
            yield loaded


def _look_through_noise(*arguments: Any) -> Outlook:
    """Return the outlook with every P(right) on its side of a half, but with a confidence that says nothing."""
    outlook = look(*arguments)
    rng = np.random.default_rng(derive_seed(0, "noisy trust", *outlook.table.names))
    p = outlook.probabilities
    return replace(outlook, probabilities=0.5 + np.where(p > 0.5, 0.5, -0.5) * rng.random(len(p)))
