"""What targeted labels have to beat: scores by hand, double Thompson sampling by what it must and must not pick."""

from __future__ import annotations

import numpy as np
import pytest

from trlhf.targeting.baselines import (
    apl_scores,
    double_thompson,
    double_thompson_pair,
    least_agreed_scores,
    max_entropy_scores,
)


def test_entropy_and_agreement() -> None:
    assert max_entropy_scores(np.array([0.0, 0.5, 1.0])) == pytest.approx([0, np.log(2), 0])
    assert max_entropy_scores(np.array([0.2])) == pytest.approx(max_entropy_scores(np.array([0.8])))
    assert least_agreed_scores(np.array([0.25, 1.0])) == pytest.approx([0.75, 0.0])


def test_apl_keeps_the_uncertain_prompts_and_ranks_them_by_margin() -> None:
    scores = apl_scores(np.array([3.0, 1.0, 2.0, 0.5, 2.5]), np.array([0.1, 9.0, -4.0, 9.0, 2.0]))
    assert scores == pytest.approx([0.1, -np.inf, 4.0, -np.inf, 2.0])
    assert np.isfinite(apl_scores(np.zeros(4), np.zeros(4), 1.0)).all()


def test_double_thompson_asks_about_contested_prompts_first() -> None:
    draws = np.array([[9.0, 0, 1, 2, 5, 0], [9.0, 0, 2, 1, 5, 0]])  # only the prompt of answers 2 and 3 is contested
    prompts = np.array([0, 0, 1, 1, 2, 2])
    rng = np.random.default_rng(0)
    ones = [int(double_thompson(draws, prompts, 1, rng)[0]) for _ in range(200)]
    assert set(ones) == {2, 3} and 60 < ones.count(2) < 140
    everything = {tuple(double_thompson(draws, prompts, 9, rng).tolist()) for _ in range(200)}
    assert everything == {(c, *rest) for c in (2, 3) for rest in ((0, 4), (4, 0))}


def test_double_thompson_asks_once_a_prompt_wherever_its_answers_stand() -> None:
    rng = np.random.default_rng(1)
    prompts = rng.permutation(np.repeat(np.arange(40), 3))
    picks = double_thompson(rng.normal(size=(6, 120)), prompts, 25, rng)
    assert len(picks) == 25 == len(set(prompts[picks]))
    assert len(double_thompson(np.zeros((2, 0)), np.zeros(0, int), 3, rng)) == 0


def test_a_pair_holds_the_best_of_two_draws() -> None:
    rng = np.random.default_rng(0)
    draws = np.array([[5.0, 1, 0, 0], [1, 5.0, 0, 0]])
    assert {double_thompson_pair(draws, rng) for _ in range(100)} == {(0, 1), (1, 0)}


def test_a_pair_without_disagreement_gets_a_random_second() -> None:
    rng = np.random.default_rng(0)
    agreed = np.array([[0.0, 7, 0], [0, 7, 0]])
    assert {double_thompson_pair(agreed, rng) for _ in range(100)} == {(1, 0), (1, 2)}


def test_scores_refuse_what_has_no_meaning() -> None:
    with pytest.raises(ValueError, match=r"max_entropy_scores: p must be in \[0, 1\], got nan"):
        max_entropy_scores(np.array([np.nan]))
    with pytest.raises(ValueError, match=r"apl_scores: keep_share=0 must be in \(0, 1\]"):
        apl_scores(np.ones(2), np.ones(2), 0)
    with pytest.raises(ValueError, match="apl_scores: expected equal lengths, got entropy 2, margin 3"):
        apl_scores(np.ones(2), np.ones(3))


def test_double_thompson_refuses_what_has_no_meaning() -> None:
    rng, prompts = np.random.default_rng(0), np.arange(2)
    with pytest.raises(ValueError, match="double_thompson: 1 posterior samples cannot disagree"):
        double_thompson(np.ones((1, 2)), prompts, 1, rng)
    with pytest.raises(ValueError, match="double_thompson: expected equal lengths, got columns_of_draws 3, prompts 2"):
        double_thompson(np.ones((2, 3)), prompts, 1, rng)
    with pytest.raises(ValueError, match="double_thompson: count=-1 must be at least 0"):
        double_thompson(np.ones((2, 2)), prompts, -1, rng)
    with pytest.raises(ValueError, match="double_thompson_pair: tries=0 must be at least 1"):
        double_thompson_pair(np.ones((2, 2)), rng, 0)
    with pytest.raises(ValueError, match="double_thompson_pair: 1 responses cannot be compared"):
        double_thompson_pair(np.ones((2, 1)), rng)
