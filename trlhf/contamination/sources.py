"""The evaluation sets that ``check.against`` names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trlhf.checks import OWN_TEST as OWN
from trlhf.contamination.published import data_sets, split_of
from trlhf.contamination.texts import EvaluationItem, evaluation_items, item_of
from trlhf.rows import Row, read_rows
from trlhf.sft.gsm8k import read_split

if TYPE_CHECKING:
    from trlhf.config import Config
    from trlhf.tasks import Task
    from trlhf.types import RowReport


def evaluation_sets(config: Config, task: Task) -> tuple[list[EvaluationItem], list[RowReport]]:
    """Read every evaluation set; without ``check.against`` it is the run's own test set.

    A suite by name (``agieval``) is one set, of all the data sets behind it.

    Raises:
        UserError: one cannot be read, or holds no question.
    """
    mirror = config.evaluation.mirror or config.data.mirror
    items: list[EvaluationItem] = []
    reports: list[RowReport] = []
    for source in dict.fromkeys(config.check.against or [OWN]):
        if source == OWN:
            items += _own_items(config, task)
            continue
        for name in [source] if Path(source).expanduser().exists() else data_sets(source) or [source]:
            found, report = evaluation_items(read_rows(name, split_of(name), mirror), name)
            place = "{}" if name == source else f"{name}, {{}}"
            items += [replace(item, source=source, place=place.format(item.place)) for item in found]
            reports.append(report)
    return items, reports


def _own_items(config: Config, task: Task) -> list[EvaluationItem]:
    """Return the prompts that the run is evaluated on, with the reference responses that their rows hold."""
    rows = {row.place: row for row in _own_rows(config)}
    items: list[EvaluationItem] = []
    for prompt in task.test:
        row = rows.get(prompt.id)
        items += evaluation_items([row], OWN)[0] if row else [item_of(prompt.messages, OWN, prompt.id)]
    return items


def _own_rows(config: Config) -> list[Row]:
    data = config.data
    if data.name == "gsm8k":
        return read_split(data.path or "", "test", data.mirror)
    return read_rows(data.test, "test", data.mirror) if data.name == "file" and data.test else []
