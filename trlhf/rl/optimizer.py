"""AdamW as both updates use it: a scheduled rate, clipped gradients, and no step on a gradient that is not finite."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import Parameter

from trlhf.config import RlConfig
from trlhf.errors import UserError
from trlhf.sharding import like, sum_and_clip

MAX_BAD_STEPS = 3


class GuardedOptimizer:
    """AdamW without weight decay over the trainable ones of some parameters.

    Args:
        parameters: of a model; those that require no gradient are passed over.
        learning_rate: the peak.
        config: the rl section.
        remedy: what to change when gradients are not finite, for the error message.
    """

    def __init__(self, parameters: Iterable[Parameter], learning_rate: float, config: RlConfig, remedy: str) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.peak, self.max_grad_norm, self.remedy = learning_rate, config.max_grad_norm, remedy
        self.adamw = torch.optim.AdamW(self.parameters, lr=learning_rate, eps=config.adam_eps, weight_decay=0.0)
        self.bad_steps = 0  # in a row
        self.skipped = 0  # by this process

    def scale(self, factor: float) -> None:
        """Set the learning rate to ``factor``, in [0, 1], times the peak."""
        for group in self.adamw.param_groups:
            group["lr"] = self.peak * factor

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.adamw.zero_grad(set_to_none=True)

    def step(self) -> float | None:
        """Add up the gradients of all ranks, clip and apply them.

        Returns:
            Their norm before they were clipped; None where it was not finite, and no step was taken.

        Raises:
            UserError: the third gradient in a row that is not finite.
        """
        norm = sum_and_clip(self.parameters, self.max_grad_norm)
        if torch.isfinite(norm):
            self.bad_steps = 0
            self.adamw.step()
            return float(norm)
        self.bad_steps += 1
        self.skipped += 1
        if self.bad_steps >= MAX_BAD_STEPS:
            raise UserError(
                f"rl: the gradient was not finite {MAX_BAD_STEPS} steps in a row; {self.remedy}, and delete the folder "
                "rl of the run first or give another run.dir (the same values would end here again)"
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what a continued run needs."""
        return {"adamw": self.adamw.state_dict(), "bad_steps": self.bad_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of `state_dict`, whole or divided as the parameters are."""
        moments = {
            number: {name: like(value, self.parameters[number]) for name, value in found.items()}
            for number, found in state["adamw"]["state"].items()
        }
        self.adamw.load_state_dict({**state["adamw"], "state": moments})
        self.bad_steps = state["bad_steps"]
