"""What became of every row: on the screen and in the run directory's ``data.json``. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trlhf import files
from trlhf.console import print_table
from trlhf.types import RowReport

FILE = "data.json"
PLACES = 20  # listed in the file for each reason, all are counted


@dataclass
class SourceReport(RowReport):
    """What happened to the rows of one data set of a mixture.

    Attributes:
        name: of the data set in the mixture.
        weight: how often each chat counts.
        demonstrations: what was made of the chats: responses or whole chats, repeated by weight.
    """

    name: str = ""
    weight: float = 1.0
    demonstrations: int = 0


def write_report(folder: Path, reports: Sequence[RowReport]) -> None:
    """Add reports to ``data.json``: for each data set rows read and kept, and why how many were left out.

    Raises:
        UserError: the file cannot be written, or an earlier one not read.
    """
    path = folder / FILE
    known: dict[str, Any] = files.read_json(path) if path.exists() else {}
    news = {_name(report): _entry(report) for report in reports}
    if news:
        files.write_json(path, {**known, **news})


def print_report(reports: Sequence[RowReport]) -> None:
    """Print a table of the data sets of a mixture; without one, nothing."""
    sources = [report for report in reports if isinstance(report, SourceReport)]
    if not sources:
        return
    rows: list[list[object]] = []
    for report in sources:
        reasons = [f"{len(places)}: {reason}" for reason, places in report.dropped.items()]
        rows.append(
            [report.name, report.read, report.kept, f"{report.weight:g}", report.demonstrations, "\n".join(reasons)]
        )
    total = [sum(report.read for report in sources), sum(report.kept for report in sources)]
    rows.append(["sum", *total, "", sum(report.demonstrations for report in sources), ""])
    print_table("Demonstrations", ["data set", "rows", "kept", "weight", "demonstrations", "left out"], rows)


def _name(report: RowReport) -> str:
    return f"{report.name}: {report.source}" if isinstance(report, SourceReport) else report.source


def _entry(report: RowReport) -> dict[str, Any]:
    left_out = {reason: {"count": len(places), "places": places[:PLACES]} for reason, places in report.dropped.items()}
    entry: dict[str, Any] = {"read": report.read, "kept": report.kept, "left_out": left_out}
    if isinstance(report, SourceReport):
        entry |= {"weight": report.weight, "demonstrations": report.demonstrations}
    return entry
