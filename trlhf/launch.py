"""What a launch of several processes must be like, said before anything starts. No torch here."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from trlhf.crew import together
from trlhf.errors import UserError
from trlhf.processes import launched, sharding, zero_stage
from trlhf.run import LOCK, RunDirectory, planned

if TYPE_CHECKING:
    from trlhf.config import Config

log = logging.getLogger("trlhf")
SEEN_WITHIN = 10.0  # seconds that a network file system may take to show a new file elsewhere


def check_launch(config: Config) -> None:
    """Refuse what several processes, or the user's accelerate file, cannot do with this configuration.

    Raises:
        UserError: with the value, the rule and what to do.
    """
    _, size = launched()
    _check_sharding(config, size)
    if size == 1:
        return
    batch = config.sft.batch_size
    if "sft" in planned(config) and not config.sft.packing and batch % size:
        near = max(size, batch - batch % size)
        raise UserError(
            f"sft.batch_size={batch} must be divisible by the number of processes, {size}: each takes as many rows of "
            f"a step; try sft.batch_size={near}, or another number of processes"
        )


def _check_sharding(config: Config, size: int) -> None:
    kind, learning = sharding(), [name for name in planned(config) if name in ("reward", "rl")]
    if kind in ("fsdp1", "megatron"):
        raise UserError(
            f"{_NAMES[kind]} (from your accelerate file): models are not put together from its pieces here; write "
            "distributed_type: FSDP with fsdp_version: 2 in its fsdp_config, or distributed_type: MULTI_GPU"
        )
    if kind == "deepspeed" and learning:
        raise UserError(
            f"DeepSpeed (from your accelerate file): stage={config.stage} cannot run under it, since the updates "
            f"of {' and '.join(learning)} are not a trainer's; run stage=sft under it, and the other stages with "
            "distributed_type: MULTI_GPU or, for more memory, FSDP with fsdp_version: 2"
        )
    if kind == "deepspeed" and zero_stage() == 3:
        raise UserError(
            "DeepSpeed ZeRO 3 (from your accelerate file): models are not put together from its pieces here; use "
            "zero_stage: 2, or distributed_type: FSDP with fsdp_version: 2"
        )
    if kind == "fsdp2" and size > 1:
        _check_fsdp2(config, learning)


def _check_fsdp2(config: Config, learning: list[str]) -> None:
    if config.model.quantization != "none":
        raise UserError(
            f"FSDP 2 (from your accelerate file): model.quantization={config.model.quantization} cannot be divided "
            "among processes; a base in 4 bits fits on each card, so use distributed_type: MULTI_GPU"
        )
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true" and learning:
        raise UserError(
            "fsdp_offload_params: true (from your accelerate file): the updates of reward and rl keep their weights on "
            "the cards; set it to false"
        )
    if "reward" in planned(config) and config.reward.finetune == "full":
        raise UserError(
            "FSDP 2 (from your accelerate file): reward.finetune=full trains a whole copy in every process; use "
            "reward.finetune=lora or frozen, or run stage=reward with distributed_type: MULTI_GPU"
        )


def warn_of_launch(config: Config) -> None:
    """Say what is done otherwise than the user's accelerate file asks for."""
    divided = launched()[1] > 1 and sharding() == "fsdp2"
    if divided and "sft" in planned(config) and config.hardware.device == "cpu":
        log.warning(
            "FSDP 2 (from your accelerate file): accelerate does not divide models on a CPU, so in sft every process "
            "holds the whole model; rl divides them"
        )


_NAMES = {"fsdp1": "FSDP 1", "megatron": "Megatron-LM"}


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
