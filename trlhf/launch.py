"""What a launch of several processes must be like, said before anything starts. No torch here."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from trlhf.crew import together
from trlhf.errors import UserError
from trlhf.processes import launched, sharding
from trlhf.run import LOCK, RunDirectory, planned

if TYPE_CHECKING:
    from trlhf.config import Config

SEEN_WITHIN = 10.0  # seconds that a network file system may take to show a new file elsewhere


def check_launch(config: Config) -> None:
    """Refuse what several processes, or the user's accelerate file, cannot do with this configuration.

    Raises:
        UserError: with the value, the rule and what to do.
    """
    _, size = launched()
    if size == 1:
        return
    learning = [name for name in planned(config) if name in ("reward", "rl")]
    kind = sharding()
    if kind not in ("none", "fsdp2") and learning:
        raise UserError(
            f"{_NAMES[kind]} (from your accelerate file): stage={config.stage} cannot run under it, since the updates "
            f"of {' and '.join(learning)} are not a trainer's; run stage=sft under it, and the other stages with "
            "distributed_type: MULTI_GPU or, for more memory, FSDP with fsdp_version: 2"
        )
    batch = config.sft.batch_size
    if "sft" in planned(config) and not config.sft.packing and batch % size:
        near = max(size, batch - batch % size)
        raise UserError(
            f"sft.batch_size={batch} must be divisible by the number of processes, {size}: each takes as many rows of "
            f"a step; try sft.batch_size={near}, or another number of processes"
        )


_NAMES = {"deepspeed": "DeepSpeed", "fsdp1": "FSDP 1", "megatron": "Megatron-LM", "fsdp2": "FSDP 2", "none": ""}


def check_folder(run: RunDirectory) -> None:
    """Refuse a run directory that not every process sees.

    Raises:
        UserError: on the process that does not.
    """
    together(_sees, run.path.resolve(), (run.path / LOCK).read_text(encoding="utf-8"))


def _sees(path: Path, owner: str) -> None:
    until = time.monotonic() + SEEN_WITHIN
    while True:
        try:
            if (path / LOCK).read_text(encoding="utf-8") == owner:
                return
        except OSError:
            pass
        if time.monotonic() > until:
            raise UserError(
                f"run.dir={path} is not visible from this process; all processes read models and checkpoints there, so "
                "give a folder that all machines share"
            )
        time.sleep(0.1)
