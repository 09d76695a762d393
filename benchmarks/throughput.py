"""Speed side by side with peers, in one run: SFT, RL, DPO, evaluation, rollouts; scaling, and the machine's limits.

    python benchmarks/throughput.py                          the CPU table, both shapes
    python benchmarks/throughput.py --only sft --models 25m  a part of it
    python benchmarks/throughput.py hardware=gpu model=mistral-7b weights=random      7B shapes on an NVIDIA card
    python benchmarks/throughput.py --quick                  a smoke test; its figures mean nothing

Arms take turns and medians are compared, so that a busy machine slows all of them. Every comparison first makes sure
that both sides do the same (the same losses, the same answers). What is measured already, by the same command and
commit, is not measured again: delete the results or give ``--fresh``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from provenance import RESULTS, ROOT, commit, from_root, provenance

from trlhf.files import write_json

SUBJECTS = {
    "sft": ("throughput_sft", "measure"),
    "rl": ("throughput_rl", "measure_rl"),
    "dpo": ("throughput_dpo", "measure_dpo"),
    "eval": ("throughput_rollouts", "measure_evaluation"),
    "rollouts": ("throughput_rollouts", "measure_rollouts"),
    "scaling": ("throughput_scaling", "measure_scaling"),
    "limit": ("throughput_limit", "measure_limit"),
    "engines": ("throughput_engines", "measure_engines"),
}
BEGIN, END = "<!-- the tables, written by benchmarks/throughput.py -->", "<!-- end of the tables -->"
TABLE = [name for name in SUBJECTS if name != "engines"]  # which is measured where it is asked for
MODELS, LARGE = ("micro", "25m"), ("mistral-7b",)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the command line's values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SUBJECTS), default=TABLE, help="subjects")
    parser.add_argument("--models", nargs="+", choices=(*MODELS, *LARGE), default=None, help="shapes")
    parser.add_argument("--hardware", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--weights", choices=("random",), default="random", help="nothing is downloaded")
    parser.add_argument("--repeats", type=int, default=3, help="runs of every arm")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--fresh", action="store_true", help="measure again what is measured already")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "throughput")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args([word for argument in arguments for word in as_option(argument)])
    options.models = options.models or list(LARGE if options.hardware == "gpu" else MODELS)
    if (options.hardware == "gpu") != (set(options.models) <= set(LARGE)):
        parser.error(f"on hardware=gpu the models are {', '.join(LARGE)}, else {', '.join(MODELS)}")
    return options


def as_option(argument: str) -> list[str]:
    """Return ``key=value``, as `trlhf` itself takes it, as an option."""
    key, separator, value = argument.partition("=")
    if argument.startswith("-") or not separator or "/" in key:
        return [argument]
    return ["--" + {"model": "models"}.get(key, key), value]


def refuse_without_card(options: argparse.Namespace) -> None:
    """End where a card is asked for and none is there; a smoke test goes through the same code on the CPU."""
    import torch

    if options.hardware == "gpu" and not options.quick and not torch.cuda.is_available():
        sys.exit(
            "hardware=gpu: torch finds no CUDA device here; run this on a machine with an NVIDIA card, or add --quick, "
            "which goes through the same code on the CPU with a tiny shape"
        )


def prepare() -> None:
    """Do to torch what the command line does: freed memory is kept, by peers too."""
    import logging

    from trlhf.allocator import keep_freed_memory
    from trlhf.console import quiet_libraries

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    quiet_libraries()
    keep_freed_memory()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def known(path: Path, key: dict[str, Any]) -> dict[str, Any]:
    """Return the cells that the same code and sizes have measured."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    same = found.get("key") == key and not key["commit"].endswith("-dirty")
    return dict(found["cells"]) if same else {}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every cell that is asked for, writing the results after each."""
    from throughput_setting import Setting

    gpu = options.hardware == "gpu"
    name = "throughput_gpu" if gpu else "throughput"
    output = options.output or RESULTS / f"{name}{'_quick' if options.quick else ''}.json"
    key = {"commit": commit(), "repeats": options.repeats, "quick": options.quick}
    results = {**provenance(), "key": key, "cells": {} if options.fresh else known(output, key)}
    if gpu:
        run_gpu(options, results, output)
    for model in () if gpu else options.models:
        repeats = options.repeats if model == "micro" else max(1, options.repeats - 1)  # a large one's runs are long
        setting = Setting(model=model, repeats=repeats, quick=options.quick, folder=options.folder)
        for subject in options.only:
            name = f"{subject}, {model}"
            if name in results["cells"]:
                continue
            print(f"{name} …", flush=True)
            module, function = SUBJECTS[subject]
            begun, load = time.monotonic(), os.getloadavg()[0]
            cell = getattr(importlib.import_module(module), function)(setting)
            if cell is None:
                continue
            seconds = round(time.monotonic() - begun, 1)
            results["cells"][name] = cell | {"took_s": seconds, "load": [round(load, 1), round(os.getloadavg()[0], 1)]}
            write_json(output, results)
    print(f"\n{table(results['cells'])}\n\nwritten to {from_root(output)}")
    return results


def run_gpu(options: argparse.Namespace, results: dict[str, Any], output: Path) -> None:
    """Measure the cells of `throughput_gpu`; they stay on the card's machine together, so all are measured."""
    import torch
    from throughput_gpu import measure_gpu
    from throughput_setting import Setting

    card = torch.cuda.is_available()
    results["hardware"]["gpu"] = torch.cuda.get_device_name() if card else "none: a smoke test on the CPU"
    for model in options.models:
        setting = Setting(
            model="tiny" if options.quick else model, device="cuda" if card else "cpu", repeats=options.repeats,
            quick=options.quick, folder=options.folder,
        )  # fmt: skip
        for name, cell in measure_gpu(setting, results["cells"]):
            print(f"{name}, {setting.model}", flush=True)
            results["cells"][f"{name}, {setting.model}"] = cell
            write_json(output, results)


