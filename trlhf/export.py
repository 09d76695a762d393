"""What was learned as one adapter over the base model: everything since the base, SFT included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trlhf import files
from trlhf.merging import greedy
from trlhf.roles import Role

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapter(policy: Role, sft: Path, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Save a policy's adapter, so that ``AutoPeftModelForCausalLM`` loads it; with tokenizer and generation config.

    A policy over the merged SFT model holds only what came after SFT, so the SFT stage's adapter is put in front of it:
    W + (α/r)(B₁A₁ + B₂A₂) is one adapter of rank 2r with 2α. One over a quantised base began as a copy of the SFT
    adapter and holds everything already.

    Args:
        policy: plays an adapter on a shared base.
        sft: folder ``model`` of the SFT stage; its adapter lies beside it, and names the base.
        tokenizer: with its chat template.
        directory: exists and is empty.

    Raises:
        ValueError: the policy is a model of its own, which has no adapter.
    """
    if policy.base is None or policy.adapter is None:
        raise ValueError("save_adapter: this policy is a model of its own; save_model saves it")
    earlier = sft.parent / "adapter"
    policy.base.save(policy.adapter, directory)
    config: dict[str, Any] = files.read_json(directory / CONFIG)
    before: dict[str, Any] = files.read_json(earlier / CONFIG)
    if policy.base.start is None:  # the base that is shared is the merged SFT model
        later = load_file(directory / WEIGHTS)
        save_file(stacked(load_file(earlier / WEIGHTS), later), directory / WEIGHTS, metadata={"format": "pt"})
        config |= {name: before[name] + config[name] for name in ("r", "lora_alpha")}
    config |= {name: before.get(name) for name in ("base_model_name_or_path", "revision")}
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / "README.md").unlink(missing_ok=True)  # peft's empty form of a model card; ours comes at the end
    greedy(tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def stacked(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the adapter whose change is the sum of two, if its α/r is theirs.

    [B₁ B₂]·[A₁; A₂] = B₁A₁ + B₂A₂.

    Raises:
        ValueError: they change different layers.
    """
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())[0]
        raise ValueError(f"stacked: only one of the two adapters has {odd}")
    return {
        name: torch.cat([first[name].float(), second[name].float()], dim=0 if ".lora_A." in name else 1).contiguous()
        for name in first
    }
