"""The value model: the expected reward of a response, from each of its prefixes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trlhf.config import ModelConfig
from trlhf.logprobs import SequenceBatch, response_hidden
from trlhf.models import load_causal_lm


class Critic(nn.Module):
    """A backbone with a linear head that starts at zero.

    Args:
        path: the reward model's backbone (or the SFT model): folder of a causal language model, whose head is not used.
        config: how to load it.
        device: where.
    """

    def __init__(self, path: Path, config: ModelConfig, device: str) -> None:
        super().__init__()
        model = load_causal_lm(path, replace(config, dtype="float32"), device)  # AdamW's steps vanish in bfloat16
        self.backbone = model.model
        self.head = nn.Linear(model.config.hidden_size, 1, device=device, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: SequenceBatch) -> Float[Tensor, "B R"]:
        """Return V_t for each response token, predicted from what stands before it."""
        values: Tensor = self.head(response_hidden(self.backbone, batch).float()).squeeze(-1)
        return values
