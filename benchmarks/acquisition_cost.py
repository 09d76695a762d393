"""What a batch costs to choose: 32 of N candidates with 512 features, on one core.

    python benchmarks/acquisition_cost.py       about a minute; --sizes 1024 4096 for a quick look

Sizes and methods take turns, so that what else the machine does falls on all of them; medians. The cost must grow no
faster than the number of candidates.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from provenance import RESULTS, from_root, provenance

from trlhf.files import write_json
from trlhf.targeting.acquisition import d_optimal_batch, query_information, v_optimal_batch
from trlhf.targeting.targets import target_matrix

MARK_SECONDS = 2.0  # for MARK_SIZE candidates
MARK_SIZE = 4096
ONE_CORE = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
SIZES = (1024, 4096, 16384, 65536)
FEATURES, BATCH, PER_PROMPT = 512, 32, 4  # candidates a prompt


def problem(size: int) -> dict[str, Any]:
    """Return random candidates with a posterior that some labels have shaped already."""
    rng = np.random.default_rng(size)
    features = rng.normal(size=(size, FEATURES)) / np.sqrt(np.arange(1, FEATURES + 1))
    prompts = np.arange(size) // PER_PROMPT
    seen = rng.normal(size=(200, FEATURES)) / 4
    return {
        "queries": features - features.mean(0),
        "information": query_information(rng.uniform(0.05, 0.95, size), 0.05),
        "covariance": np.linalg.inv(np.eye(FEATURES) + seen.T @ seen),
        "target": target_matrix(features, prompts, rng.integers(1, 5, size), rng.uniform(size=size // PER_PROMPT)),
        "costs": np.ones(size),
        "groups": prompts,
    }


def measure(sizes: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Return the seconds of every choice, by method and size."""
    seconds: dict[str, dict[int, list[float]]] = {
        name: {size: [] for size in sizes} for name in ("v_optimal", "d_optimal")
    }
    for repeat in range(repeats + 1):
        for size in sizes:
            given = problem(size)
            untargeted = {name: value for name, value in given.items() if name != "target"}
            for name, choose, arguments in (
                ("v_optimal", v_optimal_batch, given),
                ("d_optimal", d_optimal_batch, untargeted),
            ):
                start = time.perf_counter()
                batch = choose(**arguments, count=BATCH)
                passed = time.perf_counter() - start
                assert len(batch.picks) == BATCH
                if repeat:  # the first turn warms caches and the allocator
                    seconds[name][size].append(passed)
        print(f"turn {repeat} of {repeats}", flush=True)
    return {
        name: {
            str(size): {
                "median_seconds": statistics.median(times),
                "least_seconds": min(times),
                "most_seconds": max(times),
                "to_linear": statistics.median(times) / size * sizes[0] / statistics.median(by_size[sizes[0]]),
            }
            for size, times in by_size.items()
        }
        for name, by_size in seconds.items()
    }


def table(results: dict[str, Any]) -> str:
    """Return the results as a markdown table."""
    lines = ["| candidates | method | seconds, median [least, most] | to linear |", "| --- | --- | --- | --- |"]
    for name, by_size in results["seconds"].items():
        for size, row in by_size.items():
            spread = f"{row['median_seconds']:.3f} [{row['least_seconds']:.3f}, {row['most_seconds']:.3f}]"
            lines.append(f"| {int(size):,} | {name} | {spread} | {row['to_linear']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of candidates, ascending")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns")
    parser.add_argument("--output", type=Path, default=RESULTS / "acquisition_cost.json")
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ONE_CORE.items()):  # BLAS has read them already
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ONE_CORE})
    results = {
        **provenance(),
        "features": FEATURES,
        "batch": BATCH,
        "candidates_per_prompt": PER_PROMPT,
        "repeats": arguments.repeats,
        "mark": {"size": MARK_SIZE, "seconds": MARK_SECONDS},
        "seconds": measure(tuple(arguments.sizes), arguments.repeats),
    }
    write_json(arguments.output, results)
    print(f"\n{table(results)}\n\nto linear: time a candidate over that of the smallest size; 1 is linear")
    timed = results["seconds"]["v_optimal"].get(str(MARK_SIZE))
    if timed:
        met = "met" if timed["median_seconds"] <= MARK_SECONDS else "missed"
        print(f"mark: {MARK_SIZE:,} candidates in {MARK_SECONDS:g} s: {met} ({timed['median_seconds']:.2f} s)")
    print(f"written to {from_root(arguments.output)}")


if __name__ == "__main__":
    main()
