"""The claim of the README, measured: ``python -m trlhf`` for several seeds, with PPO and with DPO, against fixed marks.

    python benchmarks/main_job.py                              3 seeds x ppo, dpo (half an hour on two idle cores)
    python benchmarks/main_job.py --rl ppo -- targeting=uniform
    python benchmarks/main_job.py --table                      the README's table again, from the results file

Each run is a process of its own, offline, in a folder named by the commit. Finished runs are not repeated, others start
again.
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

from provenance import RESULTS, ROOT, commit, from_root, provenance

from trlhf.files import read_json, write_json

GAIN, P_VALUE, LABELS, SECONDS, MEMORY_GB = 0.15, 0.01, 250, 300, 3.0
PLANS, OTHER_PLANS = 0.95, 0.05
MASTERED, KEPT = 0.90, 0.85  # a kind of prompt at or above the first after SFT must not end below the second
MARKS = {
    "gain": f"accuracy after rl at least {GAIN} above that after sft",
    "significant": f"McNemar's exact p < {P_VALUE}",
    "labels": f"at most {LABELS} labels, the reward stage's included",
    "seconds": f"at most {SECONDS} s from start to end of the process",
    "memory": f"peak resident memory at most {MEMORY_GB} GB",
    "plans": f"plans on at least {PLANS:.0%} of reasoning prompts and at most {OTHER_PLANS:.0%} of the others",
    "kept": f"no kind of prompt at {MASTERED} or more after sft ends under {KEPT}",
}


def measure(folder: Path, algorithm: str, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Do one run, or take it as it was done before, and return what it reached.

    Time and peak memory are those of one undisturbed process, so a run that did not end well starts from nothing.
    """
    run_dir, process_file = folder / f"{algorithm}-{seed}", folder / f"{algorithm}-{seed}.process.json"
    arguments = ["-m", "trlhf", f"rl={algorithm}", f"seed={seed}", f"run.dir={from_root(run_dir)}", *overrides]
    process = read_json(process_file) if process_file.exists() else None
    if process is not None and process["arguments"] != arguments:
        sys.exit(f"{process_file}: that run was made with other overrides; give another --folder")
    if process is None or process["status"]:
        shutil.rmtree(run_dir, ignore_errors=True)
        process = _start(arguments, folder / f"{algorithm}-{seed}.txt")
        write_json(process_file, process)
    record = {"algorithm": algorithm, "seed": seed, "command": f"python {' '.join(arguments)}", "process": process}
    if process["status"]:
        return record | {"failed": process["last_lines"], "passed": False}
    return judge(record | {"summary": read_json(run_dir / "summary.json")})


def _start(arguments: Sequence[str], output: Path) -> dict[str, Any]:
    """Run a process to its end; return its exit status, seconds, peak memory and the load that it met."""
    output.parent.mkdir(parents=True, exist_ok=True)
    load, start = os.getloadavg()[0], time.monotonic()
    with output.open("wb") as text:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            stdout=text,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        _, wait_status, usage = os.wait4(process.pid, 0)  # its own usage; RUSAGE_CHILDREN would be all runs' maximum
    process.returncode = os.waitstatus_to_exitcode(wait_status)
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "arguments": list(arguments),
        "status": process.returncode,
        "seconds": round(time.monotonic() - start, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_gb": round(usage.ru_maxrss * unit / 1e9, 3),
        "load_before": load,
        "last_lines": output.read_text(encoding="utf-8", errors="replace").splitlines()[-8:],
    }


def judge(record: dict[str, Any]) -> dict[str, Any]:
    """Add to a finished run its figures and which marks it meets."""
    summary, process = record.pop("summary"), record["process"]
    del process["last_lines"]
    accuracy = {name: entry["value"] for name, entry in summary["accuracy"].items()}
    test, plans = summary["paired"]["sft→rl"]["mcnemar"], summary["plans"]["rl"]
    before, after = summary["by_kind"]["sft"], summary["by_kind"]["rl"]
    lost = {
        kind: {"sft": entry["value"], "rl": after[kind]["value"], "n": entry["n"]}
        for kind, entry in before.items()
        if entry["value"] >= MASTERED and after[kind]["value"] < KEPT
    }
    figures = {
        "gain": accuracy["rl"] - accuracy["sft"],
        "labels": summary["labels"]["spent"],
        "seconds": process["seconds"],
        "peak_rss_gb": process["peak_rss_gb"],
        "lost_skills": lost,
    }
    marks = {
        "gain": figures["gain"] >= GAIN,
        "significant": test["p"] < P_VALUE and test["gained"] > test["lost"],
        "labels": figures["labels"] <= LABELS,
        "seconds": figures["seconds"] <= SECONDS,
        "memory": figures["peak_rss_gb"] <= MEMORY_GB,
        "plans": plans["reasoning"]["value"] >= PLANS and plans["other"]["value"] <= OTHER_PLANS,
        "kept": not lost,
    }
    taken = ("accuracy", "by_kind", "plans", "paired", "seconds", "demonstrations", "reward", "versions")
    stages = {("stage_seconds" if name == "seconds" else name): summary.get(name) for name in taken}
    return record | figures | stages | {"marks": marks, "passed": all(marks.values())}


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean over seeds with its 95% Student interval; no interval for a single seed."""
    from scipy.stats import t

    centre, n = mean(values), len(values)
    half = float(t.ppf(0.975, n - 1)) * stdev(values) / n**0.5 if n > 1 else None
    bounds = {"low": None, "high": None} if half is None else {"low": centre - half, "high": centre + half}
    return {"value": centre, **bounds, "n": n, "smallest": min(values)}


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means over seeds of each algorithm's finished runs."""
    means: dict[str, Any] = {}
    for algorithm in dict.fromkeys(run["algorithm"] for run in runs):
        done = [run for run in runs if run["algorithm"] == algorithm and "failed" not in run]
        if done:
            names = ("base", "sft", "rl")
            figures = {name: mean_interval([run["accuracy"][name]["value"] for run in done]) for name in names}
            figures |= {
                name: mean_interval([run[name] for run in done])
                for name in ("gain", "labels", "seconds", "peak_rss_gb")
            }
            means[algorithm] = figures
    return means


