"""Published figures of models that were made from the same base, beside those measured here. No torch here.

The figures stand in ``published.yaml``, each with its source and its protocol.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from trlhf.evaluation.protocol import Protocol
from trlhf.evaluation.report import cell

FILE = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True)
class Figure:
    """One published figure.

    Attributes:
        model: hub name.
        suite: to which of our suites it belongs.
        task: which task of it.
        text: as its source prints it.
        protocol: how it was measured, as far as its source says.
        source: address.
    """

    model: str
    suite: str
    task: str
    text: str
    protocol: Protocol
    source: str


@cache
def figures() -> tuple[Figure, ...]:
    """Return every published figure."""
    import yaml

    blocks: list[dict[str, Any]] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return tuple(figure for block in blocks for figure in _of(block))


def beside(suites: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]) -> list[dict[str, str]]:
    """Return, for each task that was measured, the published figures with what was otherwise in measuring them.

    Args:
        suites: suite → task → model → entry; the last model's entry stands beside each figure, of a majority of as many
            votes where there is one.
    """
    rows = []
    for figure in figures():
        tasks = suites.get(figure.suite, {})
        models = tasks.get(f"{figure.task} maj@{figure.protocol.votes}") or tasks.get(figure.task)
        if not models:
            continue
        name, entry = list(models.items())[-1]
        here = Protocol(**{**entry["protocol"], "tasks": tuple(entry["protocol"].get("tasks", ()))})
        rows.append(
            {
                "suite": figure.suite,
                "task": figure.task,
                "model": figure.model,
                "published": figure.text,
                "here": f"{cell(entry)} ({name})",
                "difference": figure.protocol.differences(here),
                "source": figure.source,
            }
        )
    return rows


def _of(block: Mapping[str, Any]) -> Iterator[Figure]:
    for task, found in block["figures"].items():
        own = dict(found) if isinstance(found, Mapping) else {"value": found}
        value = own.pop("value")
        values: dict[str, Any] = {**block.get("protocol", {}), **own}
        protocol = Protocol(**{**values, "tasks": tuple(values.get("tasks", ()))})
        yield Figure(block["model"], block["suite"], task, _text(value, block["unit"]), protocol, block["source"])


def _text(value: float, unit: str) -> str:
    """Write a figure in percent, or a rating as it is, with the digits of its source."""
    return {"percent": f"{value:g}", "fraction": f"{round(100 * value, 2):g}", "rating": f"{value:g}"}[unit]
