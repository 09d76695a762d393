"""Scores and batch pickers against slow loops written from the formulas, and what must not change them."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from numpy import ndarray

from trlhf.targeting.acquisition import d_optimal_batch, query_information, top_batch, v_optimal_batch
from trlhf.targeting.targets import balanced_target, target_factor, target_matrix

SEEDS = range(5)


def spd(rng: np.random.Generator, size: int, rank: int | None = None) -> ndarray:
    root = rng.normal(size=(size, rank or size + 2))
    return np.asarray(root @ root.T / size)


def problem(seed: int, n: int = 30, dims: int = 6) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "queries": rng.normal(size=(n, dims)),
        "information": rng.uniform(0.01, 0.25, n),
        "covariance": spd(rng, dims),
        "target": spd(rng, dims, rank=3),
        "costs": rng.uniform(0.5, 3.0, n),
        "groups": rng.integers(0, n // 3, n),
    }


def untargeted(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name != "target"}


def after(sigma: ndarray, z: ndarray, omega: float) -> ndarray:
    """Return the posterior covariance after a label on z, from the precision matrix."""
    return np.asarray(np.linalg.inv(np.linalg.inv(sigma) + omega * np.outer(z, z)))


def slow_batch(given: dict[str, Any], count: int, per_group: int = 2, base: ndarray | None = None) -> Any:
    """Try every question with a new posterior, at every pick."""
    sigma, picks, values = given["covariance"], [], []
    for _ in range(count):
        scores = {}
        for i, z in enumerate(given["queries"]):
            if i in picks or sum(given["groups"][j] == given["groups"][i] for j in picks) >= per_group:
                continue
            new = after(sigma, z, given["information"][i])
            if "target" in given:
                gain = np.trace(given["target"] @ sigma) - np.trace(given["target"] @ new)
            else:
                gain = np.linalg.slogdet(sigma)[1] - np.linalg.slogdet(new)[1]
            scores[i] = (gain / given["costs"][i] + (0 if base is None else base[i]), gain / given["costs"][i])
        best = max(scores, key=lambda i: scores[i][0])
        picks.append(best)
        values.append(scores[best][1])
        sigma = after(sigma, given["queries"][best], given["information"][best])
    return picks, values


# ---- scores ----


def test_information_without_flips_is_p_times_1_minus_p() -> None:
    p = np.array([0.0, 0.1, 0.5, 1.0])
    assert query_information(p, 0.0) == pytest.approx([0.0, 0.09, 0.25, 0.0], abs=1e-15)


def test_information_is_the_fisher_information_of_a_noisy_label() -> None:
    step, flips = 1e-5, 0.2
    logits = np.array([-2.0, 0.0, 1.5])

    def noisy(logit: ndarray) -> ndarray:
        return np.asarray(flips + (1 - 2 * flips) / (1 + np.exp(-logit)))

    slope = (noisy(logits + step) - noisy(logits - step)) / (2 * step)
    expected = slope**2 / (noisy(logits) * (1 - noisy(logits)))
    assert query_information(1 / (1 + np.exp(-logits)), flips) == pytest.approx(expected, rel=1e-8)


def test_information_falls_with_the_flip_rate() -> None:
    p = np.linspace(0, 1, 11)
    clean, noisy = query_information(p, 0.0), query_information(p, 0.1)
    assert (noisy[1:-1] < clean[1:-1]).all() and noisy[[0, -1]] == pytest.approx([0, 0])


@pytest.mark.parametrize("seed", SEEDS)
def test_the_target_is_the_mean_over_pairs_of_rollouts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompts = np.array([0, 0, 0, 1, 1, 2, 3])  # prompt 2 has one rollout, 3 one cluster of three, 4 nothing
    counts = np.array([3, 1, 2, 1, 1, 1, 3])
    features, values = rng.normal(size=(7, 4)), rng.uniform(size=5)
    expected = np.zeros((4, 4))
    for prompt in range(4):
        rows = np.repeat(np.flatnonzero(prompts == prompt), counts[prompts == prompt])
        pairs = [features[i] - features[j] for i, j in combinations(rows, 2)]
        if pairs:
            expected += values[prompt] * np.mean([np.outer(d, d) for d in pairs], 0)
    given = (features, prompts, counts.astype(float), values)
    assert target_matrix(*given) == pytest.approx(expected, abs=1e-12)
    assert target_factor(*given).T @ target_factor(*given) == pytest.approx(expected, abs=1e-12)


def test_the_target_does_not_feel_what_a_prompt_s_rollouts_share() -> None:
    rng = np.random.default_rng(0)
    features, prompts = rng.normal(size=(6, 3)), np.array([0, 0, 0, 1, 1, 1])
    shifts = rng.normal(size=(2, 3))[prompts]
    ones, values = np.ones(6), np.ones(2)
    moved = target_matrix(features + shifts, prompts, ones, values)
    assert moved == pytest.approx(target_matrix(features, prompts, ones, values), abs=1e-12)


# ---- designs ----


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("per_group", [1, 2, 30])
def test_v_optimal_is_the_slow_greedy_choice(seed: int, per_group: int) -> None:
    given = problem(seed)
    picks, values = v_optimal_batch(**given, count=8, per_group=per_group)
    expected = slow_batch(given, 8, per_group)
    assert picks.tolist() == expected[0] and values == pytest.approx(expected[1], rel=1e-8)


@pytest.mark.parametrize("seed", SEEDS)
def test_d_optimal_is_the_slow_greedy_choice(seed: int) -> None:
    given = untargeted(problem(seed))
    picks, values = d_optimal_batch(**given, count=8)
    expected = slow_batch(given, 8)
    assert picks.tolist() == expected[0] and values == pytest.approx(expected[1], rel=1e-8)


@pytest.mark.parametrize("seed", SEEDS)
def test_base_and_strength_enter_the_score_and_not_the_value(seed: int) -> None:
    given = problem(seed)
    base = np.random.default_rng(seed).uniform(0, 5, 30)
    picks, values = v_optimal_batch(**given, count=8, base=base, strength=0.5)
    assert picks.tolist() == slow_batch(given, 8, base=2 * base)[0]
    assert values == pytest.approx(slow_batch(given, 8, base=2 * base)[1], rel=1e-8)
    by_base, _ = v_optimal_batch(**given, count=8, per_group=30, base=base, strength=0.0)
    assert by_base.tolist() == np.argsort(-base)[:8].tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_base_and_strength_enter_the_untargeted_score_too(seed: int) -> None:
    given = untargeted(problem(seed))
    base = np.random.default_rng(seed).uniform(0, 2, 30)
    picks, values = d_optimal_batch(**given, count=8, base=base, strength=0.5)
    expected = slow_batch(given, 8, base=2 * base)
    assert picks.tolist() == expected[0] and values == pytest.approx(expected[1], rel=1e-8)


@pytest.mark.parametrize("seed", SEEDS)
def test_values_add_up_to_the_drop_in_variance(seed: int) -> None:
    given = problem(seed, n=200, dims=12)
    picks, values = v_optimal_batch(**given, count=100)
    sigma = given["covariance"]
    for i in picks:
        sigma = after(sigma, given["queries"][i], given["information"][i])
    drop = np.trace(given["target"] @ given["covariance"]) - np.trace(given["target"] @ sigma)
    assert (values * given["costs"][picks]).sum() == pytest.approx(drop, rel=1e-9)


def test_what_labels_tell_about_all_of_theta_diminishes() -> None:  # ln det is submodular, tr(TΣ) is not
    _, values = d_optimal_batch(**{**untargeted(problem(0)), "costs": np.ones(30)}, count=20, per_group=30)
    assert (np.diff(values) < 1e-12).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_order_of_the_candidates_does_not_matter(seed: int) -> None:
    given = problem(seed)
    order = np.random.default_rng(seed).permutation(30)
    shuffled = {k: v if k in ("covariance", "target") else v[order] for k, v in given.items()}
    for choose, kept in ((v_optimal_batch, lambda x: x), (d_optimal_batch, untargeted)):
        picks, values = choose(**kept(given), count=8)
        found, found_values = choose(**kept(shuffled), count=8)
        assert order[found].tolist() == picks.tolist() and found_values == pytest.approx(values)


def test_another_currency_changes_values_and_not_picks() -> None:
    given = problem(1)
    picks, values = v_optimal_batch(**given, count=8)
    dear, dear_values = v_optimal_batch(**{**given, "costs": 100 * given["costs"]}, count=8)
    assert dear.tolist() == picks.tolist() and 100 * dear_values == pytest.approx(values)


def test_a_copy_of_what_was_picked_is_worth_less() -> None:
    given = problem(2)
    first = int(v_optimal_batch(**given, count=1).picks[0])
    both = {k: v if k in ("covariance", "target") else np.concatenate([v, v[[first]]]) for k, v in given.items()}
    both["groups"] = np.arange(31)
    picks, values = v_optimal_batch(**both, count=31)
    assert picks[0] == first and values[picks.tolist().index(30)] < values[0] / 2


def test_a_far_more_certain_copy_is_not_picked_next() -> None:
    queries = np.array([[3.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    given = {"queries": queries, "information": np.full(3, 5.0), "covariance": np.eye(2), "costs": np.ones(3)}
    assert d_optimal_batch(**given, groups=np.arange(3), count=2).picks.tolist() == [0, 2]
    assert v_optimal_batch(**given, target=np.eye(2), groups=np.arange(3), count=2).picks.tolist() == [0, 2]


def test_only_v_optimal_passes_over_what_the_update_does_not_use() -> None:
    queries = np.array([[10.0, 0.0], [0.0, 1.0]])
    given = {"queries": queries, "information": np.ones(2), "covariance": np.eye(2), "costs": np.ones(2)}
    target = np.diag([0.0, 1.0])
    assert v_optimal_batch(**given, target=target, groups=np.arange(2), count=1).picks.tolist() == [1]
    assert d_optimal_batch(**given, groups=np.arange(2), count=1).picks.tolist() == [0]


def test_a_batch_ends_with_the_candidates_and_skips_what_is_excluded() -> None:
    given = problem(3)
    picks, _ = v_optimal_batch(**given, count=1000, per_group=1)
    assert sorted(given["groups"][picks]) == sorted(set(given["groups"]))
    base = np.where(np.arange(30) < 5, 0.0, -np.inf)
    assert sorted(v_optimal_batch(**given, count=30, per_group=30, base=base).picks) == [0, 1, 2, 3, 4]
    assert len(v_optimal_batch(**given, count=0).picks) == 0


def test_a_base_below_zero_is_no_reason_to_pick_twice() -> None:
    given = problem(3)
    low = v_optimal_batch(**given, count=12, base=np.full(30, -100.0))
    assert low.picks.tolist() == v_optimal_batch(**given, count=12).picks.tolist()


def test_the_arguments_stay_as_they_were() -> None:
    given = problem(4)
    copies = {name: value.copy() for name, value in given.items()}
    v_optimal_batch(**given, count=8)
    assert all((given[name] == copies[name]).all() for name in given)


# ---- the other picker ----


def test_top_batch_sorts_within_one_kind() -> None:
    scores, kinds = np.array([1.0, 5.0, -np.inf, 3.0, 4.0]), ["k"] * 5
    assert top_batch(scores, np.arange(5), kinds, 10).tolist() == [1, 4, 3, 0]
    assert top_batch(scores, np.array([0, 1, 2, 1, 1]), kinds, 10).tolist() == [1, 4, 0]


def test_top_batch_halves_a_kind_after_its_first_pick() -> None:
    scores = np.array([8.0, 7.0, 6.0, 3.6, 1.0])
    assert top_batch(scores, np.arange(5), ["a", "a", "a", "b", "c"], 4).tolist() == [0, 3, 1, 2]


# ---- errors ----


def test_scores_refuse_what_is_no_probability() -> None:
    with pytest.raises(ValueError, match=r"query_information: flip_rate=0.5 must be in \[0, 0.5\)"):
        query_information(np.array([0.5]), 0.5)
    with pytest.raises(ValueError, match=r"query_information: p must be in \[0, 1\], got 0.5 to 1.5; give prob"):
        query_information(np.array([0.5, 1.5]), 0.0)


def test_the_target_refuses_what_does_not_fit() -> None:
    features, ones = np.ones((2, 3)), np.ones(2)
    with pytest.raises(ValueError, match="prompts go from 0 to 2; they must be indices into the 2 values"):
        target_matrix(features, np.array([0, 2]), ones, ones)
    with pytest.raises(ValueError, match="target_matrix: weights must be at least 0, got -1"):
        target_matrix(features, np.array([0, 1]), np.array([1.0, -1.0]), ones)
    with pytest.raises(ValueError, match="expected equal lengths, got features 2, prompts 1, weights 2"):
        target_matrix(features, np.array([0]), ones, ones)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"covariance": np.eye(5)}, r"covariance has shape \(5, 5\); queries of 6 dimensions need a square"),
        ({"target": np.triu(np.ones((6, 6)))}, "target must be finite and symmetric"),
        ({"information": np.full(30, -0.1)}, "information must be finite and at least 0; see query_information"),
        ({"costs": np.zeros(30)}, "costs must be finite and above 0, got 0.0"),
        ({"costs": np.ones(29)}, "expected equal lengths, got queries 30, information 30, costs 29"),
        ({"queries": np.full((30, 6), np.nan)}, "30 queries are not finite, the first is row 0; drop them"),
        ({"base": np.full(30, np.nan)}, "base must be finite, or -inf for what is never picked"),
        ({"per_group": 0}, "per_group=0 must be at least 1"),
        ({"count": -1}, "count=-1 must be at least 0"),
    ],
)
def test_designs_refuse_what_has_no_meaning(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="v_optimal_batch: .*" + message):
        v_optimal_batch(**{**problem(0), "count": 3, **changes})


def test_the_other_picker_refuses_what_has_no_meaning() -> None:
    with pytest.raises(ValueError, match=r"top_batch: scores must be at least 0, or -inf .* got -1\.0"):
        top_batch(np.array([-1.0, 1.0]), np.arange(2), ["k", "k"], 1)


def test_in_a_balanced_target_every_prompt_counts_its_value_whatever_its_spread() -> None:
    """tr(TΣ) = Σ_x U(x) over the prompts whose samples differ."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(7, 3)) * np.array([1, 1, 50, 50, 50, 1, 1])[:, None]
    rows[6] = rows[5]  # the third prompt's samples are the same
    prompts, counts = np.array([0, 0, 1, 1, 1, 2, 2]), np.array([3, 5, 1, 2, 5, 4, 4])
    covariance = np.diag([1.0, 2.0, 3.0])
    target = balanced_target(rows, prompts, counts, np.array([0.9, 0.4, 0.7]), covariance)
    assert np.trace(target @ covariance) == pytest.approx(0.9 + 0.4)
