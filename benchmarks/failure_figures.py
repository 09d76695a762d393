"""Small statistics of ``failure_modes.py``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from label_curves import Estimate, estimate, interval

Record = Mapping[str, Any]
DRAWS = 2000


def difference(first: Sequence[Record], second: Sequence[Record]) -> Estimate:
    """Return how much more accurate the first runs are on the reasoning prompts, paired by seed and prompt."""
    pairs = list(zip(first, second, strict=False))
    return estimate(np.array([np.array(a["correct"], float) - np.array(b["correct"], float) for a, b in pairs]))


def points(found: Mapping[str, Any]) -> str:
    """Return a difference of shares in points, with its interval."""
    return f"{100 * found['value']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


def share(runs: Sequence[Record], name: str) -> float:
    """Return the share of all verdicts of the rl stages that a count of ``junk`` is."""
    verdicts = sum(run["junk"]["verdicts"] for run in runs)
    return float(sum(run["junk"][name] for run in runs) / max(1, verdicts))


def standard_error(accuracy: float, n: int) -> float:
    """Return √(p(1-p)/n)."""
    return float(np.sqrt(accuracy * (1 - accuracy) / n))


def kept(run: Record, name: str, of: str) -> list[Any]:
    """Return a figure of the test prompts that ``of`` is about: taste, or right and wrong on reasoning prompts."""
    plain = ("colour", "opposite")
    rows = zip(run["kinds"], run[of], run[name], strict=True)
    return [value for kind, about, value in rows if about is not None and (of == "taste" or kind not in plain)]


def length_matched_gain(pairs: Sequence[tuple[Record, Record]], of: str, width: int) -> dict[str, Any]:
    """Return how much better responses are than before among those of equal length, over all kinds of prompt.

    Σ_b w_b·(mean after - mean before)_b / Σ_b w_b over bins b of a kind and ``width`` tokens, w_b the smaller number of
    responses. The interval is from resampling prompts.

    Args:
        pairs: figures of a seed before and after.
        of: ``taste`` or ``right``.
        width: of a bin, in tokens.
    """
    rows: list[tuple[tuple[str, int], float, tuple[str, int], float]] = []
    for before, after in pairs:
        columns = [(kept(x, "kinds", of), kept(x, "tokens", of), kept(x, of, of)) for x in (before, after)]
        for a, b in zip(zip(*columns[0], strict=True), zip(*columns[1], strict=True), strict=True):
            rows.append(((a[0], a[1] // width), float(a[2]), (b[0], b[1] // width), float(b[2])))
    rng = np.random.default_rng(0)
    drawn = np.array([_gain([rows[i] for i in rng.integers(len(rows), size=len(rows))]) for _ in range(DRAWS)])
    low, high = interval(drawn)
    return {"value": _gain(rows), "low": low, "high": high, "n": len(rows)}


def _gain(rows: Sequence[tuple[tuple[str, int], float, tuple[str, int], float]]) -> float:
    sums: defaultdict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0] * 4)
    for bin_before, before, bin_after, after in rows:
        for at, place, value in ((bin_before, 0, before), (bin_after, 2, after)):
            sums[at][place] += 1
            sums[at][place + 1] += value
    both = [x for x in sums.values() if x[0] and x[2]]
    total = sum(min(x[0], x[2]) for x in both)
    return sum(min(x[0], x[2]) * (x[3] / x[2] - x[1] / x[0]) for x in both) / total if total else 0.0
