"""Masks come from lengths, never from token ids: True = this position counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def mask_from_lengths(lengths: Sequence[int], width: int) -> Bool[Tensor, "B R"]:
    """Return a mask whose row i is True at the first ``lengths[i]`` of ``width`` positions."""
    return torch.arange(width)[None, :] < torch.as_tensor(list(lengths))[:, None]


def masked_sum(values: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]) -> Float[Tensor, ""]:
    """Return Σ values where the mask is True; masked positions may hold anything, NaN too."""
    return torch.where(mask, values, torch.zeros_like(values)).sum()


def masked_mean(values: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]) -> Float[Tensor, ""]:
    """Return the mean where the mask is True, 0 for an empty mask."""
    return masked_sum(values, mask) / mask.sum().clamp(min=1)
