"""A person who can be run a thousand times: knows the answers, has a taste, makes mistakes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

from trlhf.errors import UserError
from trlhf.labelers.exact import gold_answer, is_right
from trlhf.ledger import question_key
from trlhf.types import Prompt, Question


class SimulatedPerson:
    """Answer every kind of question as a fallible person would.

    A verdict is right with probability 1 - ``noise``. In a preference the response of the higher taste wins (a tie
    below ``tie_threshold``), A and B are swapped with probability ``noise`` (a tie then becomes either), and with
    probability ``position_bias`` the person answers A without looking. A gold answer is looked up: no noise.
    All chance is a pure function of (seed, question key): the same question gets the same answer, also after a kill;
    a repeat is a new question and gets its own draw.

    Args:
        answers: gold answer by prompt id.
        taste: how much this person likes a response; only differences count.
        noise: flip probability, in [0, 0.5].
        position_bias: probability of answering A whatever the responses are, in [0, 1].
        seed: of all mistakes.
        tie_threshold: taste differences below it are ties.

    Attributes:
        calls: how many questions were answered.
    """

    name = "simulated"

    def __init__(
        self,
        answers: Mapping[str, str],
        taste: Callable[[Prompt, str], float],
        noise: float = 0.0,
        position_bias: float = 0.0,
        seed: int = 0,
        tie_threshold: float = 0.05,
    ) -> None:
        if not 0 <= noise <= 0.5:
            raise UserError(f"labeler.noise={noise} must be in [0, 0.5]: a flip probability above it is a liar's")
        if not 0 <= position_bias <= 1:
            raise UserError(f"labeler.position_bias={position_bias} must be in [0, 1]")
        self._answers, self._taste = answers, taste
        self._noise, self._position_bias, self._seed = noise, position_bias, seed
        self._tie_threshold = tie_threshold
        self.calls = 0

    def answer(self, questions: Sequence[Question]) -> list[str]:
        """Return one outcome for each question, in order."""
        outcomes = [self._one(question) for question in questions]
        self.calls += len(outcomes)
        return outcomes

    def _one(self, question: Question) -> str:
        if question.kind == "preference":
            return self._prefer(question)
        gold = gold_answer(self._answers, question, self.name)
        if question.kind == "gold":
            return gold
        flipped = self._chance(question, "flip") < self._noise
        return "right" if is_right(question, gold) != flipped else "wrong"

    def _prefer(self, question: Question) -> str:
        if self._chance(question, "position") < self._position_bias:
            return "A"
        first, second = (self._taste(question.prompt, response) for response in question.responses)
        difference = first - second
        honest = "tie" if abs(difference) < self._tie_threshold else "A" if difference > 0 else "B"
        if self._chance(question, "flip") >= self._noise:
            return honest
        coin = "A" if self._chance(question, "coin") < 0.5 else "B"
        return {"A": "B", "B": "A", "tie": coin}[honest]

    def _chance(self, question: Question, purpose: str) -> float:
        """Return a number in [0, 1) that depends on seed, question and purpose only."""
        digest = hashlib.sha256(f"{self._seed}:{question_key(question)}:{purpose}".encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48
