"""Intervals, tests and calibration measures, by hand and against SciPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from trlhf.evaluation import statistics as stats


@pytest.mark.parametrize(("k", "n"), [(0, 5), (5, 5), (1, 10), (50, 100), (1319, 1319)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_is_scipy_s(k: int, n: int, confidence: float) -> None:
    expected = binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert stats.wilson_interval(k, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_by_hand() -> None:
    # z = 1.96, n = 10, p = 1/2: centre 1/2, half-width 1.96/1.38416 * sqrt(1/40 + 3.8416/400) = 0.26337
    assert stats.wilson_interval(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)


@pytest.mark.parametrize(("k", "n", "confidence"), [(1, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0), (1, 2, 0)])
def test_wilson_refuses_what_is_no_proportion(k: int, n: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        stats.wilson_interval(k, n, confidence)


def test_bootstrap_is_reproducible_and_near_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = stats.bootstrap_interval(values, seed=1)
    assert (low, high) == stats.bootstrap_interval(values, seed=1) != stats.bootstrap_interval(values, seed=2)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    narrow = stats.bootstrap_interval(values, confidence=0.5, seed=1)
    assert low < narrow[0] < narrow[1] < high


def test_bootstrap_of_a_skewed_sample_is_skewed_the_same_way() -> None:
    values = [0.0] * 18 + [1.0] * 2  # means of resamples: Binomial(20, 0.1) / 20, quantiles 0 and 0.25
    assert stats.bootstrap_interval(values) == pytest.approx((0.0, 0.25))


def test_bootstrap_of_a_constant_is_that_constant() -> None:
    assert stats.bootstrap_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    assert stats.bootstrap_interval([1.5]) == (1.5, 1.5)


def test_accuracy_summary() -> None:
    correct = [True] * 5 + [False] * 5
    assert stats.accuracy_summary(correct) == {
        "value": 0.5,
        "low": pytest.approx(0.23659, abs=1e-5),
        "high": pytest.approx(0.76341, abs=1e-5),
        "n": 10,
    }
    boot = stats.accuracy_summary(correct, interval="bootstrap")
    assert (boot["low"], boot["high"]) == pytest.approx((0.2, 0.8))  # the 2.5% quantiles of Binomial(10, 1/2) / 10


def test_win_rate_counts_a_tie_half() -> None:
    rate = stats.win_rate(wins=4, ties=2, losses=4)
    assert (rate["value"], rate["n"]) == (0.5, 10)
    assert rate["low"] > stats.wilson_interval(5, 10)[0] and rate["low"] + rate["high"] == pytest.approx(1)
    decided = stats.win_rate(7, 0, 3)  # a tie less, and it is a proportion like any other
    assert (decided["low"], decided["high"]) == pytest.approx(stats.wilson_interval(7, 10), abs=1e-9)
    assert stats.win_rate(0, 1, 0)["value"] == 0.5 and stats.win_rate(3, 0, 1)["value"] == 0.75
    with pytest.raises(ValueError, match="not all 0"):
        stats.win_rate(0, 0, 0)
    with pytest.raises(ValueError, match="losses=-1"):
        stats.win_rate(2, 0, -1)


def test_the_interval_of_a_paired_difference_is_where_its_score_test_just_passes() -> None:
    wins, losses, n, z = 12, 2, 50, 1.959964
    for delta in stats.paired_difference_interval(wins, losses, n):
        losing = np.linspace(max(0, -delta), (1 - delta) / 2, 200_001)[1:-1]
        likely = wins * np.log(losing + delta) + losses * np.log(losing) + 36 * np.log(1 - 2 * losing - delta)
        lost = losing[likely.argmax()]  # the most likely P(loss), by looking
        assert abs(wins - losses - n * delta) == pytest.approx(
            z * np.sqrt(n * (2 * lost + delta * (1 - delta))), rel=1e-3
        )
    assert stats.paired_difference_interval(0, 0, 5) == pytest.approx((-0.4345, 0.4345), abs=1e-4)
    with pytest.raises(ValueError, match="3, 4 of 6"):
        stats.paired_difference_interval(3, 4, 6)


def test_the_interval_of_a_paired_difference_covers_the_truth() -> None:
    drawn = np.random.default_rng(0).multinomial(59, (0.4, 0.2, 0.4), 2000)
    found = [stats.paired_difference_interval(int(w), int(x), 59) for w, x, _ in drawn]
    assert np.mean([low <= 0.2 <= high for low, high in found]) == pytest.approx(0.95, abs=0.015)


def test_mcnemar_by_hand() -> None:
    before = [1, 1, 0, 0, 0, 0, 0, 0, 1]
    after = [1, 0, 1, 1, 1, 1, 1, 0, 1]
    # 5 gained, 1 lost: p = 2 * (C(6,0) + C(6,1)) / 2^6 = 14/64
    assert stats.mcnemar(before, after) == {"gained": 5, "lost": 1, "p": pytest.approx(14 / 64)}
    assert stats.mcnemar(after, before) == {"gained": 1, "lost": 5, "p": pytest.approx(14 / 64)}
    assert stats.mcnemar(before, before) == {"gained": 0, "lost": 0, "p": 1.0}
    with pytest.raises(ValueError, match="before 2, after 1"):
        stats.mcnemar([1, 0], [1])


def test_auc_by_hand() -> None:
    # pairs (right, wrong): 3>1, 3>2, 2>1, 2=2 (half) of 4
    assert stats.auc([3, 2, 1, 2], [1, 1, 0, 0]) == pytest.approx(3.5 / 4)
    assert stats.auc([1, 2], [0, 1]) == 1.0 and stats.auc([2, 1], [0, 1]) == 0.0 and stats.auc([1, 1], [0, 1]) == 0.5
    assert stats.auc([1, 2], [1, 1]) is None


def test_within_group_auc_pools_over_pairs() -> None:
    scores = [1, 2, 9, 8, 7, 5]
    labels = [0, 1, 0, 0, 1, 1]
    groups = ["a", "a", "b", "b", "b", "c"]  # a: 1 of 1 pair; b: 0 of 2 pairs; c: none
    assert stats.within_group_auc(scores, labels, groups) == pytest.approx(1 / 3)
    assert stats.within_group_auc(scores, labels, list("abcdef")) is None
    assert stats.within_group_auc(scores, labels, np.zeros(6)) == stats.auc(scores, labels)


def test_within_group_auc_ignores_what_only_tells_groups_apart() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(300), 8)
    easy = np.repeat(rng.random(300), 8)
    labels = rng.random(2400) < easy
    overall, within = stats.auc(easy, labels), stats.within_group_auc(easy, labels, groups)
    assert overall is not None and overall > 0.75 and within == 0.5


def test_within_group_auc_matches_a_slow_loop() -> None:
    rng = np.random.default_rng(3)
    scores, labels, groups = rng.integers(0, 5, 200), rng.integers(0, 2, 200), rng.integers(0, 30, 200)
    won = pairs = 0.0
    for i in range(200):
        for j in range(200):
            if groups[i] == groups[j] and labels[i] == 1 and labels[j] == 0:
                pairs += 1
                won += float(scores[i] > scores[j]) + 0.5 * float(scores[i] == scores[j])
    assert stats.within_group_auc(scores, labels, groups) == pytest.approx(won / pairs)


def test_expected_calibration_error_by_hand() -> None:
    # two bins of two: |0.15 - 0.5| and |0.85 - 1|, each with weight 1/2
    assert stats.expected_calibration_error([0.1, 0.9, 0.2, 0.8], [0, 1, 1, 1], bins=2) == pytest.approx(0.25)
    assert stats.expected_calibration_error([0.1, 0.9, 0.2, 0.8], [0, 1, 1, 1], bins=1) == pytest.approx(0.25)
    assert stats.expected_calibration_error([0.0, 0.0, 1.0], [0, 0, 1]) == 0.0
    assert stats.expected_calibration_error([0.0, 1.0], [1, 0]) == 1.0


def test_calibration_bins_have_equal_mass_and_keep_equal_probabilities_together() -> None:
    p = np.array([0.01, 0.02, 0.03, 0.04, 0.9, 0.91, 0.92, 0.93])
    y = np.array([0, 0, 0, 0, 1, 0, 1, 0])
    # equal mass, two bins: |0.025 - 0| and |0.915 - 0.5|
    assert stats.expected_calibration_error(p, y, bins=2) == pytest.approx(0.5 * 0.025 + 0.5 * 0.415)
    tied = [0.5] * 6
    values = {stats.expected_calibration_error(tied, order) for order in ([1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 0, 1])}
    assert values == {0.0}


def test_calibrated_probabilities_have_a_small_error() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    y = rng.random(20_000) < p
    assert stats.expected_calibration_error(p, y) < 0.02 < 0.15 < stats.expected_calibration_error(p**2, y)


def test_nll_and_brier_by_hand() -> None:
    assert stats.nll([0.5, 0.25], [1, 0]) == pytest.approx(-(math.log(0.5) + math.log(0.75)) / 2)
    assert stats.brier([0.5, 0.25], [1, 0]) == pytest.approx((0.25 + 0.0625) / 2)
    assert stats.nll([1.0, 0.0], [0, 1]) == pytest.approx(-math.log(1e-12), rel=1e-4)  # wrong and certain: finite
    assert stats.nll([1.0, 0.0], [1, 0]) == pytest.approx(0.0, abs=1e-11)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (stats.bootstrap_interval, ([],)),
        (stats.accuracy_summary, ([],)),
        (stats.mcnemar, ([], [])),
        (stats.auc, ([], [])),
        (stats.within_group_auc, ([], [], [])),
        (stats.expected_calibration_error, ([], [])),
        (stats.nll, ([], [])),
        (stats.brier, ([], [])),
    ],
)
def test_empty_input_is_a_clear_error(function: Any, arguments: tuple[list[float], ...]) -> None:
    with pytest.raises(ValueError, match="expected a non-empty list of numbers"):
        function(*arguments)


def test_bad_values_are_clear_errors() -> None:
    with pytest.raises(ValueError, match="scores: 1 of 2 values are not finite"):
        stats.auc([1.0, math.nan], [0, 1])
    with pytest.raises(ValueError, match="labels: expected only 0 and 1"):
        stats.brier([0.5, 0.5], [0, 2])
    with pytest.raises(ValueError, match=r"probabilities: expected values in \[0, 1\], got 0.5 to 1.5"):
        stats.nll([0.5, 1.5], [0, 1])
    with pytest.raises(ValueError, match="scores 2, labels 2, groups 1"):
        stats.within_group_auc([1, 2], [0, 1], ["a"])
    with pytest.raises(ValueError, match="bins >= 1"):
        stats.expected_calibration_error([0.5], [1], bins=0)
