"""The summary of a run and the table at its end: what every stage reached, and what it cost. No torch here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from trlhf.console import print_table
from trlhf.evaluation.report import estimates

log = logging.getLogger("trlhf")
NONE = "–"
Cells = dict[str, str]  # model → what stands in its column


def news_of(stage: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a complete stage adds to ``summary.json``: of its metrics alone, so that it can be added later.

    Args:
        stage: its name.
        metrics: content of its ``metrics.json``.
    """
    if stage == "check":
        return {"contamination": metrics}
    if stage == "sft":
        return {"demonstrations": metrics["demonstrations"]}
    if stage == "reward":
        return {"reward": {"held_out": metrics["held_out"]}}
    if stage == "rl":
        labels = {name: metrics["labels"][name] for name in ("budget", "spent")}
        return {"labels": labels, "rl": {name: metrics[name] for name in ("stopped", "held_out_accuracy")}}
    models, measures = metrics["models"], ("accuracy", "by_kind", "plans", "plans_by_kind")
    measured = {measure: {name: entry[measure] for name, entry in models.items()} for measure in measures}
    suites = {"suites": estimates(metrics["suites"])} if "suites" in metrics else {}
    return {**(measured | {"paired": metrics["paired"]} if models else {}), **suites}


def print_closing_table(summary: Mapping[str, Any], confidence: float) -> None:
    """Print one column a model and one row a measure; it fits into 80 columns.

    Args:
        summary: content of ``summary.json``.
        confidence: of the intervals.
    """
    accuracy = summary["accuracy"]
    counts = {entry["n"] for entry in accuracy.values() if entry}
    title = f"Accuracy at temperature 0, zero-shot, {max(counts, default=0)} held-out reasoning prompts"
    rows = [
        [name, *(cells.get(model, NONE) for model in accuracy)]
        for name, cells in closing_rows(summary, confidence).items()
        if cells or name == "accuracy"
    ]
    print_table(title, ["", *accuracy], rows, caption="newly right, p and wins: against the column to the left")
    if reason := summary.get("rl", {}).get("stopped"):
        log.warning("the rl stage ended early: %s", reason)


def closing_rows(summary: Mapping[str, Any], confidence: float) -> dict[str, Cells]:
    """Return name of the measure → model → cell; a measure that there is not for any model is empty."""
    accuracy, plans = summary["accuracy"], summary.get("plans", {})
    before = {key.split("→")[1]: entry for key, entry in summary.get("paired", {}).items()}
    tests = {model: entry.get("mcnemar") for model, entry in before.items()}
    wins = {model: entry.get("win_rate") for model, entry in before.items()}
    interval = f"  {confidence:.0%} interval"
    return {
        "accuracy": _cells(accuracy, lambda x: f"{x['value']:.1%}"),
        interval: _cells(accuracy, lambda x: f"{x['low']:.1%} to {x['high']:.1%}"),
        "newly right / newly wrong": _cells(tests, lambda x: f"{x['gained']} / {x['lost']}"),
        "  p (McNemar)": _cells(tests, lambda x: f"{x['p']:.2g}"),
        "plans, where needed": _cells({name: x["reasoning"] for name, x in plans.items()}, _share),
        "plans, where not needed": _cells({name: x["other"] for name, x in plans.items()}, _share),
        "wins on open prompts": _cells(wins, _share),
        f"{interval} ": _cells(wins, lambda x: f"{x['low']:.0%} to {x['high']:.0%}"),
        "time": _cells(
            {name: x for name, x in summary.get("seconds", {}).items() if name in accuracy}, lambda x: f"{x:.0f} s"
        ),
    }


def _cells(values: Mapping[str, Any], text: Callable[[Any], str]) -> Cells:
    return {name: text(value) for name, value in values.items() if value is not None}


def _share(entry: Mapping[str, float]) -> str:
    return f"{entry['value']:.0%}"
