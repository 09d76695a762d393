"""Two processes against one, at one thread each: how much faster every stage is, and whether it ends the same.

    python benchmarks/processes.py                       three rounds of one process and of two (10 minutes)
    python benchmarks/processes.py --quick --repeats 1   the same on very small sizes, whose times say nothing
    python benchmarks/processes.py -- rl=dpo             another configuration

Runs of one and of two processes alternate, so that both meet the same machine; every run is `python -m trlhf` or
`torchrun --nproc_per_node 2 -m trlhf` with one SFT epoch and one round, in a folder of its own. What is compared is
tokens a second in the steps of SFT and RL (the first step of each is warming up), seconds of whole stages, and of the
whole process with its start. The mark holds for the mean over SFT and RL of the default's ratios; `batch` is
`rl.draws=batch`, where processes share whole batches, `stream` the default, where they share each batch's rows
(`--draws stream batch` measures both).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from kill import QUICK
from provenance import RESULTS, ROOT, from_root, provenance
from same_end import unlike
from strike import STAGES

from trlhf.files import read_json, read_jsonl, write_json

MARK = 1.7
NOISE = 1e-3
PROCESSES = (1, 2)
DRAWS = ("stream", "batch")
SIZES = ("sft.epochs=1", "rl.rounds=1", "hardware.threads=1", "hardware.device=cpu")
SPEEDS = ("sft", "rl")


def run(folder: Path, processes: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Do one run from nothing and return what it took."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*(launcher if processes > 1 else ()), "-m", "trlhf", *overrides, f"run.dir={folder}"]
    load, begun = os.getloadavg()[0], time.monotonic()
    with folder.with_name(f"{folder.name}.txt").open("wb") as text:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=text, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        sys.exit(f"{folder}: ended with {done.returncode}; see {folder}.txt")
    summary = read_json(folder / "summary.json")
    return {
        "load_average": load,
        "seconds": {"process": round(time.monotonic() - begun, 1), **summary["seconds"]},
        "tokens_per_second": {stage: speed(read_jsonl(folder / stage / "metrics.jsonl")) for stage in SPEEDS},
        "accuracy": {name: value["value"] for name, value in summary["accuracy"].items()},
        "reward": [line["reward"] for line in read_jsonl(folder / "rl" / "metrics.jsonl")],
    }


def speed(lines: Sequence[Mapping[str, float]]) -> float:
    """Return the tokens of all steps but the first over their seconds."""
    later = [line for line in lines if "tokens_per_second" in line][1:]
    return round(
        sum(line["tokens_per_second"] * line["seconds"] for line in later) / sum(line["seconds"] for line in later), 1
    )


def compare(one: Mapping[str, Any], two: Mapping[str, Any], differences: Mapping[str, str]) -> dict[str, Any]:
    """Return how many times faster the second is, and what else differs."""
    ratios = {stage: two["tokens_per_second"][stage] / one["tokens_per_second"][stage] for stage in SPEEDS}
    whole = {name: one["seconds"][name] / two["seconds"][name] for name in ("process", *STAGES)}
    return {
        "faster_steps": {name: round(value, 3) for name, value in ratios.items()},
        "faster": {name: round(value, 3) for name, value in whole.items()},
        "largest_reward_difference": max(abs(a - b) for a, b in zip(one["reward"], two["reward"], strict=True)),
        "same_accuracy": one["accuracy"] == two["accuracy"],
        "differences": {name: text for name, text in differences.items() if text},
    }


def describe(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, standard error and number."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": round(mean(values), 3), "standard_error": error and round(error, 3), "n": len(values)}


def summarise(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return, by kind of draws, how many times faster two processes were."""
    found: dict[str, Any] = {}
    for draws in dict.fromkeys(pair["draws"] for pair in pairs):
        own = [pair["compared"] for pair in pairs if pair["draws"] == draws]
        steps = {name: describe([pair["faster_steps"][name] for pair in own]) for name in SPEEDS}
        whole = {name: describe([pair["faster"][name] for pair in own]) for name in own[0]["faster"]}
        same = all(pair["same_accuracy"] and not pair["differences"] for pair in own)
        found[draws] = {"faster_steps": steps, "faster": whole, "same_end": same}
        found[draws]["passed"] = mean(steps[name]["mean"] for name in SPEEDS) >= MARK
    return found


def table(summary: Mapping[str, Any]) -> str:
    """Return the summary as a markdown table."""
    names = [*(f"{name} steps" for name in SPEEDS), *(f"stage {name}" for name in STAGES), "whole process"]
    lines = [f"| rl.draws | {' | '.join(names)} | same end |", "| --- |" + " ---: |" * len(names) + " --- |"]
    for draws, found in summary.items():
        values = [found["faster_steps"][name]["mean"] for name in SPEEDS]
        values += [found["faster"][name]["mean"] for name in (*STAGES, "process")]
        cells = " | ".join(f"{value:.2f}" for value in values)
        lines.append(f"| {draws} | {cells} | {'yes' if found['same_end'] else 'no'} |")
    return "\n".join(lines)


def main() -> int:
    """Parse the command line, measure, write the results; 1 when the mark is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--draws", nargs="+", default=["stream"], choices=DRAWS, help="more than the default")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "processes")
    parser.add_argument("--output", type=Path, default=RESULTS / "processes.json")
    parser.add_argument("overrides", nargs="*", help="for every run, after --")
    arguments = parser.parse_args()
    common = [*(QUICK if arguments.quick else ()), *SIZES, *arguments.overrides]
    results: dict[str, Any] = {**provenance(), "mark": f"mean of the steps of SFT and RL >= {MARK} x one process"}
    results |= {"overrides": common, "pairs": []}
    for number in range(arguments.repeats):
        for draws in arguments.draws:
            folder, found = arguments.folder.resolve() / f"{draws}-{number}", {}
            for processes in PROCESSES if number % 2 == 0 else PROCESSES[::-1]:
                print(f"round {number + 1}, rl.draws={draws}, processes: {processes} …", flush=True)
                found[processes] = run(folder / str(processes), processes, [*common, f"rl.draws={draws}"])
            differences = unlike(folder / "1", folder / "2", NOISE)
            pair = {
                "draws": draws,
                "one": found[1],
                "two": found[2],
                "compared": compare(found[1], found[2], differences),
            }
            results["pairs"].append(pair)
            results["summary"] = summarise(results["pairs"])
            write_json(arguments.output, results)
    print(f"\n{table(results['summary'])}\n\nwritten to {from_root(arguments.output)}")
    return 0 if all(found["passed"] for found in results["summary"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
