"""The model of preferences: ties, noise, position bias, and how often people err."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.optimize import approx_fprime
from scipy.special import expit

from trlhf.labelers import SimulatedPerson
from trlhf.targeting.preferences import Compared, _fit, _loss, fit_preferences, information
from trlhf.targeting.swaps import OUTCOMES, Noise, estimate_noise, outcome_table
from trlhf.types import Prompt, Question

SURE = Noise(0.0, 0.0)
PROMPT = Prompt("p", ({"role": "user", "content": "?"},), task="open")


def drawn(n: int, noise: Noise, seed: int = 0, size: int = 6) -> tuple[Compared, np.ndarray]:
    """n comparisons of a person with a linear taste; where the last column is low in both, nothing is decided."""
    rng = np.random.default_rng(seed)
    first, second, taste = rng.normal(size=(n, size)), rng.normal(size=(n, size)), 2 * rng.normal(size=size)
    taste[-1] = 0
    honest = np.where((first - second) @ taste > 0, 0, 1)
    honest[(first + second)[:, -1] < -0.5] = 2
    table = outcome_table(noise)
    outcomes = [("A", "B", "tie").index(OUTCOMES[rng.choice(3, p=table[h])]) for h in honest]
    return Compared(first, second, np.array([1.0, 0.0, 0.5])[outcomes]), taste


def test_information_is_that_of_a_logistic_draw_where_nobody_errs() -> None:
    margins, decided = np.array([0.0, 1.0, -2.0]), np.array([1.0, 0.5, 0.8])
    p = expit(margins)
    np.testing.assert_allclose(information(margins, decided, SURE), decided * p * (1 - p))


def test_information_is_the_expected_square_of_the_slope() -> None:
    noise, margin, decided = Noise(0.1, 0.3), np.array([0.7]), np.array([0.6])
    slopes = [_loss(margin, np.array([first]), decided, noise)[1][0] for first in (True, False)]
    chances = [np.exp(-_loss(margin, np.array([first]), decided, noise)[0][0]) for first in (True, False)]
    assert information(margin, decided, noise)[0] == pytest.approx(np.dot(chances, np.square(slopes)))
    assert sum(chances) == pytest.approx(1 - 0.7 * 0.9 * 0.4)  # the rest are ties: (1-b)(1-ε)(1-d)


def test_noise_and_bias_make_a_label_worth_less() -> None:
    margin, one = np.array([0.0]), np.ones(1)
    worth = [information(margin, one, noise)[0] for noise in (SURE, Noise(0.1, 0.0), Noise(0.1, 0.3), Noise(0.1, 0.6))]
    assert worth == sorted(worth, reverse=True) and worth[0] == 0.25


def test_the_fit_is_where_the_gradient_vanishes() -> None:
    compared, _ = drawn(30, Noise(0.1, 0.2))
    told = compared[compared.outcomes != 0.5]
    rows, first, decided = told.first - told.second, told.outcomes == 1, np.full(len(told.outcomes), 0.7)
    mean, variance, noise = np.full(6, 0.3), np.linspace(0.5, 2, 6), Noise(0.1, 0.2)

    def objective(theta: np.ndarray) -> float:
        loss = _loss(rows @ theta, first, decided, noise)[0].sum()
        return float(loss + 0.5 * ((theta - mean) ** 2 / variance).sum())

    theta, covariance = _fit(rows, first, decided, noise, mean, variance)
    assert np.abs(approx_fprime(theta, objective, 1e-6)).max() < 1e-3
    expected = rows.T @ (information(rows @ theta, decided, noise)[:, None] * rows) + np.diag(1 / variance)
    np.testing.assert_allclose(covariance, np.linalg.inv(expected), atol=1e-8)


def test_taste_and_ties_are_learned_from_comparisons() -> None:
    compared, taste = drawn(400, SURE)
    model = fit_preferences(compared, Noise(0.01, 0.01))
    assert np.corrcoef(model.mean[:-1], taste[:-1])[0, 1] > 0.95
    low, high = np.zeros((1, 6)), np.zeros((1, 6))
    low[0, -1], high[0, -1] = -2, 2
    assert model.told_apart(low, low)[0] < 0.2 < 0.8 < model.told_apart(high, high)[0]


def test_an_answer_that_may_be_unread_moves_the_model_less() -> None:
    rows = np.array([[1.0, 0.0]])

    def moved(outcome: float, bias: float) -> float:
        compared = Compared(rows, -rows, np.array([outcome]))
        return abs(float(fit_preferences(compared, Noise(0.01, bias)).mean[0]))

    assert moved(1.0, 0.5) < 0.7 * moved(1.0, 0.01) and moved(1.0, 0.5) < 0.7 * moved(0.0, 0.5)


def test_without_labels_it_is_the_prior() -> None:
    model = fit_preferences(Compared(np.zeros((0, 5)), np.zeros((0, 5)), np.zeros(0), typical=1), SURE)
    assert model.compared == 0 and model.mean.tolist() == [0, 0, 0, 0, 0.5] and model.covariance[4, 4] == 1


def test_draws_have_the_models_mean_and_covariance() -> None:
    model = fit_preferences(drawn(60, SURE)[0], SURE)
    rows = np.random.default_rng(1).normal(size=(3, 6))
    draws = model.draws(rows, 20_000, np.random.default_rng(0))
    np.testing.assert_allclose(draws.mean(1), rows @ model.mean, atol=0.1)
    np.testing.assert_allclose(draws.var(1), np.diag(rows @ model.covariance @ rows.T), rtol=0.1)


def test_comparisons_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 outcomes; there must be one of each"):
        fit_preferences(Compared(np.zeros((1, 2)), np.zeros((1, 2)), np.zeros(2)), SURE)
    with pytest.raises(ValueError, match=r"must be 1, 0\.5 or 0, got \[0\.3\]"):
        fit_preferences(Compared(np.zeros((1, 2)), np.zeros((1, 2)), np.array([0.3])), SURE)


def test_answers_given_what_is_honest_are_probabilities() -> None:
    table = outcome_table(Noise(0.1, 0.2))
    np.testing.assert_allclose(table.sum(1), 1)
    np.testing.assert_allclose(table, [[0.92, 0.08, 0], [0.28, 0.72, 0], [0.24, 0.04, 0.72]])


@pytest.mark.parametrize(("noise", "bias"), list(product((0.0, 0.1, 0.25), (0.0, 0.15, 0.4))))
def test_the_simulated_persons_noise_and_bias_are_found_within_five_points(noise: float, bias: float) -> None:
    person = SimulatedPerson({}, lambda _, text: float(text.split()[0]), noise, bias, seed=3)
    rng = np.random.default_rng(0)
    values = rng.integers(0, 3, (2000, 2))  # a third are ties
    both = [(f"{a} {n}", f"{b} x{n}") for n, (a, b) in enumerate(values)]
    first = person.answer([Question("preference", PROMPT, pair) for pair in both])
    second = person.answer([Question("preference", PROMPT, pair[::-1], repeat=1) for pair in both])
    found = estimate_noise([], list(zip(first, second, strict=True)))
    assert found == pytest.approx(Noise(noise, bias), abs=0.05)


def test_answers_asked_once_tell_the_bias_too() -> None:
    assert estimate_noise(["A"] * 150 + ["B"] * 50, []).bias > 0.3
    assert estimate_noise(["A"] * 100 + ["B"] * 100, []).bias < 0.02
    assert estimate_noise([], []) == pytest.approx(Noise(0.02, 0.02), abs=1e-3)


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match="'C' must be one of A, B, tie"):
        estimate_noise(["C"], [])
