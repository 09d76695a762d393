"""PPO's losses against loops over plain floats, written from the papers: values, gradients and metrics."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trlhf.losses.ppo import adapted_kl_coef, full_kl_loss, kl_estimate, kl_loss, ppo_loss, value_loss

# Lengths and width: ragged with an empty row, single tokens, one token alone, nothing at all, no padding.
SHAPES = [((5, 3, 1, 0), 5), ((1, 1, 1), 2), ((1,), 1), ((0, 0), 3), ((4, 4), 4)]
LIMIT = 20.0


def mask_of(lengths: tuple[int, ...], width: int) -> Tensor:
    return torch.tensor([[t < length for t in range(width)] for length in lengths])


def draw(shape: tuple[int, ...], seed: int, mask: Tensor, scale: float = 1.0) -> Tensor:
    """Draw normal numbers, with NaN behind the mask: any use of them shows."""
    torch.manual_seed(seed)
    values = scale * torch.randn(shape, dtype=torch.float64)
    values[~mask] = math.nan
    return values


def real(mask: Tensor) -> list[tuple[int, int]]:
    return [(i, t) for i in range(mask.shape[0]) for t in range(mask.shape[1]) if mask[i, t]]


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> tuple[float, list[list[float]]]:
    at = at.clone().requires_grad_()
    value = loss(at)
    value.backward()
    assert at.grad is not None
    return value.item(), at.grad.tolist()


def same(found: list[list[float]], expected: list[list[float]]) -> None:
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-12, rel=1e-12)


@pytest.mark.parametrize(("lengths", "width"), SHAPES)
@pytest.mark.parametrize(
    ("scale", "clip_range", "dual_clip"), [(0.3, 0.2, 3.0), (1.5, 0.2, 3.0), (1.5, 0.1, 1.5), (20.0, 0.2, 1e12)]
)
def test_ppo_loss(lengths: tuple[int, ...], width: int, scale: float, clip_range: float, dual_clip: float) -> None:
    """Schulman et al. 2017, eq. 7: min(ρA, clip(ρ, 1-ε, 1+ε)A); Ye et al. 2020, eq. 5: at least cA where A < 0."""
    mask = mask_of(lengths, width)
    new, old, advantages = (draw(mask.shape, seed, mask, s) for seed, s in ((0, scale), (1, scale), (2, 1.0)))
    total, clipped, ratios, kl = 0.0, 0, 0.0, 0.0
    slope = [[0.0] * width for _ in lengths]
    for i, t in real(mask):
        a, difference = advantages[i, t].item(), (new[i, t] - old[i, t]).item()
        limited = min(max(difference, -LIMIT), LIMIT)
        ratio = math.exp(limited)
        inside = 1 - clip_range if ratio < 1 - clip_range else 1 + clip_range if ratio > 1 + clip_range else ratio
        objective, moves = ratio * a, limited == difference
        if inside * a < objective:
            objective, moves = inside * a, False
        if a < 0 and objective < dual_clip * a:
            objective, moves = dual_clip * a, False
        total += objective
        slope[i][t] = -ratio * a / 7.0 if moves else 0.0
        clipped += inside != ratio
        ratios += ratio
        kl += ratio - 1 - limited
    _, metrics = ppo_loss(new, old, advantages, mask, 7.0, clip_range, dual_clip)
    loss, found = gradient(lambda x: ppo_loss(x, old, advantages, mask, 7.0, clip_range, dual_clip)[0], new)
    assert loss == pytest.approx(-total / 7.0, abs=1e-12, rel=1e-12)
    same(found, slope)
    assert metrics["clipped"] == clipped
    assert metrics["ratio"] == pytest.approx(ratios, rel=1e-9)
    assert metrics["approx_kl"] == pytest.approx(kl, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("lengths", "width"), SHAPES)
@pytest.mark.parametrize(("scale", "clip_range"), [(0.1, 0.2), (1.0, 0.2), (1.0, 0.5)])
def test_value_loss(lengths: tuple[int, ...], width: int, scale: float, clip_range: float) -> None:
    """OpenAI baselines' ppo2: ½·max((V - G)², (V_clip - G)²), V_clip = V_old + clip(V - V_old, -ε, ε)."""
    mask = mask_of(lengths, width)
    new, old, returns = (draw(mask.shape, seed, mask, s) for seed, s in ((3, scale), (4, scale), (5, 1.0)))
    total, outside = 0.0, 0
    slope = [[0.0] * width for _ in lengths]
    for i, t in real(mask):
        v, v_old, g = new[i, t].item(), old[i, t].item(), returns[i, t].item()
        v_clip = max(v_old - clip_range, min(v_old + clip_range, v))
        free, bound = (v - g) ** 2, (v_clip - g) ** 2
        total += max(free, bound) / 2
        outside += abs(v - v_old) > clip_range
        slope[i][t] = 0.0 if bound > free else (v - g) / 3.0
    _, metrics = value_loss(new, old, returns, mask, 3.0, clip_range)
    loss, found = gradient(lambda x: value_loss(x, old, returns, mask, 3.0, clip_range)[0], new)
    assert loss == pytest.approx(total / 3.0, abs=1e-12, rel=1e-12)
    same(found, slope)
    assert metrics["value_clipped"] == outside


