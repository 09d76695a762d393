"""Losses of the reward model: values worked by hand, signs, identities. The papers' loops are in tests/parity."""

from __future__ import annotations

import math

import pytest
import torch

from trlhf.losses.reward import preference_loss, verdict_loss


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def row(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_verdict_by_hand() -> None:
    scores = column(math.log(3.0), -math.log(3.0))  # probabilities 3/4 and 1/4
    loss, metrics = verdict_loss(scores, row(1, 1), torch.ones_like(scores), denominator=2.0)
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2, abs=1e-12)
    assert metrics == {"accuracy": 0.5, "margin": pytest.approx(0.0)}


def test_an_undecided_score_costs_log_2_whatever_the_flip_rate() -> None:
    for flip_rate in (0.0, 0.1, 0.4):
        loss, _ = verdict_loss(column(0.0), row(1), column(1.0), 1.0, flip_rate)
        assert loss.item() == pytest.approx(math.log(2), abs=1e-12)


def test_a_flip_rate_bounds_what_one_wrong_label_can_cost() -> None:
    sure_and_wrong, _ = verdict_loss(column(200.0), row(0), column(1.0), 1.0, flip_rate=0.05)
    assert sure_and_wrong.item() == pytest.approx(-math.log(0.05), abs=1e-9)
    sure_and_right, _ = verdict_loss(column(200.0), row(1), column(1.0), 1.0, flip_rate=0.05)
    assert sure_and_right.item() == pytest.approx(-math.log(0.95), abs=1e-9)
    some, _ = verdict_loss(column(1.0), row(1), column(1.0), 1.0, flip_rate=0.1)
    assert some.item() == pytest.approx(-math.log(0.1 + 0.8 / (1 + math.exp(-1))), abs=1e-12)


def test_extreme_scores_keep_loss_and_gradient_finite() -> None:
    for flip_rate in (0.0, 0.01):
        scores = torch.tensor([[1e4], [-1e4]], requires_grad=True)
        loss, _ = verdict_loss(scores, torch.tensor([0.0, 1.0]), torch.ones(2, 1), 2.0, flip_rate)
        loss.backward()
        assert torch.isfinite(loss)
        assert scores.grad is not None and torch.isfinite(scores.grad).all()


def test_a_preference_by_hand() -> None:
    loss, metrics = preference_loss(column(2.0), column(1.0), row(1), column(1.0), denominator=1.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-12)
    assert metrics == {"accuracy": 1.0, "margin": pytest.approx(1.0)}
    cooler, _ = preference_loss(column(2.0), column(1.0), row(1), column(1.0), denominator=1.0, temperature=2.0)
    assert cooler.item() == pytest.approx(math.log(1 + math.exp(-0.5)), abs=1e-12)


def test_a_tie_is_half_a_vote_each_way_and_pulls_scores_together() -> None:
    first, second = column(2.0).requires_grad_(), column(1.0)

    def loss(preference: float) -> torch.Tensor:
        return preference_loss(first, second, row(preference), column(1.0), denominator=1.0, flip_rate=0.1)[0]

    assert loss(0.5).item() == pytest.approx((loss(1.0).item() + loss(0.0).item()) / 2, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss(0.5), first)
    assert gradient.item() > 0  # a step against it lowers the higher score


def test_swapping_the_two_sides_changes_nothing() -> None:
    first, second, weights = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5, 3)
    preferences = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0])
    one, _ = preference_loss(first, second, preferences, weights, denominator=5.0, flip_rate=0.02)
    other, _ = preference_loss(second, first, 1 - preferences, weights, denominator=5.0, flip_rate=0.02)
    assert one.item() == pytest.approx(other.item(), abs=1e-6)


def test_gradients_raise_what_is_right_and_what_is_chosen() -> None:
    scores = torch.zeros(2, 1, requires_grad=True)
    verdict_loss(scores, torch.tensor([1.0, 0.0]), torch.ones(2, 1), 2.0, 0.1)[0].backward()
    assert scores.grad is not None and scores.grad[0] < 0 < scores.grad[1]
    first, second = torch.zeros(1, 1, requires_grad=True), torch.zeros(1, 1, requires_grad=True)
    preference_loss(first, second, torch.tensor([1.0]), torch.ones(1, 1), denominator=1.0)[0].backward()
    assert first.grad is not None and second.grad is not None
    assert first.grad.item() < 0 < second.grad.item()


def test_gradcheck() -> None:
    torch.manual_seed(0)
    first = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    second = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 3, dtype=torch.float64)
    labels = row(1, 0, 1, 0)
    preferences = row(1, 0, 0.5, 1)
    for flip_rate in (0.0, 0.1):
        assert torch.autograd.gradcheck(lambda s, e=flip_rate: verdict_loss(s, labels, weights, 3.0, e)[0], first)
        assert torch.autograd.gradcheck(
            lambda a, b, e=flip_rate: preference_loss(
                a, b, preferences, weights, denominator=3.0, temperature=1.7, flip_rate=e
            )[0],
            (first, second),
        )


def test_a_weight_of_zero_leaves_a_label_out_of_its_head_only() -> None:
    scores = torch.tensor([[0.3, 0.3], [5.0, 5.0]], requires_grad=True)
    weights = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    loss, _ = verdict_loss(scores, torch.tensor([1.0, 0.0]), weights, 1.0)
    loss.backward()
    assert scores.grad is not None
    assert scores.grad[1, 0] == 0
    assert scores.grad[1, 1] > 0.9
    assert scores.grad[0, 0] == scores.grad[0, 1] != 0


def test_microbatches_with_the_step_s_denominator_add_up() -> None:
    torch.manual_seed(1)
    scores, weights, labels = torch.randn(7, 2), torch.rand(7, 2), (torch.rand(7) > 0.5).float()
    whole, _ = verdict_loss(scores, labels, weights, 7.0, 0.05)
    parts = [
        verdict_loss(scores[rows], labels[rows], weights[rows], 7.0, 0.05)[0]
        for rows in (slice(0, 1), slice(1, 4), slice(4, 7))
    ]
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), abs=1e-6)


def test_nothing_to_learn_from_is_zero_and_not_nan() -> None:
    loss, metrics = verdict_loss(torch.zeros(0, 3), torch.zeros(0), torch.zeros(0, 3), 1.0)
    assert loss.item() == 0
    assert all(math.isnan(value) for value in metrics.values())


@pytest.mark.parametrize("flip_rate", [-0.1, 0.5, 0.7])
def test_an_impossible_flip_rate_is_refused(flip_rate: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 0.5\)"):
        verdict_loss(torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1), 1.0, flip_rate)
