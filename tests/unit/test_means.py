"""Means of values that are not all 0 or 1, of clusters, and of means."""

from __future__ import annotations

import numpy as np
import pytest

from trlhf.evaluation.means import clustered_mean, mean_of_means, mean_summary
from trlhf.evaluation.statistics import Estimate, wilson_interval


def test_shares_get_wilsons_interval_and_other_values_the_bootstraps() -> None:
    found = mean_summary([1, 0, 1, 1])
    assert (found["low"], found["high"]) == wilson_interval(3, 4) and found["n"] == 4
    found = mean_summary([0.2, 0.4, 0.9])
    assert found["value"] == pytest.approx(0.5) and 0.2 <= found["low"] < 0.5 < found["high"] <= 0.9
    assert mean_summary([1, 0, 1, 1], interval="bootstrap")["high"] == 1.0


def test_samples_of_one_question_are_no_independent_evidence() -> None:
    """Eight equal samples of each of 20 questions tell as much as one, and far less than 160 questions would."""
    one = [float(question % 2) for question in range(20)]
    copied = clustered_mean([value for value in one for _ in range(8)], [q for q in range(20) for _ in range(8)])
    single = clustered_mean(one, range(20))
    assert copied == single and copied["n"] == 20
    apart = clustered_mean([value for value in one for _ in range(8)], range(160))
    assert copied["high"] - copied["low"] > 2.5 * (apart["high"] - apart["low"])
    assert copied["high"] - copied["low"] == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(20), abs=0.05)


def test_every_cluster_can_be_drawn() -> None:
    found = clustered_mean([1.0] * 20 + [0.0] * 20, range(40))
    assert found["low"] + found["high"] == pytest.approx(1.0, abs=0.06) and found["low"] == pytest.approx(
        0.35, abs=0.04
    )


def test_unequal_clusters_count_by_their_size() -> None:
    found = clustered_mean([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"])
    assert found["value"] == 0.75 and (found["low"], found["high"]) == (0.0, 1.0)
    with pytest.raises(ValueError, match="as many values as clusters"):
        clustered_mean([1.0], [])


def test_the_interval_of_a_mean_of_tasks_covers_the_truth() -> None:
    """Simulated: eight tasks of 60 questions near chance; 95% of the intervals hold the true mean."""
    generator = np.random.default_rng(0)
    truths = np.array([0.05, 0.2, 0.2, 0.22, 0.25, 0.25, 0.3, 0.5])
    held = 0
    for _ in range(400):
        tasks = [mean_summary(generator.random(60) < truth) for truth in truths]
        whole = mean_of_means(tasks)
        held += whole["low"] <= truths.mean() <= whole["high"]
    assert 0.92 <= held / 400 <= 0.98


def test_one_task_is_its_own_mean_and_more_make_it_narrower() -> None:
    one: Estimate = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    assert mean_of_means([one]) == one
    four = mean_of_means([one] * 4)
    assert (four["value"], four["low"], four["n"]) == (0.5, pytest.approx(0.45), 36)
    with pytest.raises(ValueError, match="at least one"):
        mean_of_means([])
