"""The value model: the expected reward of a response, from each of its prefixes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import Parameter

from trlhf.logprobs import SequenceBatch, response_hidden
from trlhf.roles import Role


class Critic(nn.Module):
    """A role's backbone with a linear head that starts at zero.

    Args:
        role: starts where the reward model stands; its language-model head is not used.
    """

    def __init__(self, role: Role) -> None:
        super().__init__()
        self.role = role
        size = int(role.model.config.hidden_size)
        self.head = nn.Linear(size, 1, device=role.device, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def trainable(self) -> dict[str, Parameter]:
        """Return what the critic learns with, by name."""
        backbone = {name: value for name, value in self.role.trainable().items() if not name.startswith("lm_head.")}
        return backbone | {f"head.{name}": value for name, value in self.head.named_parameters()}

    def forward(self, batch: SequenceBatch) -> Float[Tensor, "B R"]:
        """Return V_t for each response token, predicted from what stands before it."""
        with self.role.acting() as model:
            backbone: Any = model.base_model
            values: Tensor = self.head(response_hidden(backbone, batch).float()).squeeze(-1)
        return values
