"""What the cells of ``label_efficiency.py`` come to: curves with bands, comparisons, tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
from jaxtyping import Float
from label_arms import ARMS, BOUND, FACTORIAL, FULL, SCRAMBLED, START, UNIFORM, Cell
from label_curves import (
    area_weights,
    estimate,
    factorial,
    holm,
    interval,
    labels_to_reach,
    resampled_means,
)
from numpy import ndarray

DIGITS = ("correct", "plain")  # of a cell: whether each answer is right
GAINS = (0.5, 0.8, 0.9)  # of the way from SFT to the upper bound
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """The finished cells of a grid.

    Attributes:
        cells: their figures.
        budgets: of the grid, rising; the area under a curve needs all of them.
    """

    cells: Mapping[Cell, Record]
    budgets: tuple[int, ...]

    def cell(self, arm: str, budget: int, seed: int) -> Record | None:
        """Return a cell's figures; an arm without a budget has one cell for every number of labels."""
        fixed = {"none": 0, "all": -1}.get(ARMS[arm].labels, budget)
        return self.cells.get(Cell(arm, fixed, seed))

    def seeds(self, arms: Sequence[str], budgets: Sequence[int] | None = None) -> list[int]:
        """Return the seeds of which every one of the arms has every one of the budgets."""
        wanted = [(arm, budget) for arm in arms for budget in (self.budgets if budgets is None else budgets)]
        return [
            seed
            for seed in sorted({cell.seed for cell in self.cells})
            if all(self.cell(arm, budget, seed) is not None for arm, budget in wanted)
        ]

    def correct(self, arm: str, seeds: Sequence[int], budgets: Sequence[int] | None = None) -> Float[ndarray, "B S I"]:
        """Return 1 for each right answer to a reasoning prompt."""
        chosen = self.budgets if budgets is None else budgets
        return np.array(
            [[(self.cell(arm, budget, seed) or {})["correct"] for seed in seeds] for budget in chosen], float
        )

    def areas(self, arm: str, seeds: Sequence[int]) -> Float[ndarray, "S I"]:
        """Return each test item's part in the area under accuracy against log₂ labels."""
        return np.tensordot(area_weights(self.budgets), self.correct(arm, seeds), 1)

    @property
    def arms(self) -> list[str]:
        """Return the arms with a finished cell."""
        return [arm for arm in ARMS if any(cell.arm == arm for cell in self.cells)]


def summarise(results: Results, draws: int) -> dict[str, Any]:
    """Return everything that the results file says beside its origin."""
    curves = {arm: curve(results, arm, draws) for arm in results.arms}
    uniform = best_uniform(results)
    return {
        "budgets": list(results.budgets),
        "arms": {arm: {"words": ARMS[arm].words, "overrides": list(ARMS[arm].overrides)} for arm in results.arms},
        "best_uniform": uniform,
        "primary": None if uniform is None else compare(results, FULL, uniform["arm"], draws),
        "rivals": rivals(results, draws),
        "factorial": two_by_two(results, draws),
        "real_or_scrambled": compare(results, FULL, SCRAMBLED, draws),
        "curves": curves,
        "labels_to_reach": {arm: reach(results, arm, draws) for arm in results.arms if _has_budget(arm)},
        "cells": [figures(record) for record in results.cells.values()],
    }


def curve(results: Results, arm: str, draws: int) -> dict[str, Any]:
    """Return an arm's mean accuracy with its band at each budget, over the seeds that have it; and its area."""
    points = []
    for budget in results.budgets if _has_budget(arm) else results.budgets[:1]:
        seeds = results.seeds([arm], [budget])
        if not seeds:
            continue
        records = [record for seed in seeds if (record := results.cell(arm, budget, seed)) is not None]
        found = estimate(results.correct(arm, seeds, [budget])[0], draws)
        points.append(
            {
                "budget": budget if _has_budget(arm) else None,
                "seeds": len(seeds),
                **{"value": found["value"], "low": found["low"], "high": found["high"]},
                "labels": mean(record["labels"]["spent"] for record in records),
                "plain": _mean([record["plain_accuracy"] for record in records]),
                "kept": _mean([_kept(results, record) for record in records]),
                "response_tokens": mean(record["response_tokens"] for record in records),
                "seconds": mean(record["seconds"] for record in records),
                "by_kind": {kind: mean(r["by_kind"][kind] for r in records) for kind in records[0]["by_kind"]},
            }
        )
    seeds = results.seeds([arm])
    return {"points": points, "area": dict(estimate(results.areas(arm, seeds), draws)) if seeds else None}


