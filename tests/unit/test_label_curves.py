"""Statistics of accuracy against labels: hand-worked cases, slow loops, and what a partial grid may say."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from label_arms import ARMS, DRAWN, FACTORIAL, QUICK_ARMS, UNIFORM, Cell, cells_of, first_labels
from label_curves import (
    area_weights,
    bootstrap_p,
    estimate,
    factorial,
    holm,
    interval,
    labels_to_reach,
    resampled_means,
    student_interval,
)
from label_picture import picture
from label_summary import Results, compare, summarise, tables
from numpy import ndarray

BUDGETS = (8, 16, 32, 64)
ITEMS = 40


def answers(rate: float, seed: int, items: int = ITEMS) -> list[bool]:
    """Right answers whose ``seed`` is the same are nested: a higher rate keeps those of a lower one."""
    return list(np.random.default_rng(seed).random(items) < rate)


def record(cell: Cell, correct: list[bool]) -> dict[str, object]:
    return {
        **{"arm": cell.arm, "budget": cell.budget, "seed": cell.seed, "overrides": [], "correct": correct},
        **{"plain": [True, False], "plain_accuracy": 0.5, "accuracy": float(np.mean(correct)), "seconds": 1.0},
        **{"labels": {"spent": float(max(0, cell.budget))}, "response_tokens": 20.0, "by_kind": {}},
    }


def grid(rates: dict[str, float], seeds: range = range(3)) -> Results:
    """A grid where each arm gains ``rate`` a doubling over 0.3."""
    cells = {}
    for cell in cells_of(list(rates), BUDGETS, seeds):
        doublings = math.log2(cell.budget / 4) if cell.budget > 0 else 1
        cells[cell] = record(cell, answers(0.3 + rates[cell.arm] * doublings, cell.seed))
    return Results(cells, BUDGETS)


# --- area


def test_the_area_is_the_trapezoid_over_doublings() -> None:
    assert area_weights([8, 16, 32]) @ [0.2, 0.6, 0.4] == pytest.approx((0.4 + 0.5) / 2)
    assert area_weights([8, 32, 64]) @ [0.2, 0.6, 0.4] == pytest.approx((2 * 0.4 + 0.5) / 3)
    assert area_weights([8]).tolist() == [1.0]


def test_the_area_of_a_straight_line_is_its_middle_and_of_a_constant_the_constant() -> None:
    labels = [8, 16, 32, 64, 128, 256]
    assert area_weights(labels) @ np.log2(labels) == pytest.approx((3 + 8) / 2)
    assert area_weights([3, 7, 50]).sum() == pytest.approx(1.0)


def test_the_area_is_numpys_trapezoid() -> None:
    labels, accuracy = [8, 20, 33, 250], np.array([0.1, 0.5, 0.4, 0.9])
    x = np.log2(labels)
    assert area_weights(labels) @ accuracy == pytest.approx(np.trapezoid(accuracy, x) / (x[-1] - x[0]))


@pytest.mark.parametrize("labels", [[], [16, 8], [8, 8], [0, 8]])
def test_budgets_must_rise_from_above_zero(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="must be positive and rising"):
        area_weights(labels)


# --- bootstrap


def slow_means(values: ndarray, draws: int, seed: int, crossed: bool) -> ndarray:
    """The definition, one draw, seed and item at a time."""
    quantities, seeds, items = values.shape
    rng = np.random.default_rng(seed)
    of_seed = rng.integers(seeds, size=(draws, seeds, 1))
    item = rng.integers(items, size=(draws, 1 if crossed else seeds, items))
    means = np.zeros((quantities, draws))
    for k in range(quantities):
        for d in range(draws):
            total = 0.0
            for place in range(seeds):
                for i in range(items):
                    total += values[k, of_seed[d, place, 0], item[d, 0 if crossed else place, i]]
            means[k, d] = total / (seeds * items)
    return means


@pytest.mark.parametrize("crossed", [False, True])
def test_resamples_are_those_of_a_slow_loop(crossed: bool) -> None:
    values = np.random.default_rng(1).normal(size=(2, 3, 5))
    assert resampled_means(values, 7, 4, crossed) == pytest.approx(slow_means(values, 7, 4, crossed))


def test_blocks_make_all_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("label_curves.BLOCK", 4)
    means = resampled_means(np.ones((1, 3, 5)), 10)
    assert means.tolist() == [[1.0] * 10]


def test_comparisons_are_paired_seed_by_seed_and_item_by_item() -> None:
    rng = np.random.default_rng(2)
    worse = rng.normal(size=(4, 30))
    better = worse + 0.25
    difference = resampled_means(np.stack([better]), 200) - resampled_means(np.stack([worse]), 200)
    assert difference == pytest.approx(np.full((1, 200), 0.25))
    assert resampled_means(worse[None], 200).std() > 0.05


def test_the_bootstrap_has_the_spread_of_seeds_and_of_items() -> None:
    rng = np.random.default_rng(3)
    seeds, items = 8, 50
    between = np.repeat(rng.normal(size=(seeds, 1)), items, 1)  # items of a seed alike
    drawn = resampled_means(between[None], 4000)[0]
    assert drawn.std() == pytest.approx(between[:, 0].std() / seeds**0.5, rel=0.05)
    within = np.tile(rng.normal(size=(1, items)), (seeds, 1))  # seeds alike
    nested, crossed = (resampled_means(within[None], 4000, crossed=crossed)[0] for crossed in (False, True))
    assert nested.std() == pytest.approx(within[0].std() / (seeds * items) ** 0.5, rel=0.05)
    assert crossed.std() == pytest.approx(within[0].std() / items**0.5, rel=0.05)


def test_the_interval_of_a_known_case() -> None:
    assert interval(np.arange(1001.0), 0.95) == (25.0, 975.0)
    assert interval(np.array([1.0, 2.0, np.inf]), 0.95) == (1.0, np.inf)


def test_bootstrap_p_is_two_sided_and_never_zero() -> None:
    assert bootstrap_p(np.array([0.1] * 98 + [-0.1])) == pytest.approx(2 * 2 / 100)
    assert bootstrap_p(np.full(99, 0.3)) == bootstrap_p(np.full(99, -0.3)) == pytest.approx(2 / 100)
    assert bootstrap_p(np.zeros(99)) == 1.0


def test_students_interval_of_a_known_case() -> None:
    low, high = student_interval(np.array([1.0, 2.0, 3.0])) or (0.0, 0.0)  # sd 1, t(2) = 4.3027
    assert (low, high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    assert student_interval(np.array([1.0])) is None


def test_an_estimate_of_a_constant_is_that_constant() -> None:
    found = estimate(np.full((2, 4), 0.5), 100)
    assert [found["value"], found["low"], found["high"], found["by_seed"]] == [0.5, 0.5, 0.5, [0.5, 0.5]]


# --- families of comparisons


def test_holm_of_a_known_case() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0] and holm([]) == []


def test_holm_keeps_the_order_and_is_never_below_the_plain_p() -> None:
    p = np.random.default_rng(5).random(9) / 5
    adjusted = np.array(holm(p.tolist()))
    assert (adjusted >= p).all() and all(a <= b for a, b in pairwise(adjusted[np.argsort(p)]))


def test_factorial_effects_of_known_cells() -> None:
    cells = [np.full((1, 2), value) for value in (0.5, 0.6, 0.7, 1.0)]  # +0.1 and +0.2, and 0.2 more together
    effects = {name: float(effect.mean()) for name, effect in factorial(*cells).items()}
    assert effects == pytest.approx({"first": 0.2, "second": 0.3, "interaction": 0.2})


# --- labels to reach


def test_labels_to_reach_are_interpolated_in_doublings() -> None:
    curve = np.array([0.2, 0.4, 0.8])
    found = [float(labels_to_reach([8, 16, 64], curve, target)) for target in (0.3, 0.4, 0.6, 0.8)]
    assert found == pytest.approx([8 * 2**0.5, 16, 32, 64])


def test_labels_to_reach_are_censored_at_both_ends() -> None:
    curve = np.array([0.2, 0.4, 0.8])
    assert float(labels_to_reach([8, 16, 64], curve, 0.1)) == 8
    assert float(labels_to_reach([8, 16, 64], curve, 0.9)) == math.inf


def test_the_first_crossing_counts_and_each_draw_has_its_target() -> None:
    curves = np.array([[0.2, 0.6, 0.4, 0.9], [0.0, 0.1, 0.2, 0.4]])
    assert labels_to_reach(BUDGETS, curves, np.array([0.5, 0.3])).tolist() == pytest.approx([8 * 2**0.75, 32 * 2**0.5])


# --- arms and cells


def test_arms_that_are_named_exist() -> None:
    assert {*UNIFORM, *FACTORIAL, *DRAWN, *QUICK_ARMS} <= ARMS.keys()


def test_the_reward_stage_buys_a_fifth_but_two_at_least() -> None:
    assert [first_labels(budget) for budget in (8, 16, 32, 64, 128, 256)] == [2, 3, 6, 13, 26, 51]


def test_cells_come_by_seed_and_the_arms_that_decide_first() -> None:
    cells = cells_of(["scrambled", "full", "sft", "gold"], [8, 16], [1, 0])
    expected = ["sft-0", "full-8", "full-16", "gold-all", "scrambled-8", "scrambled-16"]
    assert [cell.name for cell in cells] == [f"{name}-{seed}" for seed in (1, 0) for name in expected]


# --- what a grid comes to


def test_the_whole_method_is_compared_with_the_best_uniform_arm() -> None:
    found = summarise(grid({"sft": 0, "full": 0.12, "uniform_ppo": 0.04, "uniform_dpo": 0.08, "gold": 0.65}), 300)
    best, primary = found["best_uniform"], found["primary"]
    assert best["arm"] == primary["second"] == "uniform_dpo" and "uniform_gate" in best["missing"]
    areas = [found["curves"][arm]["area"]["value"] for arm in ("full", "uniform_dpo")]
    assert primary["area"]["value"] == pytest.approx(areas[0] - areas[1]) and primary["area"]["low"] > 0
    by_budget = [primary["accuracy"][str(budget)]["value"] for budget in BUDGETS]
    assert area_weights(BUDGETS) @ by_budget == pytest.approx(primary["area"]["value"])
    assert "best uniform arm, uniform_dpo" in tables(found)


def test_p_values_are_adjusted_over_every_rival() -> None:
    found = summarise(grid({"sft": 0, "full": 0.1, "uniform_ppo": 0.09, "scrambled": 0.02}), 300)["rivals"]
    assert set(found) == {"uniform_ppo", "scrambled"}
    assert [found[arm]["holm_p"] for arm in ("uniform_ppo", "scrambled")] == pytest.approx(
        holm([found[arm]["area"]["p"] for arm in ("uniform_ppo", "scrambled")])
    )


def test_the_two_by_two_tells_the_factors_apart() -> None:
    rates = {"uniform_ppo": 0.02, "targeted_plain": 0.08, "uniform_targeted": 0.02, "full": 0.08}
    found = summarise(grid(rates), 300)["factorial"]
    assert found["acquisition"]["low"] > 0.05
    assert [found[name]["value"] for name in ("update", "interaction")] == [0, 0]


def test_labels_to_reach_say_when_they_are_out_of_sight() -> None:
    found = summarise(grid({"sft": -0.3, "full": 0.12, "uniform_ppo": 0.01, "gold": 0.7}), 300)["labels_to_reach"]
    assert found["uniform_ppo"]["50%"]["value"] == found["uniform_ppo"]["50%"]["high"] == ">64"
    assert 8 < float(found["full"]["50%"]["value"]) < 64 and found["full"]["90%"]["accuracy"] == pytest.approx(0.9)


def test_a_partial_grid_uses_the_seeds_that_both_arms_have() -> None:
    whole = grid({"sft": 0, "full": 0.1, "uniform_ppo": 0.05})
    cells = {
        cell: record
        for cell, record in whole.cells.items()
        if cell not in (Cell("full", 16, 2), Cell("uniform_ppo", 8, 0))
    }
    partial = Results(cells, BUDGETS)
    found = compare(partial, "full", "uniform_ppo", 100)
    assert found is not None and found["seeds"] == [1] and found["area"]["student"] is None
    assert [found["accuracy"][str(budget)]["seeds"] for budget in BUDGETS] == [[1, 2], [0, 1], [0, 1, 2], [0, 1, 2]]
    assert found["area"]["value"] == pytest.approx(compare(whole, "full", "uniform_ppo", 100)["area"]["by_seed"][1])  # type: ignore[index]
    only = Results({cell: entry for cell, entry in cells.items() if cell.arm != "uniform_ppo"}, BUDGETS)
    assert summarise(only, 100)["primary"] is None and "not enough cells yet" in tables(summarise(only, 100))


def test_what_sft_knew_and_the_arm_forgot_is_counted() -> None:
    sft, full = Cell("sft", 0, 0), Cell("full", 8, 0)
    before, after = record(sft, [True, True, True, False]), record(full, [True, False, True, True])
    found = summarise(Results({sft: before, full: after}, (8,)), 50)["curves"]["full"]["points"][0]
    assert found["kept"] == 3 / 4  # two of three reasoning prompts and the plain one


def test_a_results_file_says_which_prompts_were_answered_right() -> None:
    cell = Cell("full", 8, 0)
    found = summarise(Results({cell: record(cell, [True, False, True])}, (8,)), 50)["cells"][0]
    assert found["correct"] == "101" and found["accuracy"] == pytest.approx(2 / 3)


def test_the_picture_has_a_line_for_every_arm_and_a_level_for_the_references() -> None:
    found = summarise(grid({"sft": 0, "full": 0.12, "uniform_ppo": 0.04, "gold": 0.65}), 50)
    drawn = picture(found)
    assert drawn.count("<polyline") == drawn.count("<polygon") == 2
    assert drawn.count("stroke-dasharray") == 4  # a level and a legend entry each
    assert picture(found, ["full"]).count("<polyline") == 1
