"""When labels stop paying, and when updates must stop: each rule on either side of its bound."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from trlhf.targeting.stopping import (
    anchor_kl_over_budget,
    anchors_fell,
    frontier_used_up,
    held_out_gain_covers_zero,
    labels_buy_too_little,
    longer_without_accuracy,
    outliers_doubled,
)

UP, FLAT, DOWN = np.linspace(0.05, 0.15, 20), np.linspace(-0.1, 0.1, 20), np.linspace(-0.15, -0.05, 20)

# ---- labels ----


@pytest.mark.parametrize(
    ("drops", "patience", "stops"),
    [
        ([], 1, False),
        ([2.0], 1, False),
        ([2.0, 0.11], 1, False),
        ([2.0, 0.09], 1, True),
        ([2.0, 0.1], 1, False),
        ([2.0, 4.0, 0.15], 1, False),  # against the first round, not the best one
        ([2.0, 0.09, 0.5], 1, False),  # the last round counts
        ([2.0, 0.09], 2, False),
        ([2.0, 0.5, 0.09], 2, False),
        ([2.0, 0.09, 0.08], 2, True),
        ([0.0, 0.0], 1, False),  # nothing to compare with
    ],
)
def test_labels_stop_where_they_tell_little(drops: Sequence[float], patience: int, stops: bool) -> None:
    assert (labels_buy_too_little(drops, 7, patience=patience) is not None) == stops


def test_the_refund_is_said() -> None:
    reason = labels_buy_too_little([2.0, 0.09], 37)
    assert reason == (
        "labels stopped paying: predicted drop of the target's variance per label 0.09, under 5% of the first round's "
        "2; 37 labels of the budget are handed back"
    )
    assert str(labels_buy_too_little([2.0, 0.3, 0.2], 1, share=0.2, patience=2)).endswith(
        "under 20% of the first round's 2 in 2 rounds in a row; 1 label of the budget is handed back"
    )


@pytest.mark.parametrize(
    ("gains", "stops"),
    [
        ([FLAT], False),
        ([FLAT, FLAT], True),
        ([DOWN, DOWN], True),  # worse is no reason to buy more
        ([UP, FLAT], False),
        ([FLAT, UP], False),
        ([UP, FLAT, FLAT], True),
        ([FLAT, None, FLAT], False),
        ([FLAT, FLAT[:7]], False),  # too few items say nothing
        ([], False),
    ],
)
def test_two_rounds_without_a_held_out_gain_stop(gains: Sequence[np.ndarray | None], stops: bool) -> None:
    assert (held_out_gain_covers_zero(gains, 7) is not None) == stops


def test_the_intervals_are_said_and_reproducible() -> None:
    reason = str(held_out_gain_covers_zero([FLAT, DOWN], 12))
    assert reason == held_out_gain_covers_zero([FLAT, DOWN], 12)
    assert "held-out gain in nats per item 0.000 [-0.02" in reason and ", -0.100 [" in reason
    assert reason.endswith("90% interval not above 0 in 2 rounds in a row; 12 labels of the budget are handed back")


def test_one_round_without_any_gain_is_seen_most_of_the_time() -> None:
    rng = np.random.default_rng(0)
    stops = [held_out_gain_covers_zero([rng.normal(size=20)], 1, patience=1) is not None for _ in range(60)]
    helps = [held_out_gain_covers_zero([rng.normal(1, 1, size=20)], 1, patience=1) is not None for _ in range(60)]
    assert np.mean(stops) > 0.85 and np.mean(helps) < 0.1


# ---- updates ----


@pytest.mark.parametrize(
    ("outliers", "rollouts", "stops"),
    [
        ([10], [1000], False),
        ([10, 19], [1000, 1000], False),
        ([10, 30], [1000, 1000], True),
        ([100, 199], [10000, 10000], False),
        ([100, 200], [10000, 10000], True),
        ([10, 60, 10], [1000, 1000, 1000], False),
        ([10, 10, 30], [1000, 1000, 1000], True),
        ([2, 4], [200, 200], False),  # twice as many, by chance
        ([0, 1], [1000, 1000], False),
        ([0, 20], [1000, 1000], True),
        ([10, 60], [1000, 6000], False),  # shares, not counts
        ([0, 0], [0, 10], False),
    ],
)
def test_outliers_that_double_stop(outliers: Sequence[int], rollouts: Sequence[int], stops: bool) -> None:
    assert (outliers_doubled(outliers, rollouts) is not None) == stops


def test_a_share_that_stays_seldom_stops() -> None:
    rng = np.random.default_rng(0)
    alarms = [outliers_doubled(rng.binomial(1024, 0.01, 2).tolist(), [1024, 1024]) is not None for _ in range(2000)]
    assert np.mean(alarms) < 0.04


@pytest.mark.parametrize(
    ("lengths", "accuracies", "stops"),
    [
        ([100], [0.5], False),
        ([100, 124], [0.5, 0.5], False),
        ([100, 125], [0.5, 0.5], True),
        ([100, 150], [0.5, 0.52], False),
        ([100, 150], [0.5, 0.4], True),
        ([100, 150], [None, 0.4], False),
        ([100, 150], [0.5, None], False),
        ([100, 150, 110], [0.5, 0.5, 0.5], False),
        ([100, 115, 130], [0.5, None, 0.5], True),  # against the first round, not the one before
    ],
)
def test_longer_and_not_better_stops(lengths: Sequence[float], accuracies: Sequence[float | None], stops: bool) -> None:
    assert (longer_without_accuracy(lengths, accuracies) is not None) == stops


@pytest.mark.parametrize(
    ("sums", "stops"), [([50.0], False), ([50, 5.0], False), ([50, 4.9], True), ([50, 4, 20], False), ([0, 0], False)]
)
def test_a_frontier_used_up_stops(sums: Sequence[float], stops: bool) -> None:
    assert (frontier_used_up(sums) is not None) == stops


def test_anchors_that_fall_by_more_than_a_standard_error_stop() -> None:
    before = np.ones(16)
    one = np.where(np.arange(16) < 1, 0.0, 1.0)  # mean -1/16, standard error 1/16
    two = np.where(np.arange(16) < 2, 0.0, 1.0)  # mean -2/16, standard error 0.085
    assert anchors_fell(before, one) is None and anchors_fell(before, two) is not None
    assert anchors_fell(before, two, standard_errors=2) is None
    assert anchors_fell(two, before) is None and anchors_fell(before, before) is None
    assert anchors_fell(before, before - 0.1) is not None  # no spread at all
    assert anchors_fell(np.ones(1), np.zeros(1)) is None


def test_anchors_are_compared_pair_by_pair() -> None:
    before = np.tile([0.0, 1.0], 50)  # a spread between prompts that both have
    after = before - np.linspace(0, 0.04, 100)
    assert anchors_fell(before, after) is not None


@pytest.mark.parametrize(
    ("kls", "stops"),
    [
        ([0.2], False),
        ([0.2, 0.2], True),
        ([0.2, 0.1, 0.2], False),
        ([0.1, 0.1], False),
        ([0.2, math.nan], True),
        ([0.2, 0.2, 0.01], False),
    ],
)
def test_two_steps_over_the_anchors_budget_stop(kls: Sequence[float], stops: bool) -> None:
    assert (anchor_kl_over_budget(kls, 0.1) is not None) == stops


def test_every_reason_names_figures_and_a_remedy() -> None:
    assert outliers_doubled([10, 50], [1000, 1000]) == (
        "the policy leaves what the reward model knows: 5.0% of the rollouts are outliers, 1.0% in the first round, "
        "grown 2 times or more; lower rl.learning_rate, raise rl.kl_coef, or buy labels on what it writes now"
    )
    assert longer_without_accuracy([100, 140], [0.5, 0.45]) == (
        "longer, not better: 140 tokens a response, 100 in the first round, and accuracy 45.0% after 50.0%; lower "
        "rl.max_new_tokens, raise rl.kl_coef or rl.uncertainty_penalty"
    )
    assert frontier_used_up([50, 4.5]) == (
        "nothing left to learn here: the frontier is worth 4.5 mixed groups, under 10% of the first round's 50; stop, "
        "or give other prompts"
    )
    assert anchors_fell(np.ones(4), np.array([1, 0.5, 0.5, 0.5])) == (
        "forgetting: the 4 anchor prompts fell from 1 to 0.625, by more than 1 standard error (0.12); raise "
        "rl.anchor_coef or rl.anchor_prompts, or lower rl.learning_rate"
    )
    assert anchor_kl_over_budget([0.3, 0.25], 0.1) == (
        "the anchors move: KL 0.25 nats per token, over the budget of 0.1 in 2 steps in a row; raise rl.anchor_coef or "
        "rl.anchor_prompts, or lower rl.learning_rate"
    )


def test_errors_name_value_and_rule() -> None:
    with pytest.raises(ValueError, match="labels_buy_too_little: share=5 must be between 0 and 1"):
        labels_buy_too_little([1.0], 1, share=5)
    with pytest.raises(ValueError, match="labels_buy_too_little: patience=0 must be at least 1"):
        labels_buy_too_little([1.0], 1, patience=0)
    with pytest.raises(ValueError, match="held_out_gain_covers_zero: confidence=90 must be between 0 and 1"):
        held_out_gain_covers_zero([], 1, confidence=90)
    with pytest.raises(ValueError, match=r"outliers_doubled: \[5\] of \[4\] cannot be"):
        outliers_doubled([5], [4])
    with pytest.raises(ValueError, match=r"outliers_doubled: \[5\] of \[6, 7\] cannot be"):
        outliers_doubled([5], [6, 7])
    with pytest.raises(ValueError, match="outliers_doubled: factor=1 must be above 1"):
        outliers_doubled([1], [2], factor=1)
    with pytest.raises(ValueError, match="longer_without_accuracy: 1 lengths and 2 accuracies"):
        longer_without_accuracy([1], [0.5, 0.5])
    with pytest.raises(ValueError, match="frontier_used_up: share=0 must be between 0 and 1"):
        frontier_used_up([1.0], share=0)
    with pytest.raises(ValueError, match="anchors_fell: 2 values before and 3 after; give the same prompts"):
        anchors_fell(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="anchor_kl_over_budget: budget=0 must be above 0"):
        anchor_kl_over_budget([0.1], 0)
    with pytest.raises(ValueError, match="anchor_kl_over_budget: steps=0 must be at least 1"):
        anchor_kl_over_budget([0.1], 0.1, 0)
