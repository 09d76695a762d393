"""The estimate of memory and time that `dry_run=true` prints, against what stages really take.

    python benchmarks/estimate.py               every cell, each stage in a process of its own; an hour on two cores
    python benchmarks/estimate.py --cells embedded larger_lora

On a CPU a peak is the resident memory above what the process held when all libraries were loaded and nothing else
(Linux: VmHWM, reset through /proc/self/clear_refs); on a GPU it is torch.cuda.max_memory_allocated, and the estimate's
part `other`, which is the C library's, counts nothing there. The mark: every ratio of estimate to measured peak within
0.8 and 1.25. How long responses will be nobody knows before: the estimate is the one that a run itself prints.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memory import _resident, larger_base
from provenance import RESULTS, ROOT, from_root, provenance

from trlhf.files import write_json

LOW, HIGH = 0.8, 1.25
SMALL = (
    *("data.sft_prompts=96", "sft.epochs=1", "data.test_prompts=128", "reward.labels=60", "targeting.budget=90"),
    *("rl.rounds=1", "rl.steps_per_round=2", "targeting.candidates=32", "rl.value_warmup_steps=1"),
)
LARGER = (
    *("data=file", "sft.epochs=1", "rl.rounds=1", "rl.steps_per_round=1", "rl.value_warmup_steps=0", "rl.epochs=2"),
    *("rl.max_new_tokens=48", "evaluation.max_new_tokens=48", "rl.prompts_per_step=8", "rl.samples_per_prompt=4"),
    *("rl.minibatch_size=16", "rl.rollout_batch_size=32", "evaluation.batch_size=32", "targeting.candidates=16"),
    *("targeting.samples_per_prompt=2", "targeting.budget=10", "rl.unverified_share=0.5", "reward.epochs=1"),
    "rl.anchor_coef=0",  # a random model masters nothing that could be an anchor
)
LORA = ("model.lora.enabled=true", "reward.finetune=lora", "reward.epochs=1")
EIGHT = ("sft.microbatch_size=8", "rl.microbatch_size=8", "reward.microbatch_size=4")
CELLS: dict[str, tuple[str, tuple[str, ...]]] = {  # name → model, overrides
    "embedded": ("micro", SMALL),
    "embedded_dpo": ("micro", (*SMALL, "rl=dpo")),
    "embedded_micro4": ("micro", (*SMALL, "sft.microbatch_size=4", "rl.microbatch_size=4")),
    "embedded_lora": ("micro", (*SMALL, *LORA, "rl.advantage=gae")),
    "embedded_nf4": ("micro", (*SMALL, *LORA, "model.quantization=nf4")),
    "larger": ("larger", (*LARGER, *EIGHT)),
    "larger_micro2": ("larger", (*LARGER, "sft.microbatch_size=2", "rl.microbatch_size=4")),
    "larger_lora": ("larger", (*LARGER, *LORA, *EIGHT, "rl.advantage=gae")),
    "larger_checkpointed": ("larger", (*LARGER, *LORA, *EIGHT, "model.gradient_checkpointing=true")),
    "larger_nf4": ("larger", (*LARGER, *LORA, *EIGHT, "model.quantization=nf4", "model.dtype=bfloat16")),
}
STAGES = ("sft", "reward", "rl", "eval")


def world_files(folder: Path) -> list[str]:
    """Write some of the embedded world, with labels on right and wrong responses, and return the overrides to read it.

    A random model answers nothing that a label could be asked about, so the labels come with the data.
    """
    from trlhf.files import write_jsonl
    from trlhf.micro.world import generate

    folder.mkdir(parents=True, exist_ok=True)
    pool = [item for item in generate("pool", 96) if item.answer is not None][:64]
    write_jsonl(folder / "sft.jsonl", ({"messages": item.demonstration.messages} for item in generate("train", 32)))
    for name, items in (("pool", pool), ("test", generate("test", 32))):
        rows = ({"messages": item.prompt.messages, "answer": item.answer} for item in items if item.answer is not None)
        write_jsonl(folder / f"{name}.jsonl", rows)
    pairs = zip(pool, pool[1:] + pool[:1], strict=True)
    labels = [
        {"prompt": item.prompt.messages[-1]["content"], "response": text, "label": text == item.response}
        for item, other in pairs
        for text in (item.response, other.response)
    ]
    write_jsonl(folder / "labels.jsonl", labels)
    return [f"data.{name}={folder / name}.jsonl" for name in ("sft", "pool", "test", "labels")]


def one(overrides: Sequence[str]) -> None:
    """Load every library, note what that takes, run, and print peak, estimate and seconds."""
    import time

    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import trl.trainer.sft_trainer  # noqa: F401

    import trlhf
    import trlhf.reward.train
    import trlhf.rl.train
    from trlhf.allocator import keep_freed_memory

    keep_freed_memory()
    torch.ones(64, 64).matmul(torch.ones(64, 64))
    before, begun = _resident("VmRSS"), time.monotonic()
    Path("/proc/self/clear_refs").write_text("5")
    trlhf.run(overrides)
    found: dict[str, Any] = {"seconds": round(time.monotonic() - begun, 1), "libraries_mb": before}
    if torch.cuda.is_available():
        found |= {"device": torch.cuda.get_device_name(), "peak_mb": round(torch.cuda.max_memory_allocated() / 1e6, 1)}
    else:
        found |= {"device": "cpu", "peak_mb": round(_resident("VmHWM") - before, 1)}
    print("\n" + json.dumps(found))


def measure(overrides: Sequence[str]) -> dict[str, Any]:
    """Run one stage in a fresh process and return what it took."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", *overrides],
        cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(overrides)}: ended with {done.returncode}\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def estimated(overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return what the plan of these overrides says of each stage: phase and parts of its peak, in megabytes."""
    from trlhf.compose import compose
    from trlhf.estimate.measure import read_lengths
    from trlhf.estimate.memory import peaks
    from trlhf.estimate.stages import phases_of
    from trlhf.plan import job_of

    (config,) = compose([*overrides, "dry_run=true"]).configs
    job = job_of(config, read_lengths(config))
    assert job is not None
    return {
        stage: {"phase": phase.name, "parts_mb": {name: round(size / 1e6, 1) for name, size in phase.parts.items()}}
        for stage, phase in peaks(phases_of(job)).items()
    }


def cell(name: str, folder: Path) -> dict[str, Any]:
    """Measure the four stages of a cell, one after another in one run directory."""
    model, overrides = CELLS[name]
    arguments = [*overrides]
    if model == "larger":
        arguments += [f"model.name={larger_base(folder.parent / 'base')}", *world_files(folder.parent / "world")]
    expected = estimated(arguments)
    result: dict[str, Any] = {}
    for stage in STAGES:
        found = measure([f"stage={stage}", f"run.dir={folder}", *arguments])
        total = sum(expected[stage]["parts_mb"].values())
        row = {"estimate_mb": round(total, 1), **found, "ratio": round(total / found["peak_mb"], 3), **expected[stage]}
        result[stage] = row | {"passed": LOW <= row["ratio"] <= HIGH}
        print(f"{name} {stage}: {row['estimate_mb']} / {row['peak_mb']} = {row['ratio']}", flush=True)
    return result


def table(results: dict[str, Any]) -> str:
    """Return the results as a markdown table."""
    lines = [
        "| cell | stage | largest phase | estimate | measured | ratio |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for name, stages in results["cells"].items():
        for stage, row in stages.items():
            size = f"{row['estimate_mb']:.0f} MB | {row['peak_mb']:.0f} MB | {row['ratio']:.2f}"
            lines.append(f"| {name} | {stage} | {row['phase']} | {size}{'' if row['passed'] else ' ✗'} |")
    return "\n".join(lines)


def main() -> int:
    """Parse the command line, measure, write the results; 1 when the mark is missed."""
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "estimate")
    parser.add_argument("--output", type=Path, default=RESULTS / "estimate.json")
    arguments = parser.parse_args()
    results: dict[str, Any] = {**provenance(), "mark": f"estimate / measured within {LOW} and {HIGH}", "cells": {}}
    for name in arguments.cells:
        folder = arguments.folder.resolve() / name
        shutil.rmtree(folder, ignore_errors=True)
        results["cells"][name] = cell(name, folder)
        write_json(arguments.output, results)
    print(f"\n{table(results)}\n\nwritten to {from_root(arguments.output)}")
    return 0 if all(row["passed"] for stages in results["cells"].values() for row in stages.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
