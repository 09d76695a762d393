"""Masks from lengths, and sums and means that never look behind them."""

from __future__ import annotations

import math

import torch

from trlhf.masks import mask_from_lengths, masked_mean, masked_sum

MASK = torch.tensor([[True, True, False], [False, False, False]])
VALUES = torch.tensor([[1.0, 4.0, math.nan], [math.inf, math.nan, 9.0]])


def test_a_mask_is_true_at_the_first_positions() -> None:
    expected = [[True, True, False], [False, False, False], [True, True, True]]
    assert mask_from_lengths([2, 0, 3], 3).tolist() == expected


def test_sum_and_mean_look_at_real_positions_only() -> None:
    assert masked_sum(VALUES, MASK).item() == 5.0
    assert masked_mean(VALUES, MASK).item() == 2.5
    assert masked_mean(VALUES, torch.tensor([[True, False, False], [False, False, False]])).item() == 1.0


def test_an_empty_mask_has_sum_and_mean_zero() -> None:
    nothing = torch.zeros_like(MASK)
    assert masked_sum(VALUES, nothing).item() == 0.0
    assert masked_mean(VALUES, nothing).item() == 0.0


def test_no_gradient_reaches_behind_the_mask() -> None:
    values = VALUES.clone().requires_grad_()
    masked_mean(values, MASK).backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
