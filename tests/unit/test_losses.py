"""PPO and DPO losses: values worked by hand, signs, masks, clips, gradients. The papers' loops are in tests/parity."""

from __future__ import annotations

import math

import pytest
import torch

from trlhf.losses.dpo import chosen_nll, dpo_loss
from trlhf.losses.ppo import adapted_kl_coef, full_kl_loss, kl_estimate, kl_loss, ppo_loss, value_loss

MASK = torch.tensor([[True, True, False]])


def loss_of(log_ratio: float, advantage: float, **options: float) -> float:
    old = torch.zeros(1, 1, dtype=torch.float64)
    loss, _ = ppo_loss(old + log_ratio, old, old + advantage, torch.ones(1, 1, dtype=torch.bool), 1.0, **options)
    return loss.item()


def test_ppo_loss_by_hand() -> None:
    assert loss_of(0.0, 2.0) == pytest.approx(-2.0)
    assert loss_of(math.log(1.1), 1.0) == pytest.approx(-1.1)
    assert loss_of(math.log(1.5), 1.0) == pytest.approx(-1.2)  # clipped above
    assert loss_of(math.log(0.5), 1.0) == pytest.approx(-0.5)  # pessimistic: not clipped below for A > 0
    assert loss_of(math.log(0.5), -1.0) == pytest.approx(0.8)  # clipped below for A < 0
    assert loss_of(math.log(2.0), -1.0) == pytest.approx(2.0)
    assert loss_of(math.log(9.0), -1.0) == pytest.approx(3.0)  # dual clip
    assert loss_of(50.0, -1.0, dual_clip=1e12) == pytest.approx(math.exp(20))  # the log-ratio is clamped


def test_ppo_gradient_raises_what_was_good_and_ignores_masked_tokens() -> None:
    logprobs = torch.zeros(1, 3, requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, 1.0]])
    loss, metrics = ppo_loss(logprobs, torch.zeros(1, 3), advantages, MASK, 2.0)
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-0.5, 0.5, 0.0]]
    assert metrics["ratio"] == 2.0 and metrics["clipped"] == 0.0


def test_nan_behind_the_mask_stays_there() -> None:
    logprobs = torch.tensor([[0.0, 0.0, float("nan")]], requires_grad=True)
    loss, _ = ppo_loss(logprobs, torch.zeros(1, 3), torch.ones(1, 3), MASK, 2.0)
    loss.backward()
    assert torch.isfinite(loss) and logprobs.grad is not None
    assert logprobs.grad[0, :2].tolist() == [-0.5, -0.5]


def test_an_empty_mask_gives_zero() -> None:
    loss, _ = ppo_loss(torch.zeros(1, 3), torch.zeros(1, 3), torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.bool), 1.0)
    assert loss.item() == 0.0


def test_gradcheck() -> None:
    torch.manual_seed(0)
    new = (0.1 * torch.randn(2, 3, dtype=torch.float64)).requires_grad_()
    old, advantages = torch.zeros(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert torch.autograd.gradcheck(lambda x: ppo_loss(x, old, advantages, mask, 4.0)[0], (new,))
    assert torch.autograd.gradcheck(lambda x: kl_loss(x, old, mask, 4.0)[0], (new,))
    values = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, advantages, mask, 4.0)[0], (values,))
    four = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(lambda *x: dpo_loss(*x, 3.0)[0], four)
    lengths = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: chosen_nll(x, lengths, 4.0), four[:1])


def test_gradcheck_on_both_sides_of_every_clip() -> None:
    """Log-ratios and value steps far from the kinks at ±0.2 (and, for A < 0, at a ratio of 3), inside and outside."""
    new = torch.tensor([[-1.0, -0.1, 0.1, 1.0, 2.0]] * 2, dtype=torch.float64, requires_grad=True)
    old = torch.zeros(2, 5, dtype=torch.float64)
    advantages = torch.tensor([[0.7] * 5, [-0.7] * 5], dtype=torch.float64)
    mask = torch.ones(2, 5, dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda x: ppo_loss(x, old, advantages, mask, 4.0)[0], (new,))
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, advantages, mask, 4.0)[0], (new,))


