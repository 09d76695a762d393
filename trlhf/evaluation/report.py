"""The suites' tables: every task with its interval, and what was published beside it. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trlhf.console import print_table

if TYPE_CHECKING:
    from trlhf.config import EvaluationConfig

NONE = "–"
Suites = Mapping[str, Mapping[str, Mapping[str, Any]]]  # suite → task → model → entry


def by_task(models: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Turn model → suite → task → entry into suite → task → model → entry."""
    turned: dict[str, dict[str, dict[str, Any]]] = {}
    for model, suites in models.items():
        for suite, tasks in suites.items():
            for task, entry in tasks.items():
                turned.setdefault(suite, {}).setdefault(task, {})[model] = entry
    return turned


def joined(earlier: Suites, fresh: Suites) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Return the tasks of an earlier start and those of this one, which win."""
    return {name: {**earlier.get(name, {}), **fresh.get(name, {})} for name in {**earlier, **fresh}}


def measured(suites: Suites) -> set[tuple[str, str]]:
    """Return every suite and task that there are whole results for: none of their answers waits for a rating."""
    return {
        (suite, task)
        for suite, tasks in suites.items()
        for task, models in tasks.items()
        if not any(entry.get("unjudged") for entry in models.values())
    }


def estimates(suites: Suites) -> dict[str, Any]:
    """Return what ``summary.json`` keeps of each result: value, interval and number of questions."""
    kept = ("value", "low", "high", "n")
    return {
        suite: {
            task: {model: {key: entry[key] for key in kept if key in entry} for model, entry in models.items()}
            for task, models in tasks.items()
        }
        for suite, tasks in suites.items()
    }


def print_suites(metrics: Mapping[str, Any], config: EvaluationConfig) -> None:
    """Print a table for each suite, and one with the published figures of the same tasks.

    Args:
        metrics: of the eval stage.
        config: which suites, and how sure the intervals are.
    """
    for suite in dict.fromkeys(config.suites):
        if suite not in metrics["suites"]:
            continue  # evaluation.tasks names none of it
        tasks = metrics["suites"][suite]
        names = list(dict.fromkeys(model for models in tasks.values() for model in models))
        rows = [[task, _shots(models), *(cell(models.get(name)) for name in names)] for task, models in tasks.items()]
        title = f"{suite}: {'rating from 1 to 10' if _rated(tasks) else 'percent'} [{config.confidence:.0%} interval]"
        if config.limit:
            title += f", the first {config.limit} questions of each task"
        print_table(title, ["", "shots", *names], rows, caption="\n".join(_captions(tasks)), width=80)
        beside = [row for row in metrics.get("published", ()) if row["suite"] == suite]
        if beside:
            _print_published(suite, beside)


def _print_published(suite: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Print one column for each published model; a letter at each figure leads to what was done otherwise."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    notes = {text: chr(ord("a") + place) for place, text in enumerate(dict.fromkeys(row["difference"] for row in rows))}
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        line = cells.setdefault(row["task"], {"here": row["here"]})
        line[row["model"]] = f"{row['published']} {notes[row['difference']]}"
    print_table(
        f"{suite}: as published, each measured in its own way (sources: trlhf/evaluation/published.yaml)",
        ["", "here", *(model.rpartition("/")[2] for model in models)],
        [[task, line["here"], *(line.get(model, NONE) for model in models)] for task, line in cells.items()],
        caption="\n".join(f"{letter}: {text}" for text, letter in notes.items()),
        width=110,
    )


def cell(entry: Mapping[str, Any] | None) -> str:
    """Write a value with its interval, and a dagger where guessing is as good."""
    if entry is None or entry["value"] is None:
        return NONE
    mark = "†" if entry.get("at_chance") else ""
    return f"{shown(entry, 'value')}{mark} [{shown(entry, 'low')}, {shown(entry, 'high')}]"


def shown(entry: Mapping[str, Any], key: str = "value") -> str:
    """Write a value as tables do: a rating as it is, a share in percent without the sign."""
    if entry[key] is None:
        return NONE
    return f"{entry[key]:.2f}" if entry["metric"] == "rating" else f"{100 * entry[key]:.1f}"


def _shots(models: Mapping[str, Mapping[str, Any]]) -> str:
    shots = next(iter(models.values()))["shots"]
    return NONE if shots < 0 else str(shots)


def _rated(tasks: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> bool:
    return any(entry["metric"] == "rating" for models in tasks.values() for entry in models.values())


def _captions(tasks: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    """Yield what a reader must know of a table."""
    entries = [(task, model, entry) for task, models in tasks.items() for model, entry in models.items()]
    guesses = sorted({round(100 * entry["chance"], 1) for _, _, entry in entries if entry.get("at_chance")})
    if guesses:
        span = f"{guesses[0]:g} percent" if len(guesses) == 1 else f"{guesses[0]:g} to {guesses[-1]:g} percent, by task"
        yield f"† no better or worse than guessing ({span}) as far as the interval tells"
    for key, words in (
        ("truncated", "sequences were longer than the model's context and lost their beginning"),
        ("too_long", "questions left no room for a response and count as wrong"),
        ("unjudged", "answers got no rating and count neither way"),
    ):
        counts = [f"{task} ({model}) {entry[key]}" for task, model, entry in entries if entry.get(key)]
        if counts:
            yield f"{_sum(entries, key)} {words}: {', '.join(counts)}"


def _sum(entries: Sequence[tuple[str, str, Mapping[str, Any]]], key: str) -> int:
    return sum(int(entry.get(key, 0)) for _, _, entry in entries)
