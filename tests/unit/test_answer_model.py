"""Which of the sampled answers is right: the conditional logit model against slow loops, and what it must do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy import ndarray
from scipy.optimize import approx_fprime

from trlhf.targeting import answer_fit
from trlhf.targeting.acquisition import query_information
from trlhf.targeting.answer_fit import (
    DEFAULT_SPREAD,
    NONE_SD,
    SHARE_SD,
    SHARE_SLOPE,
    fit_answers,
    left_out_log_likelihood,
)
from trlhf.targeting.answers import AnswerModel, Answers, label_likelihood
from trlhf.targeting.noise import RATES, flip_rate_from
from trlhf.targeting.whitening import Whitening


def unlabelled(seed: int, prompts: int = 12, size: int = 5) -> Answers:
    """Prompts with one to four answers each."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5, prompts)
    numbers = np.repeat(np.arange(prompts), counts)
    shares = np.concatenate([rng.dirichlet(np.ones(n)) for n in counts]).clip(0.05)
    features = rng.standard_normal((len(numbers), size))
    return Answers(features, shares, numbers, np.ones(len(numbers)), np.ones(prompts))


def labelled(answers: Answers, verdicts: dict[int, list[tuple[str, bool]]], flip_rate: float = 0.02) -> Answers:
    """Label prompts; the answers of a prompt are called 0, 1, 2, …"""
    likelihood, none = answers.likelihood.copy(), answers.likelihood_none.copy()
    for prompt, told in verdicts.items():
        rows = np.flatnonzero(answers.prompts == prompt)
        likelihood[rows], none[prompt] = label_likelihood([str(n) for n in range(len(rows))], told, flip_rate)
    return replace(answers, likelihood=likelihood, likelihood_none=none)


def slow_objective(theta: ndarray, answers: Answers, spread: float) -> float:
    """The penalised negative log-likelihood, prompt by prompt."""
    value = 0.0
    for prompt in range(answers.count):
        rows = np.flatnonzero(answers.prompts == prompt)
        logits = [theta[1] * answers.shares[n] + theta[2:] @ answers.features[n] for n in rows] + [theta[0]]
        weights = np.exp(logits)
        p = weights / weights.sum()
        value -= np.log(p @ [*answers.likelihood[rows], answers.likelihood_none[prompt]])
    deviation = theta - np.array([0, SHARE_SLOPE, *np.zeros(len(theta) - 2)])
    sd = np.array([NONE_SD, SHARE_SD, *np.full(len(theta) - 2, spread / np.sqrt(len(theta) - 2))])
    return float(value + 0.5 * (deviation**2 / sd**2).sum())


def _maximise_from(answers: Answers, spread: float, start: ndarray) -> ndarray:
    size = answers.features.shape[1]
    sd = np.array([NONE_SD, SHARE_SD, *np.full(size, spread / np.sqrt(size))])
    mean = np.array([0, SHARE_SLOPE, *np.zeros(size)])
    labelled = np.isin(answers.groups(), list(VERDICTS))
    groups = np.unique(answers.groups()[labelled], return_inverse=True)[1]
    return answer_fit._maximise(
        answers.design()[labelled], groups, answers.likelihoods()[labelled], mean, 1 / sd**2, 0.1 * start
    )


VERDICTS = {0: [("0", True)], 1: [("0", False)], 3: [("0", True), ("0", True)], 5: [("0", False)], 8: [("0", True)]}


@pytest.mark.parametrize("seed", range(4))
def test_the_fit_is_at_the_optimum_of_the_slow_objective(seed: int) -> None:
    answers = labelled(unlabelled(seed), VERDICTS)
    model = fit_answers(answers)
    assert model.spread == DEFAULT_SPREAD and model.labelled == 5
    slope = approx_fprime(model.mean, slow_objective, 1e-6, answers, model.spread)
    assert np.abs(slope).max() < 1e-3
    elsewhere = _maximise_from(answers, model.spread, np.random.default_rng(seed).standard_normal(len(model.mean)))
    np.testing.assert_allclose(elsewhere, model.mean, rtol=0, atol=1e-11)  # to the last digits, from anywhere


def test_without_labels_the_most_frequent_answer_is_the_likeliest() -> None:
    answers = unlabelled(0)
    model = fit_answers(answers)
    assert model.labelled == 0 and model.mean.tolist() == [0, SHARE_SLOPE, *[0] * 5]
    p = model.probabilities(answers)
    for prompt in range(answers.count):
        rows = np.flatnonzero(answers.prompts == prompt)
        assert p[rows].argmax() == answers.shares[rows].argmax() and p[rows].sum() < 1