def test_gradcheck_of_the_full_kl() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(2, 3, 4, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    loss = lambda x: full_kl_loss(x, reference, mask, 4.0)  # noqa: E731
    # It computes in float32: steps of 1e-2 keep rounding and curvature below 1e-4.
    assert torch.autograd.gradcheck(loss, (logits,), eps=1e-2, atol=1e-4)


def test_nan_behind_the_mask_gives_no_gradient() -> None:
    """One NaN in the gradient of a masked position would be in the gradient of every parameter."""
    nan = float("nan")
    old, returns = torch.tensor([[0.0, 0.0, nan]]), torch.tensor([[1.0, 1.0, nan]])
    values = torch.tensor([[0.1, 0.0, nan]], requires_grad=True)
    loss, _ = value_loss(values, old, returns, MASK, 2.0)
    assert torch.autograd.grad(loss, values)[0].tolist() == [[pytest.approx(-0.45), -0.5, 0.0]]
    loss, _ = kl_loss(values, old, MASK, 2.0)
    assert torch.autograd.grad(loss, values)[0].tolist() == [[pytest.approx(0.05), 0.0, 0.0]]
    logits = torch.zeros(1, 3, 2)
    logits[0, 2] = nan
    found = logits.clone().requires_grad_()
    assert (torch.autograd.grad(full_kl_loss(found, logits, MASK, 2.0), found)[0] == 0).all()


def test_value_loss_by_hand() -> None:
    one = torch.ones(1, 1, dtype=torch.bool)
    # |1 - 0| > 0.2, so the clipped value 0.2 is farther from the return 2: (0.2 - 2)² / 2
    loss, metrics = value_loss(torch.tensor([[1.0]]), torch.tensor([[0.0]]), torch.tensor([[2.0]]), one, 1.0)
    assert loss.item() == pytest.approx(0.5 * 1.8**2)
    assert metrics["value_clipped"] == 1.0
    loss, _ = value_loss(torch.tensor([[0.1]]), torch.tensor([[0.0]]), torch.tensor([[2.0]]), one, 1.0)
    assert loss.item() == pytest.approx(0.5 * 1.9**2)


def test_kl_estimators_have_the_right_mean_and_gradient() -> None:
    """On samples of the policy, k1 and k3 average to the KL, and the gradient of k2 is the KL's (k3's is not)."""
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.0, 0.4, -0.4], dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    for estimator in ("k1", "k3"):
        mean = (policy.exp() * kl_estimate(policy, reference, estimator)).sum()  # type: ignore[arg-type]
        assert mean.item() == pytest.approx(exact.item(), abs=1e-12)
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
    weights = policy.exp().detach()  # as if every token had been sampled with its own probability
    (found,) = torch.autograd.grad((weights * kl_estimate(policy, reference, "k2")).sum(), logits)
    torch.testing.assert_close(found, expected)


def test_full_kl_is_zero_at_the_reference_and_pulls_towards_it() -> None:
    reference = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    mask = torch.tensor([[True, False]])
    assert full_kl_loss(reference, reference, mask, 1.0).item() == pytest.approx(0.0, abs=1e-7)
    logits = torch.zeros(1, 2, 2, requires_grad=True)
    loss = full_kl_loss(logits, reference, mask, 1.0)
    p = torch.tensor([1.0, 0.0]).softmax(-1)
    assert loss.item() == pytest.approx(float((p * (p.log() - math.log(0.5))).sum()), abs=1e-6)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[0, 0, 0] < 0 < logits.grad[0, 0, 1] and (logits.grad[0, 1] == 0).all()


def test_dpo_is_log_two_at_the_reference_and_pulls_apart() -> None:
    chosen, rejected = torch.tensor([-3.0], requires_grad=True), torch.tensor([-4.0], requires_grad=True)
    loss, metrics = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), 1.0)
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.05) and rejected.grad.item() == pytest.approx(0.05)
    assert metrics["chosen_reward"] == 0.0


def test_dpo_by_hand() -> None:
    tensors = [torch.tensor(x) for x in ([-1.0], [-2.0], [-1.5], [-1.5])]
    loss, metrics = dpo_loss(*tensors, 2.0, beta=0.5)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.5)) / 2)  # 0.5·((-1 + 1.5) - (-2 + 1.5)) = 0.5
    assert metrics["correct"] == 1.0


def test_chosen_nll_is_per_token() -> None:
    found = chosen_nll(torch.tensor([-6.0, -2.0]), torch.tensor([3.0, 2.0]), 2.0)
    assert float(found) == pytest.approx((2.0 + 1.0) / 2)


def test_the_kl_coefficient_moves_by_at_most_a_fifth_of_the_horizon_s_share() -> None:
    assert adapted_kl_coef(0.1, 5.0, 5.0, 100, 1000) == pytest.approx(0.1)
    assert adapted_kl_coef(0.1, 5.5, 5.0, 100, 1000) == pytest.approx(0.1 * 1.01)  # too far away: pulled more
    assert adapted_kl_coef(0.1, 50.0, 5.0, 100, 1000) == pytest.approx(0.1 * 1.02)
    assert adapted_kl_coef(0.1, 0.0, 5.0, 100, 1000) == pytest.approx(0.1 * 0.98)
