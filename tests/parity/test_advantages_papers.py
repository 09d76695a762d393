"""Advantages against loops over plain floats, written from the papers."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from trlhf.advantages import explained_variance, gae, leave_one_out, whiten

SHAPES = [((5, 3, 1, 0), 5), ((1, 1, 1), 2), ((1,), 1), ((0, 0), 3), ((4, 4), 4)]


def mask_of(lengths: tuple[int, ...], width: int) -> Tensor:
    return torch.tensor([[t < length for t in range(width)] for length in lengths])


def draw(seed: int, mask: Tensor) -> Tensor:
    """Draw normal numbers around 1, with NaN behind the mask: any use of them shows."""
    torch.manual_seed(seed)
    values = 1 + torch.randn(mask.shape, dtype=torch.float64)
    values[~mask] = math.nan
    return values


def k_step(rewards: list[float], values: list[float], t: int, k: int, gamma: float) -> float:
    """Compute Â_t^(k) = -V_t + r_t + γr_{t+1} + … + γ^{k-1}r_{t+k-1} + γ^k·V_{t+k}, V = 0 past the end (eq. 14)."""
    bootstrap = values[t + k] if t + k < len(values) else 0.0
    return sum(gamma**j * rewards[t + j] for j in range(k)) + gamma**k * bootstrap - values[t]


@pytest.mark.parametrize(("lengths", "width"), SHAPES)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (0.9, 1.0)])
def test_gae(lengths: tuple[int, ...], width: int, gamma: float, lam: float) -> None:
    """Schulman et al. 2016, eq. 16, as defined: the k-step estimators averaged with weights (1-λ)λ^{k-1}.

    At the end of an episode all later estimators are the last one, which gets the weight that is left, λ^{K-1}.
    """
    mask = mask_of(lengths, width)
    rewards, values = draw(0, mask), draw(1, mask)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for i, length in enumerate(lengths):
        r, v = rewards[i, :length].tolist(), values[i, :length].tolist()
        for t in range(length):
            last = length - t
            expected = lam ** (last - 1) * k_step(r, v, t, last, gamma)
            expected += sum((1 - lam) * lam ** (k - 1) * k_step(r, v, t, k, gamma) for k in range(1, last))
            assert advantages[i, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[i, t].item() == pytest.approx(expected + v[t], abs=1e-12)
        assert advantages[i, length:].tolist() == returns[i, length:].tolist() == [0.0] * (width - length)


@pytest.mark.parametrize("group", [2, 3, 8])
def test_leave_one_out(group: int) -> None:
    """Ahmadian et al. 2024, eq. 8: R_i - 1/(G-1)·Σ_{j≠i} R_j, for each prompt on its own."""
    torch.manual_seed(2)
    scores = torch.randn(4, group, dtype=torch.float64)
    found = leave_one_out(scores)
    for row, wanted in zip(found.tolist(), scores.tolist(), strict=True):
        for i in range(group):
            others = [wanted[j] for j in range(group) if j != i]
            assert row[i] == pytest.approx(wanted[i] - sum(others) / (group - 1), abs=1e-12)


@pytest.mark.parametrize(("lengths", "width"), SHAPES)
@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_whiten(lengths: tuple[int, ...], width: int, eps: float) -> None:
    """(x - mean)/√(variance + ε), over the real positions; the variance is over n, and the mean is not added back."""
    mask = mask_of(lengths, width)
    values = draw(3, mask)
    numbers = values[mask].tolist()
    found = whiten(values, mask, eps)
    assert found[~mask].tolist() == [0.0] * int((~mask).sum())
    if numbers:
        mean, variance = statistics.fmean(numbers), statistics.pvariance(numbers)
        expected = [(x - mean) / math.sqrt(variance + eps) for x in numbers]
        assert found[mask].tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("lengths", "width"), [((5, 3, 1, 0), 5), ((4, 4), 4), ((2,), 3)])
def test_explained_variance(lengths: tuple[int, ...], width: int) -> None:
    """1 - Var(G - V)/Var(G) over the real positions."""
    mask = mask_of(lengths, width)
    values, returns = draw(4, mask), draw(5, mask)
    g, errors = returns[mask].tolist(), (returns - values)[mask].tolist()
    expected = 1 - statistics.pvariance(errors) / statistics.pvariance(g)
    assert float(explained_variance(values, returns, mask)) == pytest.approx(expected, abs=1e-9)
