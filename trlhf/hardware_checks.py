"""What contradicts the hardware, and packages that are missing for what was chosen. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

from trlhf.attention import PACKAGES, installed
from trlhf.schema import Problem

if TYPE_CHECKING:
    from trlhf.config import Config


def hardware_problems(config: Config) -> Iterator[Problem]:
    """Yield contradictions between hardware, attention, kernels and quantisation, and what is not installed.

    A dry run needs no package, so there a missing one is no problem; `missing_packages` is shown in its plan.
    """
    yield from _device(config)
    model, hardware, kernels = config.model, config.hardware, config.sft.kernels
    if model.attention in PACKAGES and hardware.device == "cpu":
        yield Problem(
            ("model.attention", "hardware.device"),
            f"model.attention={model.attention} needs a GPU, but hardware.device=cpu; use model.attention=sdpa",
        )
    elif model.attention in PACKAGES and (model.dtype != "bfloat16" or not model.lora.enabled):
        which = f"model.dtype={model.dtype}" if model.dtype != "bfloat16" else "model.lora.enabled=false"
        yield Problem(
            ("model.attention", "model.dtype", "model.lora.enabled"),
            f"model.attention={model.attention} computes in bfloat16, but with {which} weights are float32 while they "
            "learn; use model.attention=sdpa, or model.dtype=bfloat16 with model.lora.enabled=true",
        )
    if kernels == "liger" and hardware.device == "cpu":
        yield Problem(
            ("sft.kernels", "hardware.device"),
            "sft.kernels=liger needs a GPU, but hardware.device=cpu; use sft.kernels=torch (or auto)",
        )
    if config.rl.rollout_engine == "vllm":
        yield from _vllm(config)
    if config.dry_run:
        return
    for key, value, package, remedy in missing_packages(config):
        yield Problem(
            (key,),
            f"{key}={value} needs the package {package}, which is not installed; {remedy}, or use {_instead(key)}",
        )


def missing_packages(config: Config) -> Iterator[tuple[str, str, str, str]]:
    """Yield key, value, package and how to install it for everything that was asked for by name and is not there."""
    model = config.model
    if model.quantization != "none" and find_spec("bitsandbytes") is None:
        yield "model.quantization", model.quantization, "bitsandbytes", "pip install 'trlhf[quantized]'"
    if model.attention in PACKAGES and config.hardware.device != "cpu" and not installed(model.attention):
        yield "model.attention", model.attention, *PACKAGES[model.attention]
    if config.sft.kernels == "liger" and config.hardware.device != "cpu" and find_spec("liger_kernel") is None:
        yield "sft.kernels", "liger", "liger_kernel", "pip install liger-kernel"
    if config.rl.rollout_engine == "vllm" and config.hardware.device != "cpu" and find_spec("vllm") is None:
        yield "rl.rollout_engine", "vllm", "vllm", "pip install 'trlhf[vllm]'"


def _vllm(config: Config) -> Iterator[Problem]:
    """What vLLM, given the policy's weights as they are, cannot do."""
    if config.hardware.device == "cpu":
        yield Problem(
            ("rl.rollout_engine", "hardware.device"),
            "rl.rollout_engine=vllm needs a GPU, but hardware.device=cpu; use rl.rollout_engine=transformers",
        )
    if config.model.quantization != "none":
        yield Problem(
            ("rl.rollout_engine", "model.quantization"),
            f"rl.rollout_engine=vllm takes plain weights, but model.quantization={config.model.quantization}; use "
            "rl.rollout_engine=transformers, or model.quantization=none",
        )


def _device(config: Config) -> Iterator[Problem]:
    name, device = config.hardware.name, config.hardware.device
    wanted = "cpu" if name == "cpu" else "cuda"
    if name != "auto" and device != wanted:
        yield Problem(
            ("hardware.name", "hardware.device"),
            f"hardware.name={name} goes with hardware.device={wanted}, not {device}; write hardware={name}, which sets "
            "both and all that follows, and leave hardware.name and hardware.device out",
        )


def _instead(key: str) -> str:
    return {
        "model.quantization": "model.quantization=none",
        "model.attention": "model.attention=auto",
        "rl.rollout_engine": "rl.rollout_engine=transformers",
    }.get(key, "sft.kernels=auto")
