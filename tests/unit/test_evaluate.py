"""Evaluation: what is counted, what is compared, on responses made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from trlhf.config import EvaluationConfig
from trlhf.evaluation import evaluate as module
from trlhf.evaluation.evaluate import TIE, Evaluation, compare, describe, evaluate
from trlhf.evaluation.statistics import wilson_interval
from trlhf.rollout import Sampling
from trlhf.types import Prompt, Rollout

PLAN = "Plan: add 2 and 3. 2 + 3 = 5. The answer is 5."


def prompt(name: str, kind: str = "money", task: Any = "exact", reasoning: bool = True) -> Prompt:
    return Prompt(name, ({"role": "user", "content": f"question {name}?"},), kind, task, reasoning)


PROMPTS = [
    prompt("m1"),
    prompt("m2"),
    prompt("s1", "sums"),
    prompt("f1", "fact", reasoning=False),
    prompt("o1", "line", "open", reasoning=False),
    prompt("o2", "line", "open", reasoning=False),
]


def evaluation(correct: dict[str, bool], texts: Sequence[str] = (PLAN,) * 6, unfinished: int = 0) -> Evaluation:
    rollouts = [
        Rollout(p.id, text, finished=i >= unfinished, answer="5" if p.task == "exact" else None)
        for i, (p, text) in enumerate(zip(PROMPTS, texts, strict=True))
    ]
    return Evaluation(PROMPTS, rollouts, correct)


def test_accuracy_counts_reasoning_prompts_only() -> None:
    right = {"m1": True, "m2": False, "s1": True, "f1": False}
    texts = (PLAN, "5", PLAN, "Blue.", PLAN, "A line.")
    found = describe(evaluation(right, texts, unfinished=3), EvaluationConfig(), 0)
    low, high = wilson_interval(2, 3)
    assert found["accuracy"] == {"value": pytest.approx(2 / 3), "low": low, "high": high, "n": 3}
    assert {kind: (entry["value"], entry["n"]) for kind, entry in found["by_kind"].items()} == {
        "fact": (0.0, 1),
        "money": (0.5, 2),
        "sums": (1.0, 1),
    }
    assert (found["plans"]["reasoning"]["value"], found["plans"]["reasoning"]["n"]) == (pytest.approx(2 / 3), 3)
    assert (found["plans"]["other"]["value"], found["plans"]["other"]["n"]) == (pytest.approx(1 / 3), 3)
    assert {kind: (entry["value"], entry["n"]) for kind, entry in found["plans_by_kind"].items()} == {
        "fact": (0.0, 1),
        "line": (0.5, 2),
        "money": (0.5, 2),
        "sums": (1.0, 1),
    }
    assert (found["plans_by_kind"]["sums"]["low"], found["plans_by_kind"]["sums"]["high"]) == wilson_interval(1, 1)
    assert found["unfinished"] == 0.5


def test_confidence_and_interval_are_the_configured_ones() -> None:
    right = {"m1": True, "m2": False, "s1": True}
    wide = describe(evaluation(right), EvaluationConfig(confidence=0.99), 0)["accuracy"]
    assert (wide["low"], wide["high"]) == wilson_interval(2, 3, 0.99)
    drawn = describe(evaluation(right), EvaluationConfig(interval="bootstrap"), 0)["accuracy"]
    assert (drawn["low"], drawn["high"]) == (0.0, 1.0)


def test_nothing_to_measure_is_none_not_zero() -> None:
    empty = describe(Evaluation([], [], {}), EvaluationConfig(), 0)
    assert empty == {
        "accuracy": None,
        "by_kind": {},
        "plans": {"reasoning": None, "other": None},
        "plans_by_kind": {},
        "unfinished": 0.0,
    }
    assert compare(Evaluation([], [], {}), Evaluation([], [], {}), lambda p, text: 0.0, 0.95) == {}


def test_stages_are_compared_prompt_by_prompt() -> None:
    before = evaluation({"m1": False, "m2": True, "s1": False, "f1": True})
    after = evaluation({"m1": True, "m2": False, "s1": True, "f1": False})
    found = compare(before, after, None, 0.95)
    assert found == {"mcnemar": {"gained": 2, "lost": 1, "p": pytest.approx(1.0)}}  # the fact does not count


def test_win_rate_is_the_taste_on_open_prompts_with_ties() -> None:
    liking = {"good": 0.5, "bad": -0.5, "better by a hair": 0.5 + 0.9 * TIE}

    def taste(asked: Prompt, text: str) -> float:
        assert asked.task == "open"
        return liking[text]

    def evaluated(first: str, second: str) -> Evaluation:
        return evaluation({}, (PLAN, PLAN, PLAN, PLAN, first, second))

    def rate(before: Evaluation, after: Evaluation) -> float:
        found = compare(before, after, taste, 0.95)["win_rate"]
        assert found["n"] == 2 and found["low"] < found["value"] + 1e-9 and found["high"] > found["value"] - 1e-9
        return float(found["value"])

    assert rate(evaluated("bad", "bad"), evaluated("good", "good")) == 1.0
    assert rate(evaluated("good", "good"), evaluated("bad", "good")) == 0.25  # a loss and a tie
    assert rate(evaluated("good", "bad"), evaluated("better by a hair", "bad")) == 0.5


def test_samples_hold_what_a_reader_asks_for() -> None:
    rows = evaluation({"m1": True}, unfinished=1).samples({"m1": "5"})
    assert rows[0] == {
        "prompt_id": "m1",
        "kind": "money",
        "prompt": "question m1?",
        "response": PLAN,
        "finished": False,
        "answer": "5",
        "gold": "5",
        "correct": True,
    }
    assert (rows[4]["gold"], rows[4]["correct"]) == (None, None) and len(rows) == 6


def test_prompts_are_answered_greedily_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers in other forms are equal; a prompt without a gold answer is not judged; no answer is wrong."""
    answers = {"m1": "$1,000", "m2": "7", "s1": "1/2", "f1": "blue", "o1": None, "o2": None}
    asked: list[Sampling] = []

    def sample(
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        generator: torch.Generator,
        advance: Any,
    ) -> list[list[Rollout]]:
        asked.append(sampling)
        advance(len(prompts))
        given = {"m1": "1000", "m2": None, "s1": "0.5", "f1": "green"}
        return [[Rollout(p.id, "text", answer=given.get(p.id))] for p in prompts]

    monkeypatch.setattr(module, "sample_as", sample)
    done: list[int] = []
    gold = {name: answer for name, answer in answers.items() if answer is not None}
    config = EvaluationConfig(batch_size=4, max_new_tokens=9)
    model: Any = None
    found = evaluate(model, model, PROMPTS, gold, config, done.append)
    assert asked == [Sampling(temperature=0.0, max_new_tokens=9, samples=1, batch_size=4)] and done == [6]
    assert found.correct == {"m1": True, "m2": False, "s1": True, "f1": False}
    assert found.reasoning() == [True, False, True]


def test_prompts_that_could_not_be_asked_count_as_wrong() -> None:
    asked = Evaluation(PROMPTS[:1], [Rollout("m1", PLAN, answer="5")], {"m1": True})
    found = asked.with_unanswered([PROMPTS[1], PROMPTS[4]], {"m2": "7"})
    assert found.correct == {"m1": True, "m2": False} and found.reasoning() == [True, False]
    described = describe(found, EvaluationConfig(), 0)
    assert (described["accuracy"]["value"], described["accuracy"]["n"]) == (0.5, 2)
    assert described["unfinished"] == pytest.approx(2 / 3)
    assert [row["response"] for row in found.samples({})] == [PLAN, "", ""]
