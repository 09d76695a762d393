"""The hidden taste of the simulated person: what makes one list or one line better than another.

Training code never calls this; only the simulated person (through the ledger) and the evaluation do.
"""

from __future__ import annotations

import random
import re

from trlhf.micro import plain
from trlhf.types import Prompt

_WORDS = (
    *plain.VERBS,
    *plain.ADVERBS,
    *plain.ADJECTIVES,
    *plain.SCENES,
    *(w for items in plain.LISTS.values() for w in items),
)


def _weights() -> dict[str, float]:
    """Give every word a liking in [-1, 1], drawn once and for all: taste is a property of the world, not of a run."""
    rng = random.Random("taste")
    return {word: round(rng.uniform(-1, 1), 2) for word in dict.fromkeys(_WORDS)}


_LIKING = _weights()
_LINE = re.compile(r"The (\w+) (\w+) (\w+) over the (\w+) (\w+)\.")


def taste(prompt: Prompt, response: str) -> float:
    """Return how much the simulated person likes a response: about -1 to 1, and -3 for one that misses the task.

    A line must have the form that lines have and be about the topic asked for; a list must have as many different items
    of the asked kind as were asked for. Beyond that, the score is the mean liking of the words.
    """
    question = prompt.messages[-1]["content"]
    words = re.findall(r"[a-z]+", response.lower())
    if prompt.kind == "list":
        what = next((name for name in plain.LISTS if name in question), None)
        count = next((number for name, number in plain.COUNTS.items() if f" {name} " in question), None)
        fits = (
            what is not None
            and len(words) == count
            and len(set(words)) == len(words)
            and all(word in plain.LISTS[what] for word in words)
        )
        return sum(_LIKING[word] for word in words) / len(words) if fits else -3.0
    match = _LINE.fullmatch(response.strip())
    if match is None or f"the {match[1]}" not in question.lower():
        return -3.0
    chosen = [word for word in match.groups()[1:] if word in _LIKING]
    return sum(_LIKING[word] for word in chosen) / len(chosen) if len(chosen) == 4 else -3.0
