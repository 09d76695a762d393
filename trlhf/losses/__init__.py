"""Losses as pure functions: tensors and floats in, ``(loss, metrics)`` out; the denominator is always an argument."""

from trlhf.losses.dpo import dpo_loss
from trlhf.losses.ppo import kl_loss, ppo_loss, value_loss

__all__ = ["dpo_loss", "kl_loss", "ppo_loss", "value_loss"]