def _kept(results: Results, record: Record) -> float | None:
    """Return the share of what SFT answered right, plain or not, that is answered right still: what anchors are for."""
    before = results.cell(START, 0, record["seed"])
    if before is None:
        return None
    pairs = [pair for name in ("correct", "plain") for pair in zip(before[name], record[name], strict=True)]
    return _mean([float(now) for then, now in pairs if then])


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that exist; None where there is none."""
    found = [value for value in values if value is not None]
    return mean(found) if found else None


def best_uniform(results: Results) -> dict[str, Any] | None:
    """Return the uniform arm with the largest area, over the seeds that every finished one of them has."""
    finished = [arm for arm in UNIFORM if results.seeds([arm])]
    seeds = results.seeds(finished)
    if not finished or not seeds:
        return None
    areas = {arm: float(results.areas(arm, seeds).mean()) for arm in finished}
    return {
        "arm": max(areas, key=lambda arm: areas[arm]),
        "seeds": seeds,
        "areas": areas,
        "missing": [arm for arm in UNIFORM if arm not in finished],
        "note": "chosen by the data it is compared on, which favours it: the comparison is conservative",
    }


def compare(results: Results, first: str, second: str, draws: int) -> dict[str, Any] | None:
    """Return first minus second: the area under the curve, and accuracy at each budget; None without common seeds."""
    seeds = results.seeds([first, second])
    at = {}
    for budget in results.budgets:
        common = results.seeds([first, second], [budget])
        if common:
            difference = results.correct(first, common, [budget]) - results.correct(second, common, [budget])
            at[str(budget)] = {**estimate(difference[0], draws), "seeds": common}
    if not at:
        return None
    area = results.areas(first, seeds) - results.areas(second, seeds) if seeds else None
    return {
        **{"first": first, "second": second, "seeds": seeds},
        "area": None if area is None else dict(estimate(area, draws)),
        "area_items_crossed": None if area is None else _narrow(estimate(area, draws, crossed=True)),
        "accuracy": at,
    }


def rivals(results: Results, draws: int) -> dict[str, Any]:
    """Return the whole method against every other arm that is no reference, with Holm's adjusted p-values."""
    others = [arm for arm in results.arms if arm not in (FULL, START, BOUND, "base")]
    found = {arm: entry for arm in others if (entry := compare(results, FULL, arm, draws)) and entry["area"]}
    adjusted = holm([entry["area"]["p"] for entry in found.values()])
    return {arm: {**entry, "holm_p": p} for (arm, entry), p in zip(found.items(), adjusted, strict=True)}


def two_by_two(results: Results, draws: int) -> dict[str, Any] | None:
    """Return the main effects of acquisition and update on the area, and their interaction."""
    seeds = results.seeds(FACTORIAL)
    if not seeds:
        return None
    areas = [results.areas(arm, seeds) for arm in FACTORIAL]
    effects = factorial(*areas)
    names = {"first": "acquisition", "second": "update", "interaction": "interaction"}
    return {
        "seeds": seeds,
        "areas": {arm: float(area.mean()) for arm, area in zip(FACTORIAL, areas, strict=True)},
        **{names[name]: dict(estimate(effect, draws)) for name, effect in effects.items()},
    }


def reach(results: Results, arm: str, draws: int) -> dict[str, Any] | None:
    """Return with how many labels an arm's mean curve reaches each share of the gain from SFT to the upper bound."""
    seeds = results.seeds([arm, START, BOUND])
    if not seeds:
        return None
    budgets = results.budgets
    ends = [results.correct(name, seeds, budgets[:1]) for name in (START, BOUND)]
    values = np.concatenate([results.correct(arm, seeds), *ends])  # [B+2 S I]
    drawn, exact = resampled_means(values, draws), values.mean((1, 2))
    found: dict[str, Any] = {"seeds": seeds}
    for gain in GAINS:
        target = exact[-2] + gain * (exact[-1] - exact[-2])
        targets = drawn[-2] + gain * (drawn[-1] - drawn[-2])
        value = float(labels_to_reach(budgets, exact[:-2], target))
        low, high = interval(labels_to_reach(budgets, drawn[:-2].T, targets))
        entry = {name: _label_count(x, budgets) for name, x in (("value", value), ("low", low), ("high", high))}
        found[f"{gain:.0%}"] = {**entry, "accuracy": float(target)}
    return found


