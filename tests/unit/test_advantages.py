"""GAE, leave-one-out, whitening and explained variance, by hand-worked values and identities."""

from __future__ import annotations

import math

import pytest
import torch

from trlhf.advantages import explained_variance, gae, leave_one_out, whiten


def slow_gae(
    rewards: list[float], values: list[float], gamma: float, gae_lambda: float
) -> tuple[list[float], list[float]]:
    """Compute Schulman et al. 2016, eq. 16, as the double sum it is."""
    n = len(rewards)
    following = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(n)]
    advantages = [sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0)])
def test_gae_is_the_double_sum_of_the_paper(gamma: float, gae_lambda: float) -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    lengths = [6, 3, 1]
    mask = torch.arange(6)[None] < torch.tensor(lengths)[:, None]
    advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
    for i, n in enumerate(lengths):
        a, g = slow_gae(rewards[i, :n].tolist(), values[i, :n].tolist(), gamma, gae_lambda)
        assert advantages[i, :n].tolist() == pytest.approx(a, abs=1e-9)
        assert returns[i, :n].tolist() == pytest.approx(g, abs=1e-9)
        assert (advantages[i, n:] == 0).all() and (returns[i, n:] == 0).all()


def test_gae_with_lambda_one_is_return_minus_value() -> None:
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    values = torch.tensor([[0.3, 0.6, 0.9]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 1.0, 1.0)
    torch.testing.assert_close(returns, torch.ones(1, 3))
    torch.testing.assert_close(advantages, 1 - values)


def test_what_stands_behind_the_mask_does_not_matter() -> None:
    mask = torch.tensor([[True, True, False]])
    first = gae(torch.tensor([[0.0, 1.0, 5.0]]), torch.tensor([[0.1, 0.2, 9.0]]), mask)
    second = gae(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.1, 0.2, 0.0]]), mask)
    torch.testing.assert_close(first, second)
    nan = float("nan")
    third = gae(torch.tensor([[0.0, 1.0, nan]]), torch.tensor([[0.1, 0.2, nan]]), mask)
    torch.testing.assert_close(third, second)


def test_leave_one_out_subtracts_the_mean_of_the_others() -> None:
    found = leave_one_out(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
    torch.testing.assert_close(found[0], torch.tensor([1 - 1 / 3, -2 / 3, -2 / 3, 1 - 1 / 3]))
    assert (found[1] == 0).all()  # a flat group teaches nothing
    with pytest.raises(ValueError, match="at least 2 samples"):
        leave_one_out(torch.ones(3, 1))


def test_whitening_is_over_the_real_positions_and_has_mean_zero() -> None:
    values = torch.tensor([[1.0, 2.0, 99.0], [3.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    found = whiten(values, mask)
    real = found[mask]
    assert real.mean().item() == pytest.approx(0, abs=1e-6)
    assert real.std(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    assert (found[~mask] == 0).all()
    assert torch.isfinite(whiten(torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool))).all()


def test_explained_variance_is_one_for_the_truth_and_zero_for_a_constant() -> None:
    mask = torch.tensor([[True, True, True, False]])
    returns = torch.tensor([[1.0, 2.0, 6.0, float("nan")]])
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.full((1, 4), 5.0), returns, mask) == pytest.approx(0.0, abs=1e-6)
    assert explained_variance(-returns, returns, mask) == pytest.approx(1 - 4, abs=1e-6)
    assert explained_variance(returns / 2, returns, mask) == pytest.approx(0.75, abs=1e-6)


def test_explained_variance_of_returns_that_do_not_vary_is_nan() -> None:
    for mask in (torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool)):
        assert math.isnan(explained_variance(torch.tensor([[0.1, 0.2, 0.4]]), torch.ones(1, 3), mask))
    one = torch.tensor([[True, False, False]])
    assert math.isnan(explained_variance(torch.tensor([[0.1, 0.2, 0.4]]), torch.tensor([[0.0, 1.0, 2.0]]), one))