def test_a_wrong_verdict_speaks_for_the_other_answers() -> None:
    answers = unlabelled(1)
    prompt = next(n for n in range(answers.count) if (answers.prompts == n).sum() == 3)
    rows = np.flatnonzero(answers.prompts == prompt)
    before = fit_answers(answers).probabilities(answers)[rows]
    wrong = labelled(answers, {prompt: [("0", False)]})
    after = fit_answers(answers).probabilities(wrong)[rows]  # the same model, told of the verdict
    assert after[0] < 0.05 * before[0] + 0.02 and (after[1:] > before[1:]).all()
    right = fit_answers(answers).probabilities(labelled(answers, {prompt: [("0", True)]}))[rows]
    assert right[0] > 0.9 and (right[1:] < before[1:]).all()


def test_what_is_learned_on_some_prompts_tells_on_others() -> None:
    """The sign of one feature decides: a dozen labels are enough, and the share alone would mislead."""
    rng = np.random.default_rng(3)
    prompts = 60
    numbers = np.repeat(np.arange(prompts), 2)
    features = rng.standard_normal((2 * prompts, 4)) * 0.3
    right = rng.integers(0, 2, prompts)
    features[::2, 0], features[1::2, 0] = np.where(right == 0, 2, -2), np.where(right == 1, 2, -2)
    answers = Answers(features, np.tile([0.6, 0.4], prompts), numbers, np.ones(2 * prompts), np.ones(prompts))
    told = labelled(answers, {n: [("0", bool(right[n] == 0))] for n in range(20)})
    model = fit_answers(told)
    p = model.probabilities(told).reshape(-1, 2)
    assert (p.argmax(1)[20:] == right[20:]).all()
    draws = model.draws(told, 200, np.random.default_rng(0)).reshape(prompts, 2, 200)
    assert (draws.mean(2).argmax(1)[20:] == right[20:]).all() and draws.std(2).min() > 0.001


def test_labels_narrow_the_posterior_where_they_speak() -> None:
    answers = unlabelled(2)
    before, after = fit_answers(answers), fit_answers(labelled(answers, VERDICTS))
    z, _ = before.queries(answers)
    spread_before = np.einsum("nq,qr,nr->n", z, before.covariance, z)
    spread_after = np.einsum("nq,qr,nr->n", z, after.covariance, z)
    assert (spread_after <= spread_before + 1e-9).all() and spread_after.sum() < 0.95 * spread_before.sum()
    assert np.linalg.eigvalsh(after.covariance).min() > 0


@pytest.mark.parametrize("flip_rate", [0.02, 0.2])
def test_the_posterior_covariance_is_that_of_a_verdict_a_prompt(flip_rate: float) -> None:
    """Σ⁻¹ = prior precision + Σ_x ω·zzᵀ, z the query of the judged answer as it was before the labels."""
    answers = unlabelled(4)
    told = labelled(answers, VERDICTS, flip_rate)
    model = fit_answers(told, flip_rate)
    size = answers.features.shape[1]
    precision = np.diag(1 / np.array([NONE_SD, SHARE_SD, *np.full(size, model.spread / np.sqrt(size))]) ** 2)
    queries, p = model.queries(answers)
    for prompt in VERDICTS:
        row = int(np.flatnonzero(answers.prompts == prompt)[0])
        omega = query_information(p[[row]], flip_rate)[0]
        precision += omega * np.outer(queries[row], queries[row])
    np.testing.assert_allclose(model.covariance, np.linalg.inv(precision), rtol=1e-7, atol=1e-10)


def test_draws_have_the_posterior_s_mean_and_covariance() -> None:
    answers = Answers(np.eye(2), np.full(2, 1e-9), np.arange(2), np.ones(2), np.ones(2))  # one answer a prompt
    model = AnswerModel(
        np.array([0.0, 0.0, 1.0, -1.0]),
        np.diag([0, 0, 1.0, 1.0]) + 0.8 * (np.eye(4)[[0, 1, 3, 2]] * [0, 0, 1, 1]),
        3.0,
        5,
    )
    p = model.draws(answers, 4000, np.random.default_rng(0))
    logits = np.log(p) - np.log1p(-p)  # of an answer against none: w·φ, so the parameter itself
    assert logits.mean(1) == pytest.approx([1.0, -1.0], abs=0.06)
    np.testing.assert_allclose(np.cov(logits), [[1.0, 0.8], [0.8, 1.0]], atol=0.08)


@pytest.mark.parametrize("seed", range(3))
def test_a_query_is_the_gradient_of_the_log_odds(seed: int) -> None:
    answers = labelled(unlabelled(seed), VERDICTS)
    model = fit_answers(answers)
    queries, p = model.queries(answers)

    def log_odds(theta: ndarray, row: int) -> float:
        q = replace(model, mean=theta).probabilities(answers)[row]
        return float(np.log(q) - np.log1p(-q))

    for row in np.flatnonzero((p > 0.01) & (p < 0.99))[:6]:
        np.testing.assert_allclose(queries[row], approx_fprime(model.mean, log_odds, 1e-6, int(row)), atol=1e-3)


