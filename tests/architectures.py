"""Tiny models of the architectures that attention of ours is known to work with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def tiny(kind: str, **options: Any) -> PreTrainedModel:
    """Return a random model of two layers with 40 words that minds every token it sees."""
    config, model = MODELS[kind]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 40, "head_dim": 8, "max_position_embeddings": 128}
    made = model(config(**sizes | {"sliding_window": None, "pad_token_id": 3} | options)).eval()
    with torch.no_grad():
        for value in made.parameters():
            value.mul_(4 if value.dim() == 2 else 1)  # fresh weights hardly look at anything
    return made
