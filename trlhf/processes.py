"""Which of several processes this one is, as torchrun and accelerate say in the environment. No torch here."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from trlhf.errors import UserError

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
START = "start trlhf with torchrun --nproc_per_node N -m trlhf … or accelerate launch --num_processes N -m trlhf …"
Sharding = Literal["none", "fsdp1", "fsdp2", "deepspeed", "megatron"]


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return this process's rank and how many there are; (0, 1) where nobody says that there are several.

    Raises:
        UserError: only a part of what a launcher sets is there, or a launcher started fewer than it was asked for.
    """
    alone = "WORLD_SIZE" not in environment and "MASTER_ADDR" in environment
    if alone and environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
        raise UserError(
            "accelerate launch --cpu starts one process alone, whatever --num_processes says (it leaves the others to "
            "mpirun); use torchrun --nproc_per_node N -m trlhf … hardware.device=cpu"
        )
    size = _number(environment, "WORLD_SIZE", 1)
    if size <= 1:
        return 0, 1
    missing = [name for name in NEEDED if not environment.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE={size} says that this is one of {size} processes, but {', '.join(missing)} is not set; "
            f"{START}, or unset WORLD_SIZE"
        )
    rank = _number(environment, "RANK", 0)
    if not 0 <= rank < size:
        raise UserError(f"RANK={rank} must be in 0 … {size - 1}, since WORLD_SIZE={size}; {START}")
    return rank, size


def join_tasks() -> None:
    """Let the tasks of one submitit job be processes of one run: Hydra's launcher starts the same function in each."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return
    import submitit

    if submitit.JobEnvironment().num_tasks > 1:
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)


def sharding(environment: Mapping[str, str] = os.environ) -> Sharding:
    """Return how the user's accelerate file wants models to be divided among the processes."""

    def wanted(name: str) -> bool:
        return environment.get(name, "").lower() in ("1", "true")

    if wanted("ACCELERATE_USE_DEEPSPEED"):
        return "deepspeed"
    if wanted("ACCELERATE_USE_MEGATRON_LM"):
        return "megatron"
    if wanted("ACCELERATE_USE_FSDP"):
        return "fsdp2" if environment.get("FSDP_VERSION", "1") == "2" else "fsdp1"
    return "none"


def zero_stage(environment: Mapping[str, str] = os.environ) -> int:
    """Return which stage of DeepSpeed's ZeRO the user's accelerate file, or the DeepSpeed file it names, asks for."""
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file.lower() in ("", "none"):
        return _number(environment, "ACCELERATE_DEEPSPEED_ZERO_STAGE", 2)
    try:
        return int(json.loads(Path(file).read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"deepspeed_config_file {file} (from your accelerate file): cannot be read ({error})"
        ) from error


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{name}={text!r} must be a number; {START}, or unset it") from error
