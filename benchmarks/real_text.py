"""Targeted against uniform verdicts on real text: the 5,276 marked solutions of GSM8K's test questions.

    python benchmarks/real_text.py --data FOLDER        about an hour on one core; --quick for a look
    TRLHF_SHARED_DATA=FOLDER python benchmarks/real_text.py     reads FOLDER/gsm8k

Every verdict is hidden until it is bought. Split by question; the area under the ROC curve on held-out questions by
number of verdicts, mean over splits, with the paired difference to uniform verdicts and its 95% bootstrap interval over
splits. All splits are of the same questions, so the intervals speak of these questions. A second start measures what
the results file lacks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from label_curves import area_weights
from numpy import ndarray
from provenance import RESULTS, ROOT, from_root, provenance
from real_text_data import POOLINGS, Solutions, read_solutions
from real_text_loop import ARMS, UNIFORM, Measure, Settings, agreement, curves, learn

from trlhf.evaluation.statistics import bootstrap_interval
from trlhf.files import read_json, write_json

METRICS = {
    "auc": "answer model, all solutions",
    "within": "answer model, within questions",
    "features_within": "its hidden states alone (w·φ), within questions",
    "heads_auc": "reward stage's heads, all solutions",
    "heads_within": "reward stage's heads, within questions",
}
QUICK_ARMS = (UNIFORM, "v_optimal")
QUICK = Settings(budgets=(16, 32), held_out=40, dimension=32)
QUICK_QUESTIONS = 100
Cells = dict[tuple[str, int], list[Measure]]

_solutions: Solutions | None = None  # what the processes forked from this one share


def estimate(values: Float[ndarray, " S"]) -> dict[str, Any]:
    """Return a mean over splits with its bootstrap interval, without the splits where it is not defined."""
    kept = values[np.isfinite(values)]
    if not len(kept):
        return {"value": None, "low": None, "high": None, "splits": 0}
    low, high = bootstrap_interval(kept)
    return {"value": float(kept.mean()), "low": low, "high": high, "splits": len(kept)}


def compare(cells: Mapping[tuple[str, int], Sequence[Measure]], budgets: Sequence[int]) -> dict[str, Any]:
    """Return for each metric and arm: its curve, the area under it, and both less uniform's on the same splits."""
    arms = [arm for arm in ARMS if any(name == arm for name, _ in cells)]
    found: dict[str, Any] = {}
    for metric in METRICS:
        by_arm = {arm: curves(cells, arm, metric) for arm in arms}
        measured = {arm: values for arm, values in by_arm.items() if np.isfinite(values).any()}
        for arm, values in measured.items():
            splits = sorted(seed for name, seed in cells if name == arm)
            shared = [seed for seed in splits if (UNIFORM, seed) in cells]
            own = values[[splits.index(seed) for seed in shared]]
            plain = curves(
                {key: cells[key] for key in cells if key[0] == UNIFORM and key[1] in shared}, UNIFORM, metric
            )
            columns = [n for n in range(len(budgets)) if np.isfinite(values[:, n]).any()]
            weights = area_weights([budgets[n] for n in columns])
            row: dict[str, Any] = {
                "budgets": [budgets[n] for n in columns],
                "curve": [estimate(values[:, n]) for n in columns],
                "area": estimate(values[:, columns] @ weights),
            }
            if arm != UNIFORM:
                less = own[:, columns] - plain[:, columns]
                row["less_uniform"] = [estimate(less[:, n]) for n in range(len(columns))]
                row["area_less_uniform"] = estimate(less @ weights)
            found.setdefault(metric, {})[arm] = row
    return found


