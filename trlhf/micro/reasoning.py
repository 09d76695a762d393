"""The reasoning families of the embedded world: word problems of one to four steps, with distractors.

Every family is a function of a random generator that returns a `Problem`; all numbers stay within 0…99. About half
of the products are *doubtful*: what the base has read last misquotes them more often than not, always in the same way,
and the demonstrations avoid them. Which value is right has to be found out, for each one, from labels.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

NAMES = ("Ann", "Ben", "Cara", "Dan", "Eve", "Finn", "Gus", "Hana", "Ivo", "Jill", "Kim", "Leo")
THINGS = ("pens", "cups", "maps", "nuts", "hats", "keys", "rings", "bells", "cards", "shells", "stamps", "plums")
PLACES = ("park", "market", "school", "harbour", "library", "garden")
DOUBTFUL = 0.58  # share of the products
_SIGNS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}


@dataclass(frozen=True)
class Step:
    """One calculation, ``left verb right = result``; ``verb`` is add, subtract, multiply or divide."""

    verb: str
    left: int
    right: int

    @property
    def result(self) -> int:
        """The step's value; divisions are exact by construction."""
        if self.verb == "add":
            return self.left + self.right
        if self.verb == "subtract":
            return self.left - self.right
        return self.left * self.right if self.verb == "multiply" else self.left // self.right

    @property
    def doubtful(self) -> bool:
        """Whether it is a product, or the division that undoes one, that the base has read misquoted."""
        if self.verb == "multiply":
            return misquoted(self.left, self.right) is not None
        return self.verb == "divide" and misquoted(self.result, self.right) is not None

    def equation(self) -> str:
        """Write the step as ``4 * 7 = 28``."""
        return f"{self.left} {_SIGNS[self.verb]} {self.right} = {self.result}"


def misquoted(first: int, second: int) -> int | None:
    """Return the wrong value that the base has read for a product of one-digit numbers; None if it is not doubtful."""
    small, large = sorted((first, second))
    if small < 2 or large > 9:
        return None
    rng = random.Random(f"doubtful {small} {large}")
    if rng.random() > DOUBTFUL:
        return None
    right = small * large
    return rng.choice([right + slip for slip in (-10, -2, -1, 1, 2, 10) if right + slip > 0])


@dataclass(frozen=True)
class Problem:
    """A word problem with its worked solution.

    Attributes:
        kind: the family.
        story: the sentences before the question, distractor included.
        ask: the question itself.
        plan: the plan in words, without numbers that are yet to be computed.
        steps: the calculations in order; the last one's result is the answer.
    """

    kind: str
    story: str
    ask: str
    plan: str
    steps: tuple[Step, ...]

    @property
    def question(self) -> str:
        """The text that a user would send."""
        return f"{self.story} {self.ask}"

    @property
    def answer(self) -> str:
        """The final answer."""
        return str(self.steps[-1].result)

    @property
    def solution(self) -> str:
        """The native chain of thought: plan first, then the steps, then the answer."""
        work = " ".join(f"{step.equation()}." for step in self.steps)
        return f"Plan: {self.plan}. {work} The answer is {self.answer}."


def _pair(rng: random.Random) -> tuple[str, str]:
    first, second = rng.sample(NAMES, 2)
    return first, second


def _story(rng: random.Random, sentences: list[str], who: str, used: tuple[str, ...]) -> str:
    """Join sentences; half of the time a sentence with an irrelevant number is slipped in."""
    if rng.random() < 0.5:
        other = rng.choice([thing for thing in THINGS if thing not in used])
        number = rng.randint(2, 40)
        distractor = rng.choice(
            (
                f"{who} also has {number} {other}.",
                f"The {rng.choice(PLACES)} is {number} years old.",
                f"There are {number} {other} at the {rng.choice(PLACES)}.",
            )
        )
        sentences = list(sentences)
        sentences.insert(rng.randint(0, len(sentences)), distractor)
    return " ".join(sentences)


def gather(rng: random.Random) -> Problem:
    """One step: some more of the same."""
    who, thing = rng.choice(NAMES), rng.choice(THINGS)
    have, more = rng.randint(3, 60), rng.randint(3, 39)
    verb = rng.choice(("finds", "buys", "gets"))
    story = _story(rng, [f"{who} has {have} {thing}.", f"{who} {verb} {more} more {thing}."], who, (thing,))
    ask = f"How many {thing} does {who} have now?"
    return Problem("gather", story, ask, f"add {have} and {more}", (Step("add", have, more),))


def spend(rng: random.Random) -> Problem:
    """One step: some are gone."""
    who, thing = rng.choice(NAMES), rng.choice(THINGS)
    have = rng.randint(12, 99)
    gone = rng.randint(3, have - 2)
    verb = rng.choice(("loses", "sells", "gives away"))
    story = _story(rng, [f"{who} has {have} {thing}.", f"{who} {verb} {gone} {thing}."], who, (thing,))
    ask = f"How many {thing} does {who} have left?"
    return Problem("spend", story, ask, f"subtract {gone} from {have}", (Step("subtract", have, gone),))


def boxes(rng: random.Random) -> Problem:
    """Two steps: equal groups and some loose ones."""
    who, thing = rng.choice(NAMES), rng.choice(THINGS)
    count, each = rng.randint(2, 9), rng.randint(2, 9)
    loose = rng.randint(2, 99 - count * each if count * each > 79 else 20)
    box = rng.choice(("boxes", "bags", "jars"))
    sentences = [f"{who} has {count} {box} with {each} {thing} each.", f"{who} has {loose} loose {thing} too."]
    if rng.random() < 0.3:
        sentences.reverse()
    ask = f"How many {thing} does {who} have in all?"
    steps = (Step("multiply", count, each), Step("add", count * each, loose))
    return Problem(
        "boxes", _story(rng, sentences, who, (thing,)), ask, f"multiply {count} by {each}, then add {loose}", steps
    )


