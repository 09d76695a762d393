"""The sizes of a Mistral-like model, and what follows from them: weights, adapters, cache. No torch here."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from trlhf.config import ModelConfig

BYTES = {"float32": 4, "bfloat16": 2}
NF4_BYTES = 4.127 / 8  # a weight with its double-quantised scales: https://arxiv.org/abs/2305.14314, sec. 3
MICRO_CONFIG = Path(__file__).parent.parent / "micro" / "base" / "config.json"


@dataclass(frozen=True)
class Shape:
    """The sizes that memory and time depend on; ``head``, the size of one head, is hidden / heads where it is 0."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    head: int = 0

    @property
    def head_size(self) -> int:
        """Size of one attention head."""
        return self.head or self.hidden // self.heads

    @property
    def queries(self) -> int:
        """Size of all queries of a token."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Size of all keys (or values) of a token."""
        return self.kv_heads * self.head_size

    @property
    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's linear maps, by name."""
        return {
            "q_proj": (self.hidden, self.queries), "k_proj": (self.hidden, self.keys),
            "v_proj": (self.hidden, self.keys), "o_proj": (self.queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate), "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }  # fmt: skip

    @property
    def linear_parameters(self) -> int:
        """Number of weights of all layers' linear maps."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear_sizes.values())

    @property
    def outside_parameters(self) -> int:
        """Number of the other weights: embeddings, head, norms."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden * (1 + 2 * self.layers)

    @property
    def parameters(self) -> int:
        """Number of weights: embeddings, attention, gated feed-forward, norms, head."""
        return self.linear_parameters + self.outside_parameters

    def base_bytes(self, config: ModelConfig) -> float:
        """Bytes of the weights that ``config`` loads; only linear layers are quantised, embeddings and head are not."""
        size = BYTES[config.dtype]
        if config.quantization == "none":
            return float(self.parameters * size)
        return self.outside_parameters * size + self.linear_parameters * NF4_BYTES

    def adapter_parameters(self, config: ModelConfig) -> int:
        """Number of LoRA weights: r·(in + out) for each adapted layer."""
        sizes = [self.linear_sizes[name] for name in adapted(config.lora.target_modules)]
        return self.layers * config.lora.r * sum(inputs + outputs for inputs, outputs in sizes)

    def cache_bytes(self, tokens: float, dtype: str) -> float:
        """Bytes of the keys and values of some tokens, in all layers."""
        return tokens * 2.0 * self.layers * self.keys * BYTES[dtype]


def adapted(target_modules: Collection[str]) -> list[str]:
    """Return which linear maps of a layer get adapters."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return [name for name in names if name in target_modules]


# https://huggingface.co/mistralai/Mistral-7B-v0.1/blob/main/config.json
MISTRAL_7B = Shape(4096, 32, 14336, 32, 8, 32000, tied=False)
KNOWN = {"mistralai/Mistral-7B-v0.1": MISTRAL_7B}


def shape_of(config: ModelConfig) -> Shape | None:
    """Return the model's sizes: of the embedded base, of a local folder, or of a hub model known by name; else None."""
    if config.name in KNOWN:
        return KNOWN[config.name]
    path = MICRO_CONFIG if config.name == "micro" else Path(config.name).expanduser() / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Shape(
            values["hidden_size"],
            values["num_hidden_layers"],
            values["intermediate_size"],
            values["num_attention_heads"],
            values.get("num_key_value_heads", values["num_attention_heads"]),
            values["vocab_size"],
            bool(values.get("tie_word_embeddings", False)),
            values.get("head_dim") or 0,
        )
    except (OSError, ValueError, KeyError):
        return None
