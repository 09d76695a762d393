"""Questions of all shapes, votes, and what is measured on a model that answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from trlhf.config import EvaluationConfig
from trlhf.errors import UserError
from trlhf.evaluation import reasoning
from trlhf.evaluation.questions import INSTRUCTION, questions_from_rows
from trlhf.evaluation.reasoning import answer_questions, majority
from trlhf.rollout import Sampling
from trlhf.rows import Row
from trlhf.types import Prompt, Rollout


def rows(*data: dict[str, Any]) -> list[Row]:
    return [Row(f"rows:{number}", row) for number, row in enumerate(data, start=1)]


def test_every_published_shape_becomes_a_question() -> None:
    found, (report,) = questions_from_rows(
        rows(
            {"question": "2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
            {"problem": "Halve 1.", "solution": r"It is $\boxed{\frac{1}{2}}$.", "level": "Level 1"},
            {"question": "Which?", "choices": {"label": ["1", "2"], "text": ["red", "blue"]}, "answerKey": "2"},
            {"passage": "Sky.", "question": "Which?", "options": ["(A)red", "(B)blue", "(C)red"], "label": "C"},
            {"messages": [{"role": "user", "content": "4?"}], "gold": "4"},
            {"question": "Which?", "options": ["(A)red"], "label": "B"},
        ),
        "rows",
        "kind",
    )
    assert [question.answers for question in found] == [("5",), ("1/2",), ("2", "blue"), ("C",), ("4",)]
    assert [question.options for question in found] == [0, 0, 2, 3, 0]
    assert found[3].prompt.messages[0]["content"] == f"Sky.\nWhich?\n(A) red\n(B) blue\n(C) red\n{INSTRUCTION}"
    assert not any("5" in str(question.prompt.messages) for question in found[:1]), "a prompt gives nothing away"
    assert (report.read, report.kept) == (6, 5) and "'B' is not the letter of one of the 1 options" in report.describe()
    assert found[1].right("0.5") and found[2].right("blue") and not found[2].right("1") and not found[0].right(None)


def test_a_question_without_answer_stops_it() -> None:
    with pytest.raises(UserError, match="rows line 2: no answer"):
        questions_from_rows(rows({"question": "a?", "answer": "1"}, {"question": "b?"}), "rows", "kind")
    with pytest.raises(UserError, match=r"no row is a question; give each row 'question' .* and 'answer', or"):
        questions_from_rows(rows({"text": "a"}), "rows", "kind")


def test_the_majority_wins_and_ties_go_to_the_first() -> None:
    assert majority(["7", "5", "5", None]) == "5"
    assert majority(["7", "5", "5", "7"]) == "7" and majority(["5", "7", "5", "7"]) == "5"
    assert majority(["1/2", "3", r"0.5", "3", r"\frac{1}{2}"]) == "1/2"  # equal in other words
    assert majority([None, None]) is None and majority([]) is None


class Speaker:
    """Responses by question and temperature, in place of a model; what it was asked is kept."""

    def __init__(self, greedy: dict[str, str | None], votes: dict[str, list[str | None]]) -> None:
        self.greedy, self.votes, self.asked = greedy, votes, list[Sampling]()
        self.draws = list[float]()

    def sample(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        generator: torch.Generator,
        _: Any,
    ) -> list[list[Rollout]]:
        self.asked.append(sampling)
        self.draws.append(float(torch.rand(1, generator=generator)))
        if sampling.temperature == 0:
            return [[Rollout(p.id, "text", answer=self.greedy[p.id], finished=p.id != "rows:3")] for p in prompts]
        return [[Rollout(p.id, "text", answer=answer) for answer in self.votes[p.id]] for p in prompts]


@pytest.fixture
def speaker(monkeypatch: pytest.MonkeyPatch) -> Speaker:
    votes: dict[str, list[str | None]] = {
        "rows:1": ["1", "9", "9", "1"],
        "rows:2": ["2", "2", "9", None],
        "rows:3": ["9", "9", "3", "3"],
    }
    made = Speaker({"rows:1": "1", "rows:2": "9", "rows:3": None}, votes)
    monkeypatch.setattr(reasoning, "sample_responses", made.sample)
    monkeypatch.setattr(reasoning, "encode_prompt", lambda tokenizer, messages: [0] * len(messages[0]["content"]))
    return made


def ask(config: EvaluationConfig, seed: int = 0) -> reasoning.Answered:
    model: Any = None
    data = [{"question": f"{number}?", "answer": str(number)} for number in (1, 2, 3)]
    questions, _ = questions_from_rows(rows(*data, {"question": "a" * 40, "answer": "4"}), "rows", "kind")
    return answer_questions(model, model, questions, config, 30, seed)


def test_greedy_answers_votes_and_their_mean(speaker: Speaker) -> None:
    found = ask(EvaluationConfig(max_new_tokens=9, majority=4, batch_size=2, temperature=0.6))
    assert speaker.asked == [Sampling(0.0, 9, 1, 2), Sampling(0.6, 9, 4, 4)]
    assert found.votes is not None and found.single is not None
    assert (found.greedy["value"], found.greedy["n"], found.too_long, found.unfinished) == (0.25, 4, 1, 1)
    assert [row.get("majority") for row in found.samples] == ["1", "2", "9", None]
    assert found.votes["value"] == 0.5
    assert (found.single["value"], found.single["n"]) == (6 / 16, 4)
    assert found.chance is None


def test_votes_follow_the_seed_and_greedy_answers_do_not(speaker: Speaker) -> None:
    for seed in (0, 0, 1):
        ask(EvaluationConfig(max_new_tokens=9, majority=4), seed)
    votes = speaker.draws[1::2]
    assert votes[0] == votes[1] != votes[2]


def test_without_votes_nothing_is_sampled(speaker: Speaker) -> None:
    found = ask(EvaluationConfig(max_new_tokens=9))
    assert (found.votes, found.single) == (None, None) and len(speaker.asked) == 1
    assert "votes" not in found.samples[0]
