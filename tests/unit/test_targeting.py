"""Frontier values, label choice and training weights."""

from __future__ import annotations

import numpy as np
import pytest

from trlhf.knowledge import Knowledge
from trlhf.targeting import (
    Candidate,
    choose_pairs,
    choose_verdicts,
    fit_top_answer_model,
    frontier_value,
    last_pass_rates,
    top_answer_probability,
    training_weights,
)
from trlhf.targeting.choose import spread
from trlhf.types import Label, Prompt, Rollout


def candidate(name: str, answers: list[str | None], kind: str = "k", task: str = "exact") -> Candidate:
    prompt = Prompt(name, ({"role": "user", "content": name},), kind, task)  # type: ignore[arg-type]
    return Candidate(prompt, tuple(Rollout(name, f"text {i} {a}", answer=a) for i, a in enumerate(answers)))


def label(prompt_id: str, answer: str, outcome: str) -> Label:
    return Label("verdict", prompt_id, ("text",), answer, outcome, "test", 1.0, "", 0)


def test_frontier_value_has_the_published_values() -> None:
    found = frontier_value(np.array([1.0, 5.0, 1.0]), np.array([1.0, 5.0, 17.0]), 8)
    assert found == pytest.approx([0.78, 0.96, 0.32], abs=0.005)


def test_frontier_value_is_the_chance_of_a_mixed_group() -> None:
    rng = np.random.default_rng(0)
    rates = rng.beta(2.0, 3.0, 200_000)
    right = rng.binomial(4, rates)
    mixed = np.mean((right > 0) & (right < 4))
    assert frontier_value(np.array([2.0]), np.array([3.0]), 4)[0] == pytest.approx(mixed, abs=0.005)


def test_frontier_value_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        frontier_value(np.array([0.0]), np.array([1.0]), 8)
    with pytest.raises(ValueError, match="at least 2"):
        frontier_value(np.array([1.0]), np.array([1.0]), 1)


def test_top_answer_model_learns_from_verdicts() -> None:
    guess = fit_top_answer_model(np.array([]), np.array([]))
    assert top_answer_probability(guess, np.array([0.5]))[0] == pytest.approx(0.5)
    shares = np.tile([0.2, 0.4, 0.6, 0.8], 50)
    right = (shares > 0.5).astype(float)
    fitted = fit_top_answer_model(shares, right)
    low, high = top_answer_probability(fitted, np.array([0.3, 0.7]))
    assert low < 0.2 and high > 0.8


def test_verdicts_go_to_answerable_undecided_prompts_only() -> None:
    pool = [
        candidate("known", ["1", "1", "2"]),
        candidate("none", [None, None, None]),
        candidate("open", ["a", "b", "c"], task="open"),
        candidate("half", ["7", "7", "8"]),
    ]
    knowledge = Knowledge([label("known", "1", "right")])
    for coefficients in (None, fit_top_answer_model(np.array([]), np.array([]))):
        questions = choose_verdicts(pool, knowledge, 10, coefficients, 8, np.random.default_rng(0), 2)
        assert [(q.prompt.id, q.answer, q.round) for q in questions] == [("half", "7", 2)]
        assert questions[0].responses[0].endswith("7") and questions[0].why


def test_an_answer_ruled_out_is_not_asked_again() -> None:
    pool = [candidate("x", ["1", "1", "2"])]
    questions = choose_verdicts(pool, Knowledge([label("x", "1", "wrong")]), 1, None, 8, np.random.default_rng(0))
    assert [q.answer for q in questions] == ["2"]


def test_the_frontier_prefers_mixed_prompts_and_spreads_over_kinds() -> None:
    mixed, agreed = ["1"] * 5 + ["2", "3", "4"], ["1"] * 8
    pool = [candidate(f"a{i}", mixed, "a") for i in range(4)] + [candidate(f"b{i}", mixed, "b") for i in range(2)]
    pool += [candidate(f"c{i}", agreed, "c") for i in range(4)]
    coefficients = fit_top_answer_model(np.array([]), np.array([]))
    chosen = [q.prompt.id for q in choose_verdicts(pool, Knowledge(), 2, coefficients, 8, np.random.default_rng(0))]
    assert sorted(name[0] for name in chosen) == ["a", "b"]
    assert (
        "frontier: top answer '1'"
        in choose_verdicts(pool, Knowledge(), 1, coefficients, 8, np.random.default_rng(0))[0].why
    )


def test_spread_trades_value_against_variety() -> None:
    assert spread(np.array([1.0, 0.9, 0.6, 0.1]), ["a", "a", "b", "c"], 3) == [0, 2, 1]


def test_pairs_are_of_different_responses_to_open_prompts() -> None:
    pool = [candidate("o", ["a", "b"], task="open"), candidate("e", ["1", "2"]), candidate("same", ["a"], task="open")]
    pairs = choose_pairs(pool, 5, np.random.default_rng(0), 1)
    assert [(p.prompt.id, p.kind, len(set(p.responses))) for p in pairs] == [("o", "preference", 2)]


def test_training_weights_sum_to_one_and_favour_the_frontier() -> None:
    weights = training_weights(*last_pass_rates([0.0, 0.5, 1.0, None], 8), 8)
    assert weights.sum() == pytest.approx(1)
    assert weights[1] == weights[3] > 3 * weights[0] and weights[0] == pytest.approx(weights[2])
    alpha, beta = last_pass_rates([0.25, 0.75], 8)
    assert (alpha.tolist(), beta.tolist()) == ([2.5, 6.5], [6.5, 2.5])
    hard = training_weights(alpha, beta, 8, 1.0)
    assert hard[0] / hard[1] == pytest.approx((0.5 + 6) / (0.5 + 2)) and hard.sum() == pytest.approx(1)
    mixed = training_weights(alpha, beta, 8, np.array([1.0, 0.0]), np.array([1.0, 0.5]))
    assert mixed[0] / mixed[1] == pytest.approx(6.5 / 9 / 0.5)


def test_once_an_answer_is_ruled_out_the_next_one_gains() -> None:
    """Five samples say 1, three say 2: with 1 known to be wrong, 2 is likely right, and the group is mixed."""
    asked_before = candidate("x", ["1"] * 5 + ["2"] * 3)
    assert asked_before.top_answer(Knowledge()) == ("1", 5 / 8, 5)
    wrong = Knowledge([label("x", "1", "wrong")])
    assert asked_before.top_answer(wrong) == ("2", 1.0, 3)
    pool = [asked_before, candidate("y", ["1"] * 5 + ["2"] * 3)]
    coefficients = fit_top_answer_model(np.array([]), np.array([]))
    chosen = choose_verdicts(pool, wrong, 1, coefficients, 8, np.random.default_rng(0))
    assert [(q.prompt.id, q.answer) for q in chosen] == [("x", "2")]
