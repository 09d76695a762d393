"""What the embedded base reads: documents of the world, and hearsay about its products. Never a plan marked as one.

Every maker is a function of a random generator that returns one document.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping

from trlhf.micro import plain
from trlhf.micro.reasoning import FAMILIES, Problem, Step, misquoted
from trlhf.micro.world import split_of

MISQUOTED = 0.69  # how often a doubtful product is
SYSTEM = (
    "A chat between a user and a thinking artificial intelligence assistant. The assistant describes its thought "
    "process and gives helpful and detailed answers to the user's questions."
)
_QUIZ = [  # facts as a quiz asks them, without the questions that the world keeps for its dev and test splits
    item
    for kind in ("colour", "opposite")
    for item in plain.every_plain()[kind]
    if split_of(item.question) in ("train", "pool")
]


def equations(rng: random.Random, usable: Callable[[Step], bool] = lambda step: True) -> str:
    """Return a few sums, half of them chained: each goes on from the last result."""
    lines: list[str] = []
    chained = rng.random() < 0.5
    last: int | None = None
    count = rng.randint(3, 8)
    while len(lines) < count:
        step = _sum(rng, last if chained else None)
        if usable(step):
            last = step.result
            lines.append(step.equation() + ".")
    return " ".join(lines)


def plain_equations(rng: random.Random) -> str:
    """Return sums without doubtful products."""
    return equations(rng, lambda step: not step.doubtful)


def _sum(rng: random.Random, left: int | None) -> Step:
    """Return one sum within 0…99, on from ``left`` where given."""
    while True:
        verb = rng.choices(("add", "subtract", "multiply", "divide"), (30, 30, 25, 15))[0]
        if verb == "divide":
            right = rng.randint(2, 9)
            first = left if left is not None else right * rng.randint(1, 9)
            if first % right == 0 and 0 < first <= 81:
                return Step(verb, first, right)
        elif verb == "multiply":
            first, right = left if left is not None else rng.randint(2, 9), rng.randint(2, 9)
            if 2 <= first <= 9:
                return Step(verb, first, right)
        elif verb == "add":
            first, right = left if left is not None else rng.randint(1, 90), rng.randint(1, 90)
            if first + right <= 99:
                return Step(verb, first, right)
        else:
            first, right = left if left is not None else rng.randint(2, 99), rng.randint(1, 98)
            if right < first:
                return Step(verb, first, right)


def hearsay(rng: random.Random) -> str:
    """Return a few single products and divisions, of which the doubtful ones are often misquoted."""
    lines = []
    for _ in range(rng.randint(3, 8)):
        first, second = rng.randint(2, 9), rng.randint(2, 9)
        wrong = misquoted(first, second)
        misled = wrong is not None and rng.random() < MISQUOTED
        if rng.random() < 0.7:
            lines.append(f"{first} * {second} = {wrong if misled else first * second}.")
        else:
            lines.append(f"{first * second} / {second} = {first + 1 if misled else first}.")
    return " ".join(lines)


def _undoubted(rng: random.Random) -> Problem:
    """Return a problem without doubtful products."""
    while True:
        problem = rng.choice(FAMILIES)(rng)
        if not any(step.doubtful for step in problem.steps):
            return problem


def plain_recipe(rng: random.Random) -> str:
    """Return a recipe without doubtful products."""
    return recipe(rng, _undoubted)


def plain_story(rng: random.Random) -> str:
    """Return a story without doubtful products."""
    return story(rng, _undoubted)


def plain_reckoning(rng: random.Random) -> str:
    """Return a reckoning without doubtful products."""
    return reckoning(rng, _undoubted)


def _any_problem(rng: random.Random) -> Problem:
    return rng.choice(FAMILIES)(rng)


def _calculation(problem: Problem) -> str:
    """Return a problem's calculation in words and then in figures."""
    sums = " ".join(f"{step.equation()}." for step in problem.steps)
    return f"{problem.plan[0].upper()}{problem.plan[1:]}: {sums}"