def table(results: Mapping[str, Any]) -> str:
    """Return every run as a row of a markdown table."""
    columns = ["rl", "seed", "base", "SFT", "RL [95%]", "gain", "McNemar p", "labels"]
    columns += ["plans: reasoning / other", "time", "memory", "marks"]
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 2)} --- |"]
    for run in results["runs"]:
        head = f"| {run['algorithm']} | {run['seed']} |"
        if "failed" in run:
            reason = run["failed"][-1] if run["failed"] else "no output"
            lines.append(f"{head}{' |' * 9} failed: {reason} |")
            continue
        accuracy, plans = run["accuracy"], run["plans"]["rl"]
        rl = accuracy["rl"]
        missed = [name for name, met in run["marks"].items() if not met]
        lines.append(
            f"{head} {accuracy['base']['value']:.1%} | {accuracy['sft']['value']:.1%} "
            f"| **{rl['value']:.1%}** [{rl['low']:.1%}, {rl['high']:.1%}] | {run['gain']:+.1%} "
            f"| {run['paired']['sft→rl']['mcnemar']['p']:.1g} | {run['labels']:g} "
            f"| {plans['reasoning']['value']:.0%} / {plans['other']['value']:.0%} | {run['seconds']:.0f} s "
            f"| {run['peak_rss_gb']:.2f} GB | {'all met' if not missed else 'missed: ' + ', '.join(missed)} |"
        )
    return "\n".join(lines)


def mean_table(results: Mapping[str, Any]) -> str:
    """Return the means over seeds as a markdown table: the README's."""
    columns = ["rl", "seeds", "base", "SFT", "RL", "gain [95% over seeds]", "smallest gain", "labels", "time", "memory"]
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    for algorithm, figures in results["means"].items():
        gain = figures["gain"]
        interval = "" if gain["low"] is None else f" [{gain['low']:+.1%}, {gain['high']:+.1%}]"
        stages = " | ".join(f"{figures[name]['value']:.1%}" for name in ("base", "sft", "rl"))
        lines.append(
            f"| {algorithm} | {gain['n']} | {stages} | {gain['value']:+.1%}{interval} | {gain['smallest']:+.1%} "
            f"| {figures['labels']['value']:g} | {figures['seconds']['value']:.0f} s "
            f"| {figures['peak_rss_gb']['value']:.2f} GB |"
        )
    return "\n".join(lines)


def main() -> int:
    """Parse the command line, do the runs, write the results; 1 when a mark is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rl", nargs="+", default=["ppo", "dpo"], choices=("ppo", "dpo"))
    parser.add_argument("--folder", type=Path, help="of the runs (default: runs/main_job/<commit>)")
    parser.add_argument("--output", type=Path, default=RESULTS / "main_job.json")
    parser.add_argument("--table", action="store_true", help="print the table of the results file, run nothing")
    parser.add_argument("overrides", nargs="*", help="further overrides of every run, after --")
    arguments = parser.parse_args()
    results: dict[str, Any]
    if arguments.table:
        results = read_json(arguments.output)
        print(f"{mean_table(results)}\n\n{table(results)}")
        return 0
    folder = (arguments.folder or ROOT / "runs" / "main_job" / commit()).resolve()
    results = {**provenance(), "seeds": arguments.seeds, "marks": MARKS, "runs": []}
    for algorithm in arguments.rl:
        for seed in arguments.seeds:
            print(f"rl={algorithm} seed={seed} …", flush=True)
            results["runs"].append(measure(folder, algorithm, seed, arguments.overrides))
            results["means"] = summarise(results["runs"])
            write_json(arguments.output, results)
    print(f"\n{mean_table(results)}\n\n{table(results)}\n\nwritten to {from_root(arguments.output)}")
    return 0 if all(run["passed"] for run in results["runs"]) else 1


if __name__ == "__main__":
    sys.exit(main())
