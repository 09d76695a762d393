"""DPO and the reward model's losses against loops over plain floats, written from the papers."""

from __future__ import annotations

import math

import pytest
import torch

from trlhf.losses.dpo import chosen_nll, dpo_loss
from trlhf.losses.reward import preference_loss, verdict_loss


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("pairs", [1, 5])
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo_loss(pairs: int, beta: float) -> None:
    """Rafailov et al. 2023, eq. 7; its gradient is the unnumbered one below it: -βσ(r̂_l - r̂_w)[∇log π_w - ∇log π_l]."""
    torch.manual_seed(0)
    tensors = [5 * torch.randn(pairs, dtype=torch.float64) for _ in range(4)]
    rows = list(zip(*(x.tolist() for x in tensors), strict=True))
    leaves = [tensors[0].requires_grad_(), tensors[1].requires_grad_()]
    loss, metrics = dpo_loss(*tensors, 3.0, beta)
    loss.backward()
    r_w, r_l = [beta * (w - ref_w) for w, _, ref_w, _ in rows], [beta * (lo - ref_l) for _, lo, _, ref_l in rows]
    both = list(zip(r_w, r_l, strict=True))
    assert loss.item() == pytest.approx(sum(-math.log(sigmoid(w - lo)) for w, lo in both) / 3.0, abs=1e-12)
    slope = [beta * sigmoid(lo - w) / 3.0 for w, lo in both]
    assert leaves[0].grad is not None and leaves[1].grad is not None
    assert leaves[0].grad.tolist() == pytest.approx([-x for x in slope], abs=1e-12)
    assert leaves[1].grad.tolist() == pytest.approx(slope, abs=1e-12)
    weights = torch.linspace(0.1, 0.9, len(both), dtype=torch.float64)
    weighted, _ = dpo_loss(*tensors, 3.0, beta, weights)
    terms = [c * -math.log(sigmoid(w - lo)) for c, (w, lo) in zip(weights.tolist(), both, strict=True)]
    assert weighted.item() == pytest.approx(sum(terms) / 3.0, abs=1e-12)
    assert metrics["chosen_reward"] == pytest.approx(sum(r_w), abs=1e-12)
    assert metrics["rejected_reward"] == pytest.approx(sum(r_l), abs=1e-12)
    assert metrics["correct"] == sum(w > lo for w, lo in both)


def test_chosen_nll() -> None:
    """Pang et al. 2024, eq. 1, second term: -log π(y_w)/|y_w|; an empty response counts as one token."""
    sums, lengths = [-6.0, -2.5, -0.3, 0.0], [3, 2, 1, 0]
    found = chosen_nll(torch.tensor(sums, dtype=torch.float64), torch.tensor(lengths, dtype=torch.float64), 7.0)
    expected = sum(-total / max(1, length) for total, length in zip(sums, lengths, strict=True)) / 7.0
    assert found.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("flip_rate", [0.0, 0.07, 0.4])
def test_verdict_loss(flip_rate: float) -> None:
    """Bernoulli likelihood of each label in each head, P(right) = ε + (1 - 2ε)σ(s)."""
    torch.manual_seed(1)
    scores, weights = 2 * torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)
    labels = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.8], dtype=torch.float64)
    total = 0.0
    for b in range(5):
        for k in range(3):
            p, y = flip_rate + (1 - 2 * flip_rate) * sigmoid(scores[b, k].item()), labels[b].item()
            total -= weights[b, k].item() * (y * math.log(p) + (1 - y) * math.log(1 - p))
    loss, metrics = verdict_loss(scores, labels, weights, 4.0, flip_rate)
    assert loss.item() == pytest.approx(total / 4.0, abs=1e-12)
    assert metrics == pytest.approx(slow_metrics(scores.tolist(), labels.tolist()), abs=1e-6)


@pytest.mark.parametrize("flip_rate", [0.0, 0.07])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_preference_loss(flip_rate: float, temperature: float) -> None:
    """Bradley & Terry 1952: P(first ≻ second) = σ((s₁ - s₂)/τ), smoothed by Christiano et al. 2017, sec. 2.2.3."""
    torch.manual_seed(2)
    first, second = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    weights = torch.rand(6, 2, dtype=torch.float64)
    preferences = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.5, 0.0], dtype=torch.float64)
    margins = [[(first[b, k].item() - second[b, k].item()) / temperature for k in range(2)] for b in range(6)]
    total = 0.0
    for b in range(6):
        for k in range(2):
            p, q = flip_rate + (1 - 2 * flip_rate) * sigmoid(margins[b][k]), preferences[b].item()
            total -= weights[b, k].item() * (q * math.log(p) + (1 - q) * math.log(1 - p))
    loss, metrics = preference_loss(
        first, second, preferences, weights, denominator=9.0, temperature=temperature, flip_rate=flip_rate
    )
    assert loss.item() == pytest.approx(total / 9.0, abs=1e-12)
    assert metrics == pytest.approx(slow_metrics(margins, preferences.tolist()), abs=1e-6)


def slow_metrics(margins: list[list[float]], targets: list[float]) -> dict[str, float]:
    """Compute share agreed and mean margin in the right direction of the mean head, without ties."""
    agreed, signed = [], []
    for row, target in zip(margins, targets, strict=True):
        if target != 0.5:
            mean = sum(row) / len(row)
            agreed.append(mean > 0 if target > 0.5 else mean <= 0)
            signed.append(mean if target > 0.5 else -mean)
    return {"accuracy": sum(agreed) / len(agreed), "margin": sum(signed) / len(signed)}
