"""What exact rewards everywhere would reach: a gold label for every exact-answer pool prompt, and longer training.

    python benchmarks/upper_bound.py --seeds 0 1 2                      makes the sft and reward stages itself
    python benchmarks/upper_bound.py --runs runs/main_job/COMMIT/ppo-0  starts from those of a finished run

The ceiling for any choice of labels on the same SFT model and pool; its own label count is no budget anybody has. The
source run is not touched: its sft and reward stages are copied, its reward-stage questions are asked again of the same
labeller, then one gold question for each exact-answer prompt. Started again, it continues.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from provenance import RESULTS, ROOT, commit, from_root, provenance

import trlhf
from trlhf.config import Config, build_config, plain
from trlhf.files import new_directory, write_json
from trlhf.ledger import Ledger
from trlhf.pipeline import run_pipeline
from trlhf.run import RunDirectory
from trlhf.tasks import load_task
from trlhf.types import Question


def make_source(folder: Path, seed: int, overrides: Sequence[str]) -> Path:
    """Run the sft and reward stages of a seed where they are not done, and return their run directory."""
    path = folder / f"source-{seed}"
    for stage in ("sft", "reward"):
        trlhf.run([f"stage={stage}", f"seed={seed}", f"run.dir={path}", *overrides])
    return path


def with_values(config: Config, overrides: Sequence[str]) -> Config:
    """Return the configuration with some values replaced, each given as ``KEY=VALUE``."""
    merged = OmegaConf.merge(plain(config), OmegaConf.from_dotlist(list(overrides)))
    return build_config(cast("dict[str, Any]", OmegaConf.to_container(merged)))


def buy_everything(config: Config, source: Path, target: Path) -> dict[str, float]:
    """Copy the stages, ask the reward stage's questions again and for every gold answer; return what was bought."""
    before, after = RunDirectory(source), RunDirectory(target)
    for name in ("sft", "reward"):
        if not before.stage(name).done:
            raise trlhf.UserError(f"{source}: stage {name} is not complete; run python -m trlhf run.dir={source}")
        if not after.stage(name).done:
            with new_directory(after.stage(name).path) as folder:
                shutil.copytree(before.stage(name).path, folder, dirs_exist_ok=True)
    task = load_task(config)
    prompts = {prompt.id: prompt for prompt in task.answerable(config)}
    with Ledger(before.ledger, config.targeting.budget) as ledger:
        old = [
            Question(x.kind, prompts[x.prompt_id], x.responses, x.answer, x.why, 0, x.repeat)
            for x in ledger.labels(round=0)
        ]
    gold = [Question("gold", p, why="upper bound: everything") for p in prompts.values() if p.task == "exact"]
    with Ledger(after.ledger, len(old) + len(gold)) as ledger:
        ledger.ask([*old, *gold], task.labeler(config))
        return {"reward_stage": len(old), "gold": len(gold), "spent": ledger.spent}


def measure(source: Path, target: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Train on exact rewards from a source run's SFT model, evaluate, and return the figures."""
    with (source / "config.yaml").open(encoding="utf-8") as file:
        config = build_config(yaml.safe_load(file))
    labels = buy_everything(config, source, target)
    # The budget is spent to the last label, so the rounds buy nothing more.
    config = with_values(config, [*overrides, f"run.dir={target}", f"targeting.budget={labels['spent']:.0f}"])
    for stage in ("rl", "eval"):
        result = run_pipeline(with_values(config, [f"stage={stage}"]))
    summary = result.summary
    return {
        "seed": config.seed,
        "source": from_root(source),
        "labels": labels,
        "rl": plain(config)["rl"],
        "accuracy": summary["accuracy"],
        "by_kind": summary["by_kind"],
        "plans": summary["plans"],
        "paired": summary["paired"],
        "seconds": summary["seconds"],
        "versions": summary["versions"],
    }


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return accuracy by kind of prompt and over all reasoning prompts, as a markdown table of means over the runs."""
    stages = ("base", "sft", "rl")
    lines = ["| kind | base | SFT | exact rewards everywhere |", "| --- | ---: | ---: | ---: |"]

    def row(name: str, entries: Sequence[Mapping[str, Any]]) -> str:
        return f"| {name} | " + " | ".join(f"{mean(x[s]['value'] for x in entries):.1%}" for s in stages) + " |"

    for kind in runs[0]["by_kind"]["rl"]:
        lines.append(row(kind, [{s: run["by_kind"][s][kind] for s in stages} for run in runs]))
    return "\n".join([*lines, row("**all reasoning**", [run["accuracy"] for run in runs])])


def main() -> int:
    """Parse the command line, do the runs, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", default=[], help="run directories with sft and reward done")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the runs to make where --runs is absent")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps-per-round", type=int, default=15)
    parser.add_argument("--rl", nargs="+", default=[], metavar="rl.KEY=VALUE", help="further values of the rl stage")
    parser.add_argument("--folder", type=Path, help="of the runs (default: runs/upper_bound/<commit>)")
    parser.add_argument("--output", type=Path, default=RESULTS / "upper_bound.json")
    parser.add_argument("overrides", nargs="*", help="overrides of the runs that are made, after --")
    arguments = parser.parse_args()
    folder = (arguments.folder or ROOT / "runs" / "upper_bound" / commit()).resolve()
    training = [f"rl.rounds={arguments.rounds}", f"rl.steps_per_round={arguments.steps_per_round}", *arguments.rl]
    results: dict[str, Any] = {**provenance(), "runs": []}
    try:
        for number, job in enumerate(arguments.runs or arguments.seeds):
            source = job.resolve() if arguments.runs else make_source(folder, job, arguments.overrides)
            target = folder / (f"exact-{number}-{source.name}" if arguments.runs else f"exact-{job}")
            results["runs"].append(measure(source, target, training))
            write_json(arguments.output, results)
    except trlhf.UserError as error:
        print(f"upper_bound: {error}", file=sys.stderr)
        return 2
    print(f"\n{table(results['runs'])}\n\nwritten to {from_root(arguments.output)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
