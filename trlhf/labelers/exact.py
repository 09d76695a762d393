"""A verifier that knows the gold answers: for tasks with one right answer, and for the upper bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trlhf.errors import UserError
from trlhf.evaluation.answers import extract_answer, same_answer
from trlhf.types import Question


class ExactVerifier:
    """Answer verdict and gold questions without error.

    Args:
        answers: gold answer by prompt id.

    Attributes:
        calls: how many questions were answered: it must equal the labels in the ledger, or gold answers leak.
    """

    name = "exact"

    def __init__(self, answers: Mapping[str, str]) -> None:
        self._answers = answers
        self.calls = 0

    def answer(self, questions: Sequence[Question]) -> list[str]:
        """Return ``right`` or ``wrong`` for a verdict, the gold answer for gold."""
        outcomes = [self._one(question) for question in questions]
        self.calls += len(outcomes)
        return outcomes

    def _one(self, question: Question) -> str:
        if question.kind == "preference":
            raise UserError(
                f"labeler exact: prompt {question.prompt.id}: it has no taste and cannot answer a preference question; "
                "use labeler=simulated, or ask no preferences"
            )
        gold = gold_answer(self._answers, question, self.name)
        if question.kind == "gold":
            return gold
        return "right" if is_right(question, gold) else "wrong"


def gold_answer(answers: Mapping[str, str], question: Question, labeler: str) -> str:
    """Return the gold answer that a question is about, or say which one is missing."""
    try:
        return answers[question.prompt.id]
    except KeyError:
        raise UserError(
            f"labeler {labeler}: prompt {question.prompt.id} has no gold answer, so a {question.kind} question about "
            "it cannot be answered; give its row an answer, or mark the prompt as open"
        ) from None


def is_right(question: Question, gold: str) -> bool:
    """Say whether the answer that a verdict is about (else the response's final answer) equals the gold answer."""
    answer = question.answer if question.answer is not None else extract_answer(question.responses[0])
    return same_answer(answer, gold)
