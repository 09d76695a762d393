"""Updates on models that are divided among processes; `smoke/test_sharding.py` starts this and compares.

torchrun --nproc_per_node N tests/shards.py MODEL OUTPUT [CHECKPOINT]
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ranks import CASES
from trials import ALGORITHMS, LAYOUTS, Trial, sampled_groups, some_anchors

from trlhf.distributed import world
from trlhf.rl import checkpoint
from trlhf.rl.checkpoint import Progress
from trlhf.run import RunDirectory
from trlhf.sharding import shard

CHOSEN = [name for name in CASES if name != "gae, warming up"]
RESUMED = ("gae", "dpo")
Result = dict[str, Any]
Divide = Any


def whole_models(model: Any) -> None:
    """Divide nothing."""


def updates(path: Path, divide: Divide) -> Mapping[str, Result]:
    """Take every kind of update: two of them, of which the second begins with the first one's optimizer."""
    found = {}
    for layout in LAYOUTS:
        for name in CHOSEN:
            algorithm, different, count, anchors = CASES[name]
            trial = Trial(path, replace(ALGORITHMS[algorithm], max_grad_norm=0.5, **different), layout, divide=divide)
            metrics = [trial.update(sampled_groups(count, seed), some_anchors(anchors)) for seed in (0, 1)]
            found[f"{name} ({layout})"] = {"metrics": metrics, "weights": trial.weights()}
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo")
    rank, size = world()
    torch.save({"updates": updates(Path(sys.argv[1]), shard)}, Path(sys.argv[2]) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()
