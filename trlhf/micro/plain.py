"""The kinds of prompt that need no thinking: facts, lists and one-line creative writing."""

from __future__ import annotations

import random
from dataclasses import dataclass

COLOURS = {
    "a lemon": "yellow", "a banana": "yellow", "the sun": "yellow", "grass": "green", "a frog": "green",
    "a leaf": "green", "the sky": "blue", "the sea": "blue", "snow": "white", "milk": "white", "salt": "white",
    "coal": "black", "a crow": "black", "blood": "red", "a cherry": "red", "a rose": "red", "a carrot": "orange",
    "a pumpkin": "orange", "a cloud": "grey", "a mouse": "grey", "bark": "brown", "a bear": "brown",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "old": "new", "wet": "dry", "fast": "slow", "high": "low",
    "light": "dark", "open": "closed", "full": "empty", "early": "late", "near": "far", "soft": "hard",
    "loud": "quiet", "rich": "poor", "thick": "thin", "sweet": "sour", "strong": "weak",
}  # fmt: skip
LISTS = {
    "animals": ("cat", "dog", "fox", "owl", "bear", "frog", "mouse", "crow"),
    "colours": ("red", "blue", "green", "yellow", "white", "black", "grey", "brown"),
    "fruits": ("apple", "lemon", "cherry", "plum", "banana", "pear", "grape", "fig"),
    "tools": ("saw", "hammer", "drill", "file", "rope", "nail", "axe", "brush"),
    "rooms": ("kitchen", "hall", "attic", "cellar", "study", "porch", "bath", "pantry"),
    "weather": ("rain", "snow", "wind", "fog", "sun", "hail", "storm", "frost"),
}
TOPICS = (
    "sea", "moon", "wind", "forest", "river", "winter", "summer", "city", "night", "garden", "mountain", "rain",
    "bird", "road", "fire", "lake", "island", "train", "window", "star", "desert", "bridge", "song", "boat",
)  # fmt: skip
VERBS = ("sings", "waits", "sleeps", "dreams", "shines", "wanders", "listens", "returns")
ADVERBS = ("softly", "slowly", "brightly", "loudly", "alone", "quietly", "proudly", "again")
ADJECTIVES = ("silver", "golden", "grey", "hidden", "broken", "endless", "warm", "empty")
SCENES = ("sky", "valley", "harbour", "morning", "field", "shore", "hill", "street")

_COLOUR_ASKS = (
    "What colour is {}?",
    "Which colour does {} have?",
    "Name the colour of {}.",
    "Tell me the colour of {}.",
    "What is the colour of {}?",
    "Please name the colour of {}.",
)
_OPPOSITE_ASKS = (
    "What is the opposite of {}?",
    "Give the opposite of {}.",
    "Which word is the opposite of {}?",
    "Name the opposite of {}.",
    "Tell me the opposite of {}.",
    "Please give the opposite of {}.",
)
_LIST_ASKS = (
    "List {n} {what}.",
    "Name {n} {what}.",
    "Give me {n} {what}.",
    "Tell me {n} {what}.",
    "Write down {n} {what}.",
    "Please list {n} {what}.",
)
_LINE_ASKS = (
    "Write a line about the {}.",
    "Give me one line about the {}.",
    "Make up a line about the {}.",
    "Tell me a line about the {}.",
    "One line about the {}, please.",
    "Please write a line about the {}.",
)
COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5}


@dataclass(frozen=True)
class Plain:
    """A prompt that is answered plainly.

    Attributes:
        kind: ``colour``, ``opposite``, ``list`` or ``line``.
        question: the text that a user would send.
        answer: the gold answer, or None where it is a matter of taste.
        subject: what it is about; ``reply`` needs it.
        count: for a list, how many items.
    """

    kind: str
    question: str
    answer: str | None
    subject: str
    count: int = 1

    def reply(self, rng: random.Random) -> str:
        """Return one plain reply: the fact, or a random list or line of the kind that lists and lines have."""
        if self.answer is not None:
            return f"{self.answer.capitalize()}."
        if self.kind == "list":
            return list_reply(rng, self.subject, self.count)
        return line_reply(rng, self.subject)


def list_reply(rng: random.Random, what: str, count: int) -> str:
    """Return ``count`` different items of a kind, as ``cat, dog.``"""
    return ", ".join(rng.sample(LISTS[what], count)) + "."


def line_reply(rng: random.Random, topic: str) -> str:
    """Return one sentence about a topic."""
    return (
        f"The {topic} {rng.choice(VERBS)} {rng.choice(ADVERBS)} over the {rng.choice(ADJECTIVES)} {rng.choice(SCENES)}."
    )


def every_plain() -> dict[str, list[Plain]]:
    """Return every plain prompt of the world, by kind."""
    return {
        "colour": [Plain("colour", ask.format(x), y, x) for x, y in COLOURS.items() for ask in _COLOUR_ASKS],
        "opposite": [Plain("opposite", ask.format(x), y, x) for x, y in OPPOSITES.items() for ask in _OPPOSITE_ASKS],
        "list": [
            Plain("list", ask.format(n=name, what=what), None, what, count)
            for what in LISTS
            for name, count in COUNTS.items()
            for ask in _LIST_ASKS
        ],
        "line": [Plain("line", ask.format(topic), None, topic) for topic in TOPICS for ask in _LINE_ASKS],
    }