def test_kl_estimators() -> None:
    """Schulman 2020, with r = π_ref/π on samples of π: k1 = -log r, k2 = (log r)²/2, k3 = r - 1 - log r."""
    policy, reference = torch.randn(2, 50, dtype=torch.float64), torch.randn(2, 50, dtype=torch.float64)
    policy[0, 0], policy[0, 1] = 40.0, -40.0  # beyond the clamp of ±20
    for i, t in real(torch.ones_like(policy, dtype=torch.bool)):
        log_r = min(max((reference[i, t] - policy[i, t]).item(), -LIMIT), LIMIT)
        expected = {"k1": -log_r, "k2": log_r * log_r / 2, "k3": math.exp(log_r) - 1 - log_r}
        for name, value in expected.items():
            found = kl_estimate(policy, reference, name)  # type: ignore[arg-type]
            assert found[i, t].item() == pytest.approx(value, abs=1e-12, rel=1e-12)


@pytest.mark.parametrize(("lengths", "width"), SHAPES)
def test_kl_loss(lengths: tuple[int, ...], width: int) -> None:
    """k2 summed over real tokens, over the denominator; its slope is log(π/π_ref). The metric is the sum of k3."""
    mask = mask_of(lengths, width)
    policy, reference = draw(mask.shape, 6, mask), draw(mask.shape, 7, mask)
    total, k3, slope = 0.0, 0.0, [[0.0] * width for _ in lengths]
    for i, t in real(mask):
        d = (policy[i, t] - reference[i, t]).item()
        total += d * d / 2
        k3 += math.exp(-d) - 1 + d
        slope[i][t] = d / 11.0
    _, metrics = kl_loss(policy, reference, mask, 11.0)
    loss, found = gradient(lambda x: kl_loss(x, reference, mask, 11.0)[0], policy)
    assert loss == pytest.approx(total / 11.0, abs=1e-12, rel=1e-12)
    same(found, slope)
    assert metrics["kl"] == pytest.approx(k3, abs=1e-12, rel=1e-12)


def test_kl_loss_has_the_gradient_of_the_kl_and_k3_that_of_the_other_direction() -> None:
    """Over a whole vocabulary, each token with its own probability: E[∇k2] = ∇KL(π‖π_ref), E[∇k3] = ∇KL(π_ref‖π)."""
    torch.manual_seed(8)
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(6, dtype=torch.float64).log_softmax(-1)
    p, q = [float(x) for x in logits.detach().softmax(-1)], [float(x) for x in reference.exp()]
    kl = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    towards = [x * (math.log(x / y) - kl) for x, y in zip(p, q, strict=True)]  # ∂KL(π‖π_ref)/∂logit
    away = [x - y for x, y in zip(p, q, strict=True)]  # ∂KL(π_ref‖π)/∂logit
    one = torch.ones(1, 1, dtype=torch.bool)
    k2_mean, k3_mean = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for token in range(6):
        logprob = logits.log_softmax(-1)[token].view(1, 1)
        loss = kl_loss(logprob, reference[token].view(1, 1), one, 1.0)[0]
        k2_mean += p[token] * torch.autograd.grad(loss, logits, retain_graph=True)[0]
        k3 = kl_estimate(logprob, reference[token].view(1, 1), "k3").sum()
        k3_mean += p[token] * torch.autograd.grad(k3, logits)[0]
    assert k2_mean.tolist() == pytest.approx(towards, abs=1e-12)
    assert k3_mean.tolist() == pytest.approx(away, abs=1e-12)


@pytest.mark.parametrize(("lengths", "width"), SHAPES)
def test_full_kl_loss(lengths: tuple[int, ...], width: int) -> None:
    """KL(π_ref‖π) = Σ_v π_ref(v)·log(π_ref(v)/π(v)) at each real position; its slope in the logits is π - π_ref."""
    mask = mask_of(lengths, width)
    logits, reference = draw((*mask.shape, 4), 9, mask), draw((*mask.shape, 4), 10, mask)
    total, slope = 0.0, torch.zeros_like(logits)
    for i, t in real(mask):
        p, q = ([math.exp(x) for x in row[i, t].tolist()] for row in (logits, reference))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        total += sum(y * math.log(y / x) for x, y in zip(p, q, strict=True))
        slope[i, t] = torch.tensor([(x - y) / 5.0 for x, y in zip(p, q, strict=True)])
    logits.requires_grad_()
    loss = full_kl_loss(logits, reference, mask, 5.0)
    loss.backward()
    assert loss.item() == pytest.approx(total / 5.0, abs=1e-6)  # computed in float32
    torch.testing.assert_close(logits.grad, slope, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.05),  # on target: unchanged
        (6.6, 0.05 * (1 + 0.1 * 64 / 1000)),
        (5.7, 0.05 * (1 - 0.05 * 64 / 1000)),
        (60.0, 0.05 * (1 + 0.2 * 64 / 1000)),  # the error is clipped
        (0.0, 0.05 * (1 - 0.2 * 64 / 1000)),
        (-3.0, 0.05 * (1 - 0.2 * 64 / 1000)),  # an estimate may be negative
    ],
)
def test_adapted_kl_coef(kl: float, expected: float) -> None:
    """Ziegler et al. 2019, sec. 2.2: e = clip(KL/target - 1, -0.2, 0.2), β ← β·(1 + K·e), K = n/H as in their code."""
    assert adapted_kl_coef(0.05, kl, 6.0, 64, 1000) == pytest.approx(expected, rel=1e-12)