def _label_count(labels: float, budgets: Sequence[int]) -> str:
    """Return a number of labels as text, censored at both ends of the budgets."""
    if math.isinf(labels):
        return f">{budgets[-1]}"
    return f"<={budgets[0]}" if labels <= budgets[0] else f"{labels:.0f}"


def figures(record: Record) -> dict[str, Any]:
    """Return what the results file keeps of a cell: all but its overrides, with a digit for each answer."""
    kept = {name: value for name, value in record.items() if name != "overrides"}
    return kept | {name: "".join(str(int(right)) for right in record[name]) for name in DIGITS}


def record_of(figures: Record, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the cell whose `figures` these are."""
    return {**figures, **{name: [digit == "1" for digit in figures[name]] for name in DIGITS}, "overrides": overrides}


def _narrow(found: Mapping[str, Any]) -> dict[str, float]:
    return {name: found[name] for name in ("low", "high", "p")}


def _has_budget(arm: str) -> bool:
    return ARMS[arm].labels == "budget"


def tables(results: Mapping[str, Any]) -> str:
    """Return the results as markdown: every arm, the 2x2, and the sentence that the claim rests on."""
    budgets, gains = results["budgets"], [f"{gain:.0%}" for gain in GAINS]
    columns = ["arm", *(f"{b} labels" for b in budgets), "area [95%]", f"{FULL} minus it [95%]", "Holm p"]
    columns += [*(f"labels to {gain}" for gain in gains), "plain", "kept", "seeds"]
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    for arm, entry in results["curves"].items():
        lines.append(_row(arm, entry, results, gains))
    parts = ["\n".join(lines)]
    if results["factorial"]:
        effects = [f"{name} {_points(results['factorial'][name])}" for name in ("acquisition", "update", "interaction")]
        parts.append(f"2x2, points of area: {', '.join(effects)}.")
    scrambled = results["real_or_scrambled"]
    if scrambled and scrambled["area"]:
        parts.append(f"{FULL} minus {SCRAMBLED}: {_points(scrambled['area'])} points of area.")
    parts.append(primary_sentence(results))
    return "\n\n".join(parts)


def primary_sentence(results: Mapping[str, Any]) -> str:
    """Return the primary comparison in words."""
    primary, best = results["primary"], results["best_uniform"]
    if best is None or primary is None or primary["area"] is None:
        return "Primary comparison: not enough cells yet."
    area, missing = primary["area"], best["missing"]
    without = f" (without {', '.join(missing)}, which are not finished)" if missing else ""
    student = area["student"]
    shown = f"; Student's t over seeds [{100 * student[0]:+.1f}, {100 * student[1]:+.1f}]" if student else ""
    return (
        f"Primary: area of {FULL} minus that of the best uniform arm, {best['arm']}{without}: {_points(area)} points, "
        f"p = {area['p']:.2g}, {len(primary['seeds'])} seeds{shown}."
    )


def _row(arm: str, entry: Mapping[str, Any], results: Mapping[str, Any], gains: Sequence[str]) -> str:
    points = {point["budget"]: point for point in entry["points"]}
    if None in points:  # one cell for any number of labels
        label = f"{ARMS[arm].words} ({points[None]['labels']:.0f} labels)"
        accuracies = [f"{points[None]['value']:.1%}"] * len(results["budgets"])
    else:
        label = ARMS[arm].words
        accuracies = [f"{points[b]['value']:.1%}" if b in points else "" for b in results["budgets"]]
    area, rival = entry["area"], results["rivals"].get(arm)
    cells = [label, *accuracies]
    cells.append(f"{area['value']:.1%} [{area['low']:.1%}, {area['high']:.1%}]" if area else "")
    cells += [_points(rival["area"]), f"{rival['holm_p']:.2g}"] if rival else ["", ""]
    reached = results["labels_to_reach"].get(arm)
    cells += [f"{r['value']} [{r['low']}, {r['high']}]" for g in gains for r in [reached[g]]] if reached else [""] * 3
    last = entry["points"][-1]
    cells += [*("" if last[name] is None else f"{last[name]:.1%}" for name in ("plain", "kept")), f"{last['seeds']}"]
    return f"| {' | '.join(cells)} |"


def _points(found: Mapping[str, Any]) -> str:
    return f"{100 * found['value']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