def table(compared: Mapping[str, Any], metric: str) -> str:
    """Return one metric as a markdown table."""
    rows = compared[metric]
    budgets = next(iter(rows.values()))["budgets"]
    heads = ["arm", *map(str, budgets), "area", "area less uniform [95%]"]
    lines = [f"{METRICS[metric]}:", "", "| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for arm, row in rows.items():
        points = [f"{point['value']:.3f}" for point in row["curve"]]
        gain = row.get("area_less_uniform")
        words = f"{gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]" if gain else "-"
        lines.append(f"| {arm} | {' | '.join(points)} | {row['area']['value']:.3f} | {words} |")
    return "\n".join(lines)


def run_split(arms: Sequence[str], settings: Settings, seed: int) -> dict[str, list[Measure]]:
    """Measure some arms on one split."""
    torch.set_num_threads(1)
    assert _solutions is not None, "main reads them before it forks"
    return learn(_solutions, {arm: ARMS[arm] for arm in arms}, settings, seed)


def grid(
    cells: Cells, arms: Sequence[str], settings: Settings, seeds: Sequence[int], jobs: int, save: Callable[[], None]
) -> None:
    """Measure every arm on every split that is not among the cells yet; ``save`` is called after each split."""
    missing = {seed: [arm for arm in arms if (arm, seed) not in cells] for seed in seeds}
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        tasks = {pool.submit(run_split, left, settings, seed): seed for seed, left in missing.items() if left}
        for task in as_completed(tasks):
            cells |= {(arm, tasks[task]): rows for arm, rows in task.result().items()}
            print(f"split {tasks[task]} done", flush=True)
            save()


def finished(path: Path, same: Mapping[str, Any]) -> Cells:
    """Return the cells of a results file that was made with the same settings on the same solutions; else none."""
    kept = read_json(path) if path.exists() else {}
    if any(kept.get(name) != json.loads(json.dumps(value)) for name, value in same.items()):
        return {}
    return {(cell["arm"], cell["split"]): cell["rows"] for cell in kept["cells"]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print."""
    global _solutions
    shared = Path(os.environ.get("TRLHF_SHARED_DATA") or ROOT.parent / "shared" / "data")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=shared / "gsm8k", help="folder of GSM8K's files")
    parser.add_argument("--model", default="micro", help="backbone: micro, a folder, or a hub name")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "real_text", help="keeps the hidden states")
    parser.add_argument("--splits", type=int, default=20, help="of the questions, each a seed")
    parser.add_argument("--first-split", type=int, default=0, help="number of the first; other numbers to try things")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="default: all")
    parser.add_argument("--pooling", choices=list(POOLINGS), default=Settings().pooling)
    parser.add_argument("--dimension", type=int, default=Settings().dimension, help="principal components")
    parser.add_argument("--batch", type=int, default=Settings().batch, help="verdicts between two fits at most")
    parser.add_argument("--heads", type=int, default=4, help="of the reward stage's model; 0: leave it out")
    parser.add_argument("--jobs", type=int, default=1, help="processes at the same time")
    parser.add_argument("--quick", action="store_true", help="100 questions, two splits, two arms, 32 verdicts")
    parser.add_argument("--output", type=Path, default=RESULTS / "real_text.json")
    given = parser.parse_args(arguments)
    settings = Settings(
        pooling=given.pooling, dimension=given.dimension, batch=given.batch, heads=given.heads,
        heads_budgets=(32, 128, 512),
    )  # fmt: skip
    arms, splits = list(given.arms or ARMS), given.splits
    if given.quick:
        settings, arms, splits = replace(QUICK, pooling=given.pooling), list(given.arms or QUICK_ARMS), 2
    seeds = range(given.first_split, given.first_split + splits)
    results = provenance()
    _solutions, results["solutions"] = read_solutions(
        given.data, given.model, given.cache, QUICK_QUESTIONS if given.quick else 0
    )
    same = {"model": given.model, "settings": asdict(settings), "solutions": results["solutions"]}
    cells = finished(given.output, same)
    results |= same
    without = [agreement(_solutions, _solutions.split(settings.held_out, seed)[1]) for seed in seeds]
    results["agreement_alone"] = {
        metric: estimate(np.array([row[metric] for row in without], float)) for metric in ("auc", "within")
    }

    def save() -> None:
        results["compared"] = compare(cells, settings.budgets)
        results["cells"] = [{"arm": arm, "split": seed, "rows": rows} for (arm, seed), rows in cells.items()]
        write_json(given.output, results)

    grid(cells, arms, settings, seeds, given.jobs, save)
    save()
    alone = results["agreement_alone"]
    print(
        f"\nagreement alone, no verdict: {alone['auc']['value']:.3f}, within questions {alone['within']['value']:.3f}"
    )
    for metric in results["compared"]:
        print(f"\n{table(results['compared'], metric)}")
    print(f"\nwritten to {from_root(given.output)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
