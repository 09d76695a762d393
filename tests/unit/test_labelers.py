"""Who answers: exact, or simulated with taste, noise and position bias, the same again after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from trlhf.errors import UserError
from trlhf.labelers import ExactVerifier, SimulatedPerson
from trlhf.ledger import Ledger
from trlhf.types import Labeler, Prompt, Question

GOLD = {f"p{i}": str(i) for i in range(2000)}


def prompt(i: int) -> Prompt:
    return Prompt(f"p{i}", ({"role": "user", "content": f"question {i}"},))


def verdict(i: int, answer: str | None, repeat: int = 0) -> Question:
    return Question("verdict", prompt(i), (f"The answer is {answer}.",), answer, repeat=repeat)


def preference(i: int, first: str, second: str) -> Question:
    return Question("preference", prompt(i), (first, second))


def length(_: Prompt, response: str) -> float:
    return float(len(response))


def test_exact_verdicts_and_gold() -> None:
    verifier: Labeler = (exact := ExactVerifier({"p1": "1,080", "p2": "1/2"}))
    questions = [verdict(1, "1080"), verdict(1, "108"), verdict(2, "0.5"), Question("gold", prompt(1))]
    assert verifier.answer(questions) == ["right", "wrong", "right", "1,080"]
    assert exact.calls == 4


def test_an_exact_verdict_reads_the_response_when_no_answer_is_given() -> None:
    exact = ExactVerifier({"p1": "4"})
    asked = [Question("verdict", prompt(1), (text,)) for text in ("2 + 2 = 4. The answer is 4.", "no idea")]
    assert exact.answer(asked) == ["right", "wrong"]


def test_exact_has_no_taste_and_says_which_answer_it_lacks() -> None:
    with pytest.raises(UserError, match=r"prompt p1: it has no taste.*labeler=simulated"):
        ExactVerifier(GOLD).answer([preference(1, "a", "b")])
    for labeler in (ExactVerifier({}), SimulatedPerson({}, length)):
        with pytest.raises(UserError, match=f"labeler {labeler.name}: prompt p1 has no gold answer"):
            labeler.answer([verdict(1, "1")])


def test_calls_equal_ledger_rows(tmp_path: Path) -> None:
    exact = ExactVerifier(GOLD)
    with Ledger(tmp_path / "l.sqlite", budget=50) as ledger:
        for _ in range(2):
            ledger.ask([verdict(i % 20, str(i % 5)) for i in range(40)], exact)
        assert exact.calls == len(ledger.labels()) == 20


def test_a_careful_person_is_exact_and_prefers_by_taste() -> None:
    person = SimulatedPerson(GOLD, length)
    questions = [verdict(3, "3"), verdict(3, "4"), Question("gold", prompt(3))]
    pairs = [preference(3, "long", "s"), preference(3, "s", "long"), preference(3, "same", "size")]
    assert person.answer([*questions, *pairs]) == ["right", "wrong", "3", "A", "B", "tie"]
    assert person.calls == 6


def test_small_differences_are_ties() -> None:
    person = SimulatedPerson(GOLD, lambda _, text: float(text), tie_threshold=0.5)
    pairs = [preference(0, *pair) for pair in (("1", "1.4"), ("1", "1.6"), ("1.4", "1"), ("1.6", "1"))]
    assert person.answer(pairs) == ["tie", "B", "tie", "A"]


def test_verdict_noise_flips_that_share_both_ways() -> None:
    person = SimulatedPerson(GOLD, length, noise=0.2, seed=1)
    right = person.answer([verdict(i, str(i)) for i in range(2000)])
    wrong = person.answer([verdict(i, "no") for i in range(2000)])
    assert 0.17 < right.count("wrong") / 2000 < 0.23  # standard error 0.009
    assert 0.17 < wrong.count("right") / 2000 < 0.23


def test_preference_noise_and_position_bias() -> None:
    noisy = SimulatedPerson(GOLD, length, noise=0.2, seed=1)
    flipped = noisy.answer([preference(i, "long", "s") for i in range(2000)])
    assert 0.17 < flipped.count("B") / 2000 < 0.23 and "tie" not in flipped
    ties = noisy.answer([preference(i, "same", "size") for i in range(2000)])
    assert 0.77 < ties.count("tie") / 2000 < 0.83 and 0.07 < ties.count("A") / 2000 < 0.13
    lazy = SimulatedPerson(GOLD, length, position_bias=0.3, seed=1)
    first = lazy.answer([preference(i, "s", "long") for i in range(2000)])
    assert 0.26 < first.count("A") / 2000 < 0.34
    assert set(lazy.answer([preference(i, "long", "s") for i in range(200)])) == {"A"}


def test_chance_is_a_function_of_seed_and_question_only() -> None:
    questions = [verdict(i, str(i)) for i in range(200)] + [preference(i, "a", "bb") for i in range(200)]
    first = SimulatedPerson(GOLD, length, 0.3, 0.1, seed=5).answer(questions)
    person = SimulatedPerson(GOLD, length, 0.3, 0.1, seed=5)
    backwards = [person.answer([question])[0] for question in reversed(questions)]
    assert backwards[::-1] == first
    assert SimulatedPerson(GOLD, length, 0.3, 0.1, seed=6).answer(questions) != first
    repeats = SimulatedPerson(GOLD, length, 0.3, seed=5).answer([verdict(i, str(i), repeat=1) for i in range(200)])
    assert repeats != first[:200]


@pytest.mark.parametrize(("noise", "bias", "key"), [(0.6, 0.0, "noise=0.6"), (0.0, 1.5, "position_bias=1.5")])
def test_impossible_chances_are_refused(noise: float, bias: float, key: str) -> None:
    with pytest.raises(UserError, match=f"labeler.{key} must be in"):
        SimulatedPerson(GOLD, length, noise, bias)
