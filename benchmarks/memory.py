"""Memory of PPO with four roles: adapters on one base, against copies, against training the base alone.

    python benchmarks/memory.py            the embedded default and a larger random Mistral; some minutes on two cores

Every figure is the peak resident memory of one stage in a process of its own, above what the process held when all
libraries were loaded and nothing else (Linux: VmHWM, reset through /proc/self/clear_refs). The stages before it are
done by other processes, and all measurements follow one another in one run.
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

from provenance import RESULTS, ROOT, from_root, provenance

from trlhf.files import write_json

MARK = 1.4  # PPO with adapters over training the base alone
RL = ["rl=ppo", "rl.advantage=gae", "rl.rounds=1", "rl.steps_per_round=2", "rl.value_warmup_steps=1"]
ADAPTERS = ["model.lora.enabled=true", "reward.finetune=lora"]
COPIES = ["reward.finetune=full"]
MICROBATCHES = {"default": [], "16": ["rl.microbatch_size=16"]}
SETTINGS = {
    "embedded": [],
    "larger": [
        *("data.sft_prompts=32", "sft.epochs=1", "reward.epochs=1", "rl.prompts_per_step=8", "rl.minibatch_size=16"),
        *("sft.microbatch_size=16", "rl.microbatch_size=16", "rl.rollout_batch_size=16", "targeting.candidates=8"),
        *("rl.samples_per_prompt=4", "targeting.samples_per_prompt=2", "rl.unverified_share=0.5"),
        *("rl.max_new_tokens=32", "reward.labels=24", "reward.samples_per_prompt=2", "reward.microbatch_size=4"),
    ],
}


def larger_base(folder: Path) -> Path:
    """Write a random Mistral of 24 million weights, with the tokenizer of the embedded base."""
    import torch
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    from trlhf.models import MICRO_BASE

    tokenizer = AutoTokenizer.from_pretrained(MICRO_BASE)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    MistralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_stage(overrides: Sequence[str]) -> dict[str, Any]:
    """Run a stage in a fresh process and return its memory above the libraries, in megabytes."""
    command = [sys.executable, __file__, "--one", *overrides]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(overrides)}: ended with {done.returncode}\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def one(overrides: Sequence[str]) -> None:
    """Load every library, note what that takes, run, and print the peak."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import trl.trainer.sft_trainer  # noqa: F401

    import trlhf
    import trlhf.rl.train
    from trlhf.allocator import keep_freed_memory

    keep_freed_memory()
    torch.ones(64, 64).matmul(torch.ones(64, 64))
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    trlhf.run(overrides)
    peak = _resident("VmHWM")
    print("\n" + json.dumps({"libraries_mb": before, "peak_mb": peak, "above_mb": round(peak - before, 1)}))


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    kilobytes = next(line for line in lines if line.startswith(name)).split()[1]
    return round(int(kilobytes) * 1024 / 1e6, 1)


def measure(size: str, folder: Path) -> dict[str, Any]:
    """Measure one model's training of the base alone, PPO with adapters, and PPO with copies."""
    common = [*SETTINGS[size]]
    if size == "larger":
        common.append(f"model.name={larger_base(folder / 'base')}")
    result: dict[str, Any] = {}
    for kind, overrides in (("copies", COPIES), ("adapters", ADAPTERS)):
        where = folder / kind
        for stage in ("sft", "reward"):
            print(f"{size}: {kind}, stage={stage} …", flush=True)
            result[f"{kind} {stage}"] = run_stage([f"stage={stage}", f"run.dir={where}", *common, *overrides])
        for name, microbatch in MICROBATCHES.items():
            print(f"{size}: {kind}, stage=rl, {name} …", flush=True)
            again = shutil.copytree(where, folder / f"{kind} {name}")
            arguments = [*common, *overrides, *RL, *microbatch]
            result[f"{kind} rl, {name}"] = run_stage(["stage=rl", f"run.dir={again}", *arguments])
    base = result["copies sft"]["above_mb"]  # full fine-tuning of the base alone
    ratios = {key: round(value["above_mb"] / base, 3) for key, value in result.items() if " rl" in key}
    passed = {name: ratios[f"adapters rl, {name}"] <= MARK for name in MICROBATCHES}
    return {"base_training_mb": base, "stages": result, "over_base": ratios, "passed": passed}


def table(results: dict[str, Any]) -> str:
    """Return the results as a markdown table."""
    lines = ["| model | rl microbatch | training the base | PPO, adapters | ratio | PPO, copies | ratio |"]
    lines.append("| --- | --- |" + " ---: |" * 5)
    for size, found in results["models"].items():
        for name in MICROBATCHES:
            cells = [
                f"{found['stages'][key]['above_mb']:.0f} MB | {found['over_base'][key]:.2f}"
                for key in (f"adapters rl, {name}", f"copies rl, {name}")
            ]
            lines.append(f"| {size} | {name} | {found['base_training_mb']:.0f} MB | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Parse the command line, measure, write the results; 1 when the mark is missed."""
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "memory")
    parser.add_argument("--output", type=Path, default=RESULTS / "memory.json")
    arguments = parser.parse_args()
    results: dict[str, Any] = {**provenance(), "mark": f"PPO with adapters <= {MARK} x training the base", "models": {}}
    for size in arguments.models:
        folder = arguments.folder.resolve() / size
        shutil.rmtree(folder, ignore_errors=True)
        results["models"][size] = measure(size, folder)
        write_json(arguments.output, results)
    print(f"\n{table(results)}\n\nwritten to {from_root(arguments.output)}")
    return 0 if all(all(found["passed"].values()) for found in results["models"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
