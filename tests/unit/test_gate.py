"""What the gate keeps out, and that its bound holds for rows that it has not seen."""

from __future__ import annotations

import numpy as np
import pytest
from numpy import ndarray

from trlhf.targeting.gate import (
    gate,
    is_repetitive,
    mahalanobis_distances,
    outlier_bound,
    repetition,
    shrunk_covariance,
)


def sound(length: int) -> list[int]:
    return list(range(100, 100 + length))


# ---- repetition ----


@pytest.mark.parametrize("block", [1, 2, 5, 30])
def test_a_block_repeated_back_to_back_is_repetitive_wherever_it_stands(block: int) -> None:
    copies = max(4, -(-16 // block))
    loop = list(range(block)) * copies
    assert is_repetitive([*sound(20), *loop, *sound(200)[20:]])
    assert not is_repetitive([*sound(20), *loop[1:-1], *sound(200)[20:]])


def test_short_runs_are_arithmetic() -> None:
    assert not is_repetitive([7] * 15) and is_repetitive([7] * 16)
    assert not is_repetitive([*sound(10), *[2, 9] * 7, 3])  # 2 + 2 + 2 ...
    assert not is_repetitive([]) and not is_repetitive([1])


def test_the_last_copy_may_be_cut_off() -> None:
    assert is_repetitive([*([1, 2, 3, 4, 5] * 4), 1, 2])
    assert repetition([*([1, 2, 3, 4, 5] * 4), 1, 2]) == "a block of 5 tokens comes 4 times in a row"
    assert repetition([3] * 20) == "a block of 1 token comes 20 times in a row"


def test_few_distinct_ngrams_are_repetitive_without_any_block_in_a_row() -> None:
    sentence = sound(10)
    ids = [token for k in range(8) for token in [*sentence, k]]  # the same sentence, numbered
    assert repetition(ids) == "42% of its 4-token sequences are distinct, fewer than 50%"  # 7 + 8·4 - 3 of 85
    assert repetition([*range(1000, 1020), *ids]) is None  # 56 of 105
    assert repetition(sound(400)) is None


def test_few_ngrams_say_nothing_about_their_share() -> None:
    assert repetition(sound(11) * 3) is None  # 11 of 30
    assert str(repetition(sound(12) * 3)).startswith("36% of its 4-token sequences")  # 12 of 33


def test_the_shortest_response_whose_ngrams_count_and_the_largest_share_that_passes() -> None:
    twice = [*sound(12), *sound(12), *sound(11)]  # 35 tokens: 32 n-grams, 12 of them distinct
    assert str(repetition(twice)).startswith("38%") and repetition(twice[:-1]) is None
    half = [*(sound(12) * 3), *range(500, 509)]
    assert repetition(half) is None and str(repetition(half[:-1])).startswith("49%")  # 21 of 42, 20 of 41


# ---- distances ----


def test_shrinkage_is_that_of_a_slow_loop() -> None:
    rng = np.random.default_rng(0)
    for rows, dims in ((30, 5), (8, 20)):
        x = rng.normal(size=(rows, dims)) * np.linspace(1, 5, dims)
        centred = x - x.mean(0)
        s = sum(np.outer(row, row) for row in centred) / rows
        target = np.trace(s) / dims * np.eye(dims)
        d2 = np.sum((s - target) ** 2)
        b2 = min(d2, sum(np.sum((np.outer(row, row) - s) ** 2) for row in centred) / rows**2)
        assert 0 < b2 < d2
        assert shrunk_covariance(x) == pytest.approx(b2 / d2 * target + (1 - b2 / d2) * s, rel=1e-9)


def test_where_noise_is_all_there_is_the_covariance_is_a_multiple_of_the_identity() -> None:
    rows = np.random.default_rng(1).normal(size=(5, 3))
    expected = np.trace(np.cov(rows.T, bias=True)) / 3 * np.eye(3)
    assert shrunk_covariance(rows) == pytest.approx(expected, abs=1e-12)


def test_distances_are_those_of_the_inverse() -> None:
    rng = np.random.default_rng(1)
    reference, rows = rng.normal(size=(12, 30)), rng.normal(size=(4, 30))
    away = rows - reference.mean(0)
    expected = np.sqrt(np.einsum("nd,de,ne->n", away, np.linalg.inv(shrunk_covariance(reference)), away))
    assert mahalanobis_distances(rows, reference) == pytest.approx(expected)
    assert mahalanobis_distances(reference.mean(0)[None], reference) == pytest.approx([0.0], abs=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_unit_and_origin_of_the_features_do_not_matter(scale: float) -> None:
    rng = np.random.default_rng(2)
    reference, rows = rng.normal(size=(40, 6)), rng.normal(size=(5, 6))
    moved = mahalanobis_distances(scale * (rows + 3), scale * (reference + 3))
    assert moved == pytest.approx(mahalanobis_distances(rows, reference), rel=1e-6)


def draw(rng: np.random.Generator, rows: int, dims: int) -> ndarray:
    return np.asarray(rng.normal(size=(rows, dims)) * np.exp(-np.arange(dims) / dims * 3))


@pytest.mark.parametrize(("rows", "dims"), [(100, 200), (300, 50)])
def test_the_bound_lets_new_rows_in_and_junk_out(rows: int, dims: int) -> None:
    rng = np.random.default_rng(3)
    shares, junk_shares = [], []
    for _ in range(10):
        reference = draw(rng, rows, dims)
        bound = outlier_bound(reference)
        junk = draw(rng, 200, dims)[:, ::-1]
        shares.append(np.mean(mahalanobis_distances(draw(rng, 500, dims), reference) > bound))
        junk_shares.append(np.mean(mahalanobis_distances(junk, reference) > bound))
    assert np.mean(shares) < 0.03 and np.mean(junk_shares) > 0.9


def test_an_in_sample_bound_would_shut_everything_out() -> None:
    rng = np.random.default_rng(4)
    reference, new = draw(rng, 60, 200), draw(rng, 200, 200)
    naive = np.percentile(mahalanobis_distances(reference, reference), 99)
    distances = mahalanobis_distances(new, reference)
    assert np.mean(distances > naive) == 1.0 and np.mean(distances > outlier_bound(reference)) < 0.1


def test_rows_of_one_prompt_stay_together() -> None:
    rng = np.random.default_rng(5)
    prompts = np.repeat(np.arange(30), 8)
    reference = draw(rng, 30, 60)[prompts] + 0.05 * draw(rng, 240, 60)
    assert outlier_bound(reference, groups=prompts) > 1.5 * outlier_bound(reference)
    assert outlier_bound(reference, groups=prompts + 7) == outlier_bound(reference, groups=prompts)


def test_the_bound_of_few_rows_is_the_largest_distance_to_the_others() -> None:
    rows = draw(np.random.default_rng(7), 5, 3)
    alone = [mahalanobis_distances(rows[[i]], np.delete(rows, i, 0))[0] for i in range(5)]
    assert outlier_bound(rows) == pytest.approx(max(alone))


def test_a_lower_percentile_is_a_lower_bound() -> None:
    reference = draw(np.random.default_rng(6), 200, 10)
    assert outlier_bound(reference, 50) < outlier_bound(reference, 90) < outlier_bound(reference, 99.9)


# ---- the gate ----


def test_the_gate_says_why() -> None:
    found = gate(
        [sound(5), sound(6), [1] * 20, sound(4), sound(4)],
        [True, False, True, True, True],
        np.array([1.0, 1.0, 1.0, 3.25, np.nan]),
        2.0,
    )
    assert found == [
        None,
        "truncated: no end within 6 tokens",
        "repetitive: a block of 1 token comes 20 times in a row",
        "outlier: Mahalanobis distance 3.2 from the reference responses, above the bound 2.0",
        "outlier: Mahalanobis distance nan from the reference responses, above the bound 2.0",
    ]


def test_the_gate_works_without_features() -> None:
    assert gate([sound(5), [1] * 20], [True, True])[0] is None
    assert gate([], []) == []


def test_errors_name_value_rule_and_remedy() -> None:
    with pytest.raises(ValueError, match="shrunk_covariance: 1 rows have no covariance; give at least 2"):
        shrunk_covariance(np.ones((1, 2)))
    with pytest.raises(ValueError, match="shrunk_covariance: all 3 rows are equal; give rows that differ"):
        shrunk_covariance(np.full((3, 2), 0.1))
    with pytest.raises(ValueError, match="shrunk_covariance: rows must be finite"):
        shrunk_covariance(np.array([[0.0], [np.inf]]))
    with pytest.raises(ValueError, match="features have 3 dimensions, the reference 2; both must come from the same"):
        mahalanobis_distances(np.ones((1, 3)), np.eye(2))
    with pytest.raises(ValueError, match="outlier_bound: percentile=100 must be between 0 and 100"):
        outlier_bound(np.eye(5), 100)
    with pytest.raises(ValueError, match="outlier_bound: folds=1 must be at least 2"):
        outlier_bound(np.eye(5), folds=1)
    with pytest.raises(ValueError, match="3 reference rows from 3 prompts are too few; give at least 4 from 2"):
        outlier_bound(np.eye(3))
    with pytest.raises(ValueError, match="5 reference rows from 1 prompts are too few"):
        outlier_bound(np.eye(5), groups=np.zeros(5, int))
    with pytest.raises(ValueError, match="outlier_bound: 4 groups for 5 rows"):
        outlier_bound(np.eye(5), groups=np.zeros(4, int))
    with pytest.raises(ValueError, match="gate: distances and bound belong together; give both or none"):
        gate([[1]], [True], bound=1.0)
    with pytest.raises(ValueError, match=r"gate: expected equal lengths, got \[1, 2\]"):
        gate([[1]], [True, False])