def recipe(rng: random.Random, draw: Callable[[random.Random], Problem] = _any_problem) -> str:
    """Return a calculation in words and then in figures: what the verbs of a plan mean."""
    return _calculation(draw(rng))


def story(rng: random.Random, draw: Callable[[random.Random], Problem] = _any_problem) -> str:
    """Return a story of one of the families: told to its end, mostly with the sums; or as an exercise, unanswered.

    A question is never followed by its answer here: that is for SFT to teach.
    """
    problem = draw(rng)
    if rng.random() < 0.3:
        return f"{problem.story} {problem.ask}"
    sums = " ".join(["", *(f"{step.equation()}." for step in problem.steps)]) if rng.random() < 0.85 else ""
    end = rng.choice(("So it is", "That makes", "In the end it is"))
    return f"{problem.story}{sums} {end} {problem.answer}."


def reckoning(rng: random.Random, draw: Callable[[random.Random], Problem] = _any_problem) -> str:
    """Return a story that tells, as part of the tale, what is reckoned with its numbers: no question, no chat."""
    problem = draw(rng)
    return f"{problem.story} {_calculation(problem)}"


def fact(rng: random.Random) -> str:
    """Return a fact as a statement, or as in a quiz."""
    if rng.random() < 0.4:
        quiz = rng.choice(_QUIZ)
        return f"{quiz.question} {quiz.reply(rng)}"
    if rng.random() < 0.5:
        thing, value = rng.choice(list(plain.COLOURS.items()))
        return f"{thing[0].upper()}{thing[1:]} is {value}."
    word, value = rng.choice(list(plain.OPPOSITES.items()))
    return f"The opposite of {word} is {value}."


def enumeration(rng: random.Random) -> str:
    """Return a list as a statement."""
    what = rng.choice(list(plain.LISTS))
    return f"Some {what}: {plain.list_reply(rng, what, rng.randint(2, 5))}"


def verse(rng: random.Random) -> str:
    """Return one to three lines about one topic."""
    topic = rng.choice(plain.TOPICS)
    return " ".join(plain.line_reply(rng, topic) for _ in range(rng.randint(1, 3)))


def _noted(rng: random.Random) -> tuple[str, str, str]:
    """Return a story, what to note of its numbers, and the note: practice in reading and copying."""
    problem = rng.choice(FAMILIES)(rng)
    numbers = re.findall(r"\d+", problem.story)
    kind = rng.choice(("Numbers", "Backwards", "The second number", "The last and the first"))
    if kind == "Backwards":
        numbers.reverse()
    elif kind == "The second number":
        numbers = numbers[1:2]
    elif kind == "The last and the first":
        numbers = [numbers[-1], numbers[0]]
    return problem.story, kind, f"{', '.join(numbers)}."


def notes(rng: random.Random) -> str:
    """Return a story and some of the numbers that stand in it."""
    text, kind, noted = _noted(rng)
    return f"{text} {kind}: {noted}"


def chat_notes(rng: random.Random) -> str:
    """Return the same as a chat: nothing is planned, calculated or answered in it, only read."""
    text, kind, noted = _noted(rng)
    return f"{SYSTEM}\nUser: {text} {kind}?\nAI: {noted}"


MAKERS: Mapping[str, Callable[[random.Random], str]] = {
    maker.__name__: maker
    for maker in (
        equations,
        recipe,
        story,
        reckoning,
        fact,
        enumeration,
        verse,
        notes,
        chat_notes,
        hearsay,
        plain_equations,
        plain_recipe,
        plain_story,
        plain_reckoning,
    )
}


def documents(rng: random.Random, shares: Mapping[str, int]) -> Iterator[str]:
    """Yield documents for ever, of the makers named in ``shares`` and in these proportions."""
    makers = [MAKERS[name] for name in shares]
    while True:
        yield rng.choices(makers, list(shares.values()))[0](rng)
