"""``stage=check``: training data against evaluation sets, and the same data without the rows that are too close."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlhf import files
from trlhf.console import print_table
from trlhf.contamination.compare import compare
from trlhf.contamination.near import LEVELS
from trlhf.contamination.sources import evaluation_sets
from trlhf.contamination.texts import PARTS, Part, training_rows
from trlhf.errors import UserError
from trlhf.sft.formats import row_of
from trlhf.types import RowReport

if TYPE_CHECKING:
    from trlhf.config import Config
    from trlhf.run import StageDirectory
    from trlhf.tasks import Task

OFFENDING = "offending.jsonl"
log = logging.getLogger("trlhf")


def run_check(config: Config, task: Task, stage: StageDirectory) -> dict[str, Any]:
    """Compare all training data with all evaluation sets; leave the offending rows and the counts, print a table.

    Args:
        config: ``check`` and ``data`` matter.
        task: with everything that any stage would train on.
        stage: folder of the stage.

    Returns:
        The metrics that are also in ``metrics.json``.

    Raises:
        UserError: an evaluation set cannot be read.
    """
    rows = training_rows(task)
    items, reports = evaluation_sets(config, task)
    for report in reports:
        (log.warning if report.dropped else log.info)(report.describe())
    log.info("check: %d training rows against %d evaluation items", len(rows), len(items))
    findings = compare(rows, items, config.check.ngram, config.check.overlap)
    metrics = {**findings.counts(), "ngram": config.check.ngram, "overlap": config.check.overlap}
    stage.write_jsonl(OFFENDING, [asdict(offence) for offence in findings.offences()])
    stage.complete(metrics)
    return metrics


def print_check(metrics: Mapping[str, Any], path: Path) -> None:
    """Print one row an evaluation set: items that a training row meets at each level, and by n-grams.

    Args:
        metrics: of `run_check`.
        path: folder of the stage.
    """
    n = metrics["ngram"]
    columns = ["", "items", *(f"{level}%" for level in LEVELS)]
    if n:
        columns += [f"any {n}-gram", f"{metrics['overlap']:.0%} of them"]
    print_table(
        "Evaluation items that stand in the training data, by similarity and by n-grams in common",
        [*columns, "training rows"],
        [[_short(name), *_cells(counts, bool(n))] for name, counts in metrics["sets"].items()],
    )
    offending = [f"{metrics['offending'][part]} of {count} {part}" for part, count in metrics["training"].items()]
    log.info("check: offending training rows: %s; listed in %s", ", ".join(offending), path / OFFENDING)


def without_offending(task: Task, stage: StageDirectory) -> Task:
    """Return the task without the training rows that ``stage=check`` found; its reports are about these alone.

    Raises:
        UserError: there is no finished check, or nothing would be left to learn from.
    """
    listed: dict[str, dict[str, str]] = {part: {} for part in PARTS}
    for one in files.read_jsonl(stage.require(OFFENDING, made_by="stage=check")):
        alike = f"{one['level']}% similar" if one["level"] else "by its n-grams close"
        listed[one["part"]].setdefault(one["row"], f"{alike} to an item of {one['source']} (data.decontaminate)")
    places: dict[Part, list[str]] = {
        "sft": [row_of(one) for one in task.demonstrations],
        "pool": [prompt.id for prompt in task.pool],
        "labels": [*(label.source for label in task.labelled), *(pair.source for pair in task.pairs)],
    }
    reports = [_report(part, list(dict.fromkeys(places[part])), listed[part], stage) for part in PARTS]
    return replace(
        task,
        demonstrations=[one for one in task.demonstrations if row_of(one) not in listed["sft"]],
        pool=[prompt for prompt in task.pool if prompt.id not in listed["pool"]],
        labelled=[label for label in task.labelled if label.source not in listed["labels"]],
        pairs=[pair for pair in task.pairs if pair.source not in listed["labels"]],
        reports=[report for report in reports if report.dropped],
    )


def _report(part: Part, places: Sequence[str], listed: Mapping[str, str], stage: StageDirectory) -> RowReport:
    report = RowReport(f"{part}: training rows", read=len(places))
    for place in places:
        if place in listed:
            report.drop(listed[place], place)
        else:
            report.kept += 1
    if places and not report.kept:
        raise UserError(
            f"data.decontaminate=true leaves no row for {part}: all {len(places)} are too close to an evaluation item "
            f"(listed in {stage.path / OFFENDING}); give other data, or check.against other sets"
        )
    return report


def _cells(counts: Mapping[str, Any], ngrams: bool) -> list[int]:
    cells = [counts["items"], *(counts["levels"][str(level)]["items"] for level in LEVELS)]
    if ngrams:
        cells += [counts["ngrams"]["items_any"], counts["ngrams"]["items"]]
    return [*cells, counts["rows"]]


def _short(name: str) -> str:
    """Return the name of a set, without the folders above a file."""
    return Path(name).name if Path(name).exists() else name