def table(cells: dict[str, Any]) -> str:
    """Return the cells as markdown tables: against peers, how ours grows, and how near the machine's limits it is."""
    compared = {name: cell for name, cell in cells.items() if "arms" in cell}
    growing = [line for name, cell in cells.items() if "rows" in cell for line in grown(name, cell)]
    limited = [line for name, cell in cells.items() if "limits" in cell for line in limits(name, cell)]
    parts = [side_by_side(compared)] if compared else []
    if growing:
        heads = ["| series | size | time | over linear | peak memory |", "| --- |" + " ---: |" * 4]
        parts.append("\n".join([*heads, *growing]))
    if limited:
        heads = ["| work | rate | of the matrix-product peak | of the memory bandwidth |", "| --- |" + " ---: |" * 3]
        peaks = [
            f"\n{name}: peaks measured {cell['peak_gflops']:.0f} GFLOP/s, {cell['bandwidth_gb']:.1f} GB/s"
            for name, cell in cells.items()
            if "limits" in cell
        ]
        parts.append("\n".join([*heads, *limited, *peaks]))
    return "\n\n".join(parts)


def grown(name: str, cell: dict[str, Any]) -> list[str]:
    """Return the lines of a cell of `throughput_scaling`: series, size, time, growth, memory."""
    return [
        f"| {name}: {row['series']} | {row['size']:,} | {row['seconds']:.4g} s | "
        f"{row['growth']:.2f} | {row['peak_mb']:.0f} MB |"
        for row in cell["rows"]
    ]


def limits(name: str, cell: dict[str, Any]) -> list[str]:
    """Return the lines of a cell of `throughput_limit`: work, rate, and its fractions of the peaks."""
    return [
        f"| {name}: {row['what']} | {row['per_second']:.4g} tokens/s | {row['of_flops']:.0%} | "
        f"{format(row['of_bandwidth'], '.0%') if 'of_bandwidth' in row else ''} |"
        for row in cell["limits"]
    ]


def side_by_side(cells: dict[str, Any]) -> str:
    """Return each arm's rate, and how many times as fast ours is."""
    lines = ["| | arm | rate | trlhf is faster by | by CPU time | mark | peak memory | of the limit |"]
    lines.append("| --- | --- |" + " ---: |" * 6)
    for name, cell in cells.items():
        if "skipped" in cell:
            lines.append(f"| {name} | {cell['skipped']} | | | | | | |")
        for arm, found in cell["arms"].items():
            times = [
                f"{cell[kind][arm]:.2f}" if arm in cell[kind] else "" for kind in ("ratios", "ratios_cpu", "marks")
            ]
            rate = f"{found['per_second']:.4g} {cell['unit']}"
            limit = f"{found['of_limit']:.0%}" if "of_limit" in found else ""
            lines.append(f"| {name} | {arm} | {rate} | {' | '.join(times)} | {found['peak_mb']:.0f} MB | {limit} |")
    return "\n".join(lines)


def missed(cells: dict[str, Any]) -> list[str]:
    """Return the marks that are not reached."""
    found = []
    for name, cell in cells.items():
        ratios, ours = cell.get("ratios", {}), cell.get("arms", {}).get("trlhf", {})
        for peer, mark in cell.get("marks", {}).items():
            if ratios.get(peer, mark) < mark:
                found.append(f"{name}: {ratios[peer]:.2f} times {peer}, mark {mark}")
        found += [f"{name}: {what} is worse than linear" for what in cell.get("worse_than_linear", ())]
        if ours.get("of_limit", 1.0) < cell.get("limit_mark", 0.0):
            found.append(f"{name}: {ours['of_limit']:.0%} of the limit, mark {cell['limit_mark']:.0%}")
        if ours.get("peak_mb", 0.0) * 1e6 > cell.get("gib_mark", float("inf")) * 2**30:
            found.append(f"{name}: {ours['peak_mb'] * 1e6 / 2**30:.1f} GiB, mark {cell['gib_mark']}")
    return found


def write_docs(results: dict[str, Any], path: Path = ROOT / "docs" / "performance.md") -> None:
    """Put the tables into the document, between its marks, with where they come from."""
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{of_docs(results)}\n\n{END}{after}", encoding="utf-8")


def of_docs(results: dict[str, Any]) -> str:
    """Return what the document says of some results: command, commit, machine, load, tables."""
    machine = results["hardware"]
    loads = [load for cell in results["cells"].values() for load in cell.get("load", ())]
    where = f"{machine['cpu']}, {machine['threads']} thread, load {min(loads):g} to {max(loads):g}"
    return f"`{results['command']}`, commit {results['commit']}, {where}:\n\n{table(results['cells'])}"


def main() -> int:
    """Measure; 1 where a mark is missed, except in a smoke test."""
    options = parse(sys.argv[1:])
    refuse_without_card(options)
    prepare()
    results = run(options)
    if not (options.quick or options.output or options.hardware == "gpu"):
        write_docs(results)
    misses = missed(results["cells"])
    for line in misses:
        print(line)
    return 1 if misses and not options.quick else 0


if __name__ == "__main__":
    sys.exit(main())
