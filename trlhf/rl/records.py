"""What every round was like, in plain numbers, and the rules of ``rl.stop_rules`` on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

import numpy as np

from trlhf.targeting.stopping import anchors_fell, frontier_used_up, longer_without_accuracy, outliers_doubled

FEWEST_ANCHORS = 8  # verified ones from which their accuracy says something


class Record(TypedDict):
    """What the rules of ``rl.stop_rules`` look at, by round; None where nothing was measured.

    ``step``: the round's last. ``tokens``: mean length of the responses trained on. ``held_out_tokens``,
    ``held_out_accuracy``: of the held-out prompts' samples. ``frontier_before``, ``frontier``: ΣU over the pool at the
    round's start and end. ``outliers``, ``outliers_of``: of the candidates, in prompts. ``anchors_before``,
    ``anchors``: whether each verified anchor's greedy answer is right, of the reference and of the policy.
    """

    step: int
    tokens: float | None
    held_out_tokens: float | None
    held_out_accuracy: float | None
    frontier_before: float | None
    frontier: float | None
    outliers: float | None
    outliers_of: int | None
    anchors_before: dict[str, float] | None
    anchors: dict[str, float] | None


def broken_rule(records: Sequence[Record], rules: Sequence[str]) -> tuple[str, int] | None:
    """Return why the stage is to stop after the last round, and the step whose policy to go back to; None if it is not.

    That is the policy which the round began with; where nothing is left to learn, the last one.

    Args:
        records: of all rounds so far.
        rules: names of `RULES`.
    """
    for rule in rules:
        reason = RULES[rule](records)
        if reason is not None:
            begun = records[-2]["step"] if len(records) > 1 else 0
            return reason, records[-1]["step"] if rule == "frontier_used_up" else begun
    return None


def _outliers(records: Sequence[Record]) -> str | None:
    found = [(r["outliers"], r["outliers_of"]) for r in records]
    counts = [(k, n) for k, n in found if k is not None and n is not None]
    return outliers_doubled([k for k, _ in counts], [n for _, n in counts]) if len(counts) == len(found) else None


def _longer(records: Sequence[Record]) -> str | None:
    measured = [r for r in records if r["held_out_tokens"] is not None]
    lengths = [r["held_out_tokens"] or 0.0 for r in measured]
    return longer_without_accuracy(lengths, [r["held_out_accuracy"] for r in measured])


def _used_up(records: Sequence[Record]) -> str | None:
    sums = [records[0]["frontier_before"], *(r["frontier"] for r in records)]
    return frontier_used_up([x for x in sums if x is not None]) if None not in sums else None


def _fell(records: Sequence[Record]) -> str | None:
    before, after = records[-1]["anchors_before"], records[-1]["anchors"]
    if before is None or after is None or len(before) < FEWEST_ANCHORS:
        return None
    return anchors_fell(np.array(list(before.values())), np.array([after[name] for name in before]))


RULES: Mapping[str, Callable[[Sequence[Record]], str | None]] = {
    "outliers_doubled": _outliers,
    "longer_without_accuracy": _longer,
    "frontier_used_up": _used_up,
    "anchors_fell": _fell,
}