def share(rng: random.Random) -> Problem:
    """Two steps: put together, then divide."""
    who, thing = rng.choice(NAMES), rng.choice(THINGS)
    friends, each = rng.randint(2, 9), rng.randint(2, 9)
    total = friends * each
    have = rng.randint(1, total - 1)
    sentences = [
        f"{who} has {have} {thing} and buys {total - have} more.",
        f"{who} shares all {thing} equally among {friends} friends.",
    ]
    ask = f"How many {thing} does each friend get?"
    steps = (Step("add", have, total - have), Step("divide", total, friends))
    plan = f"add {have} and {total - have}, then divide by {friends}"
    return Problem("share", _story(rng, sentences, who, (thing,)), ask, plan, steps)


def times_as_many(rng: random.Random) -> Problem:
    """Two steps: a multiple, then together."""
    (first, second), thing = _pair(rng), rng.choice(THINGS)
    factor = rng.randint(2, 5)
    have = rng.randint(2, 9)
    sentences = [f"{first} has {have} {thing}.", f"{second} has {factor} times as many {thing} as {first}."]
    if rng.random() < 0.5:
        sentences.reverse()
    ask = "How many do they have together?"
    steps = (Step("multiply", factor, have), Step("add", factor * have, have))
    plan = f"multiply {factor} by {have}, then add {have}"
    return Problem("times", _story(rng, sentences, first, (thing,)), ask, plan, steps)


def fewer(rng: random.Random) -> Problem:
    """Two steps: a difference, then together."""
    (first, second), thing = _pair(rng), rng.choice(THINGS)
    have = rng.randint(8, 45)
    less = rng.randint(2, have - 3)
    sentences = [f"{first} has {less} fewer {thing} than {second}.", f"{second} has {have} {thing}."]
    if rng.random() < 0.5:
        sentences.reverse()
    ask = "How many do they have together?"
    steps = (Step("subtract", have, less), Step("add", have - less, have))
    plan = f"subtract {less} from {have}, then add {have}"
    return Problem("fewer", _story(rng, sentences, first, (thing,)), ask, plan, steps)


def shop(rng: random.Random) -> Problem:
    """Three steps: two products and their sum."""
    who, (one, two) = rng.choice(NAMES), rng.sample(THINGS, 2)
    while True:
        price, cost, many, more = (rng.randint(2, 9) for _ in range(4))
        if price * many + cost * more <= 99:
            break
    sentences = [f"The {one} cost {price} coins each and the {two} cost {cost} coins each."]
    sentences.append(f"{who} buys {many} {one} and {more} {two}.")
    ask = f"How many coins does {who} pay?"
    steps = (
        Step("multiply", many, price),
        Step("multiply", more, cost),
        Step("add", many * price, more * cost),
    )
    plan = f"multiply {many} by {price}, multiply {more} by {cost}, then add both"
    return Problem("shop", _story(rng, sentences, who, (one, two)), ask, plan, steps)


def compare(rng: random.Random) -> Problem:
    """Three steps: two products and their difference."""
    (first, second), thing = _pair(rng), rng.choice(THINGS)
    while True:
        bags, each, sacks, per = (rng.randint(2, 9) for _ in range(4))
        if bags * each > sacks * per:
            break
    sentences = [
        f"{first} has {bags} bags with {each} {thing} each.",
        f"{second} has {sacks} jars with {per} {thing} each.",
    ]
    if rng.random() < 0.5:
        sentences.reverse()
    ask = f"How many more {thing} does {first} have than {second}?"
    steps = (
        Step("multiply", bags, each),
        Step("multiply", sacks, per),
        Step("subtract", bags * each, sacks * per),
    )
    plan = f"multiply {bags} by {each}, multiply {sacks} by {per}, then subtract"
    return Problem("compare", _story(rng, sentences, first, (thing,)), ask, plan, steps)


def change(rng: random.Random) -> Problem:
    """Four steps: two products, their sum, and what is left of a purse."""
    who, (one, two) = rng.choice(NAMES), rng.sample(THINGS, 2)
    while True:
        price, cost, many, more = (rng.randint(2, 9) for _ in range(4))
        paid = price * many + cost * more
        if paid <= 90:
            break
    purse = rng.randint(paid + 1, 99)
    sentences = [
        f"{who} has {purse} coins.",
        f"The {one} cost {price} coins each and the {two} cost {cost} coins each.",
        f"{who} buys {many} {one} and {more} {two}.",
    ]
    ask = f"How many coins does {who} have left?"
    steps = (
        Step("multiply", many, price),
        Step("multiply", more, cost),
        Step("add", many * price, more * cost),
        Step("subtract", purse, paid),
    )
    plan = f"multiply {many} by {price}, multiply {more} by {cost}, add both, then subtract from {purse}"
    return Problem("change", _story(rng, sentences, who, (one, two)), ask, plan, steps)


FAMILIES: tuple[Callable[[random.Random], Problem], ...] = (
    gather,
    spend,
    boxes,
    share,
    times_as_many,
    fewer,
    shop,
    compare,
    change,
)
LONG_FAMILIES = (shop, compare, change)  # of three and four steps