def test_verdicts_multiply_and_contradict() -> None:
    likely, none = label_likelihood(["a", "b"], [("a", True), ("a", False), ("b", False)], 0.1)
    a, b, other = 0.9 * 0.1 * 0.9, 0.1 * 0.9 * 0.1, 0.1 * 0.9 * 0.9
    assert [*likely, none] == pytest.approx([a, b, other])
    with pytest.raises(ValueError, match=r"flip_rate=0.5 must be in \(0, 0.5\)"):
        label_likelihood(["a"], [], 0.5)


def test_more_labels_choose_the_spread_by_cross_validation() -> None:
    """Features that decide everything ask for a wide prior, features that say nothing for a narrow one."""
    rng = np.random.default_rng(0)
    prompts = 80
    numbers = np.repeat(np.arange(prompts), 2)
    right = rng.integers(0, 2, prompts)
    noise = rng.standard_normal((2 * prompts, 12))
    signal = noise * 0.3
    signal[::2, 0], signal[1::2, 0] = np.where(right == 0, 3, -3), np.where(right == 1, 3, -3)
    spreads = []
    for features in (signal, noise):
        answers = Answers(features, np.full(2 * prompts, 0.5), numbers, np.ones(2 * prompts), np.ones(prompts))
        told = labelled(answers, {n: [("0", bool(right[n] == 0))] for n in range(prompts)})
        spreads.append(fit_answers(told).spread)
    assert spreads[0] > spreads[1]


def test_whitening_puts_every_response_on_one_sphere() -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((200, 6)) * [100, 10, 1, 1, 1, 1e-9] + 7
    whitening = Whitening.fit(features, smallest=1e-3)
    assert whitening.map.shape == (6, 5)  # the last direction is noise
    white = (features - features.mean(0)) @ whitening.map
    np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(5), atol=1e-8)
    seen = whitening(features)
    np.testing.assert_allclose(np.linalg.norm(seen, axis=1), np.sqrt(5))
    np.testing.assert_allclose(seen / np.sqrt(5), white / np.linalg.norm(white, axis=1, keepdims=True))


def test_rows_that_do_not_fit_are_refused() -> None:
    answers = unlabelled(0)
    with pytest.raises(ValueError, match="there must be one of each for every answer"):
        fit_answers(replace(answers, shares=answers.shares[1:]))


def told_by_people(flip_rate: float, prompts: int = 240) -> tuple[Answers, list[list[tuple[str, bool]]], list[bool]]:
    """Two answers a prompt, of which a feature tells more or less surely; what people say of the first, and the truth.

    An eighth of the prompts is asked twice.
    """
    rng = np.random.default_rng(1)
    signal = rng.standard_normal((2 * prompts, 4))
    signal[:, 0] *= 10
    logits = 2 * signal[:, 0].reshape(prompts, 2)
    truth = rng.random(prompts) < 1 / (1 + np.exp(logits[:, 1] - logits[:, 0]))
    answers = Answers(
        signal, np.full(2 * prompts, 0.5), np.repeat(np.arange(prompts), 2), np.ones(2 * prompts), np.ones(prompts)
    )
    told = [
        [("0", bool(x != (rng.random() < flip_rate))) for _ in range(1 + (n % 8 == 0))] for n, x in enumerate(truth)
    ]
    return answers, told, truth.tolist()


def estimated(answers: Answers, told: list[list[tuple[str, bool]]]) -> float:
    def evidence(rate: float) -> float:
        return left_out_log_likelihood(labelled(answers, dict(enumerate(told)), rate), rate)

    return flip_rate_from([evidence(rate) for rate in RATES])


@pytest.mark.parametrize("flip_rate", [0.0, 0.1, 0.2, 0.3])
def test_how_often_labels_err_shows_in_what_they_say_of_prompts_the_model_was_not_fitted_to(flip_rate: float) -> None:
    answers, told, truth = told_by_people(flip_rate)
    wrong = np.mean([x != right for said, right in zip(told, truth, strict=True) for _, x in said])
    assert abs(estimated(answers, told) - wrong) < 0.07


def test_verdicts_that_contradict_each_other_are_errors_too() -> None:
    answers, told, _ = told_by_people(0.0)
    changed = [[*said, ("0", said[0][1] != (n % 4 == 0))] for n, said in enumerate(told)]
    assert estimated(answers, told) < 0.01
    assert estimated(answers, changed) == pytest.approx(0.125, abs=0.03)


def test_without_evidence_people_are_taken_to_err_as_seldom_as_is_usual() -> None:
    answers, told, _ = told_by_people(0.3, prompts=15)
    assert estimated(answers, told) == flip_rate_from([7.0] * len(RATES)) == pytest.approx(0.02, abs=0.002)
    with pytest.raises(ValueError, match=r"flip_rate_from: evidence=\[nan, .* must be 7 finite numbers"):
        flip_rate_from([np.nan] * 7)
