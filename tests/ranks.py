"""Every kind of update once, the same whether one process takes it or several; `smoke/test_two_processes.py` compares.

torchrun --nproc_per_node 2 tests/ranks.py MODEL OUTPUT
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from trials import (
    ALGORITHMS,
    LAYOUTS,
    Trial,
    demonstrations,
    fit_reward,
    labels,
    sampled_groups,
    sft_steps,
    some_anchors,
)

from trlhf.config import RlConfig
from trlhf.distributed import world
from trlhf.rl.ppo import PpoLearner

CASES: Mapping[str, tuple[str, dict[str, Any], int, int]] = {
    # algorithm, what differs, groups, anchors
    "leave_one_out": ("leave_one_out", {}, 4, 3),
    "leave_one_out, five groups": ("leave_one_out", {"minibatch_size": 12, "microbatch_size": 4, "epochs": 2}, 5, 0),
    "leave_one_out, a group a step": ("leave_one_out", {"minibatch_size": 4}, 3, 1),  # nothing for the second process
    "gae": ("gae", {}, 4, 3),
    "gae, five groups": ("gae", {"minibatch_size": 12, "microbatch_size": 4, "epochs": 2}, 5, 3),
    "gae, a group a step": ("gae", {"minibatch_size": 4}, 3, 1),
    "gae, warming up": ("gae", {}, 3, 1),
    "dpo": ("dpo", {}, 4, 3),
    "dpo, five pairs": ("dpo", {"pairs_per_prompt": 1, "epochs": 2, "pairs_per_step": 3}, 5, 2),
    "dpo, a pair a step": ("dpo", {"pairs_per_step": 1, "pairs_per_prompt": 1}, 1, 1),
}
Result = dict[str, Any]


def update(path: Path, name: str, layout: str) -> Result:
    """Take one update and return gradients of its last step, weights, metrics, and PPO's advantages."""
    algorithm, different, count, anchors = CASES[name]
    config: RlConfig = replace(ALGORITHMS[algorithm], **different)
    trial = Trial(path, config, layout)
    groups = sampled_groups(count)
    result: Result = {}
    if isinstance(trial.learner, PpoLearner):
        experience, _ = trial.learner._collect(groups)
        result = {"advantages": experience.advantages, "returns": experience.returns}
    result["metrics"] = trial.update(groups, some_anchors(anchors), warmup="warming" in name)
    if isinstance(trial.learner, PpoLearner):
        result["metrics"]["next_kl_coef"] = trial.learner.kl_coef
    return result | {"gradients": trial.gradients(), "weights": trial.weights()}


def reward(path: Path, kind: str, verdicts: int, batch: int) -> Result:
    """Fit a reward model and return the gradients of every step, all weights and the metrics."""
    fitted = fit_reward(path, labels(verdicts), finetune=kind, batch_size=batch, microbatch_size=2)
    gradients = {f"{i}.{name}": value for i, one in enumerate(fitted.gradients) for name, value in one.items()}
    metrics = {f"{i}.{name}": value for i, one in enumerate(fitted.metrics) for name, value in one.items()}
    weights = {name: value for name, value in fitted.model.heads.state_dict().items() if "weight" in name}
    return {"gradients": gradients, "weights": weights, "metrics": metrics}


def supervised(path: Path, folder: Path, packing: bool, lora: bool) -> Result:
    """Take one step of SFT over ragged rows."""
    sft = {"microbatch_size": 2, "packing": packing}
    (gradients,) = sft_steps(path, folder, demonstrations(), sft=sft, model={"lora": {"enabled": lora, "r": 4}})
    return {"gradients": gradients}


def results(path: Path, folder: Path) -> dict[str, Result]:
    """Run all cases; ``folder`` is this process's own."""
    found = {f"{name} ({layout})": update(path, name, layout) for name in CASES for layout in LAYOUTS}
    for kind in ("full", "lora"):
        found[f"reward {kind}"] = reward(path, kind, 6, 8)
        found[f"reward {kind}, a label over"] = reward(path, kind, 7, 4)
    for packing in (False, True):
        found[f"sft packing={packing}"] = supervised(path, folder / f"packing {packing}", packing, lora=False)
    found["sft lora"] = supervised(path, folder / "lora", packing=False, lora=True)
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo")
    rank, size = world()
    output = Path(sys.argv[2])
    torch.save(results(Path(sys.argv[1]), output / f"rank {rank}") | {"world": size}, output / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()
