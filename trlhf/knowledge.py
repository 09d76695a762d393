"""What the labels bought so far say about answers: "label once, verify for ever".

Pure code on labels: no database, no gold answer that was not paid for.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from trlhf.evaluation.answers import canonical_answer, same_answer
from trlhf.types import Label


class Knowledge:
    """Decide from labels which answers are right, wrong or unknown; the order of the labels never matters.

    A prompt has one right answer, in whatever form it is written (``same_answer``), so:

    - a right verdict makes that answer right and every other answer of the prompt wrong; a wrong verdict rules that
      answer out; both hold for every later response that ends in that answer. A gold label states the right answer.
    - Labels may contradict each other (noise, repeats). The *margin* of an answer is its right verdicts minus its wrong
      ones. The right answer is the one with the largest positive margin: the maximum-likelihood choice when verdicts
      are flipped independently and equally often. If several share that margin the prompt is *disputed*: none of them
      is known until a repeat breaks the tie, and no answer is ruled out by them. An answer with a negative margin is
      ruled out; a margin of 0 says nothing.
    - Gold labels outvote verdicts. If gold labels disagree the most frequent one holds; between equally frequent ones
      margins decide, each gold label counting as one right verdict.
    - A response without an answer is wrong, whatever else is known: it cannot be the right answer in any form.
    """

    def __init__(self, labels: Iterable[Label] = ()) -> None:
        self._gold: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._margins: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._right: dict[str, str | None] = {}
        for label in labels:
            self.add(label)

    def add(self, label: Label) -> None:
        """Take one more label into account; a preference teaches nothing about right and wrong."""
        if label.kind == "preference":
            return
        answer = self._filed_as(label.prompt_id, label.outcome if label.kind == "gold" else label.answer)
        if answer is None:
            return
        if label.kind == "gold":
            self._gold[label.prompt_id][answer] += 1
        self._margins[label.prompt_id][answer] += -1 if label.kind == "verdict" and label.outcome == "wrong" else 1
        self._right[label.prompt_id] = self._decide(label.prompt_id)

    def known(self, prompt_id: str, answer: str | None) -> bool | None:
        """Say whether an answer is right; None when the labels do not tell."""
        filed = self._filed_as(prompt_id, answer)
        if filed is None:
            return False
        right = self._right.get(prompt_id)
        if right is not None:
            return filed == right
        margins = self._margins.get(prompt_id)
        return False if margins is not None and margins[filed] < 0 else None

    def right_answer(self, prompt_id: str) -> str | None:
        """Return the canonical right answer, None as long as the prompt is not verifiable."""
        return self._right.get(prompt_id)

    def ruled_out(self, prompt_id: str) -> frozenset[str]:
        """Return the answers with a verdict that are known to be wrong (once verifiable, all others are too)."""
        return frozenset(
            answer for answer in self._margins.get(prompt_id, ()) if self.known(prompt_id, answer) is False
        )

    def verifiable_prompts(self) -> list[str]:
        """Return the prompts whose right answer is known, in the order of their first label."""
        return [prompt_id for prompt_id, answer in self._right.items() if answer is not None]

    def _filed_as(self, prompt_id: str, answer: str | None) -> str | None:
        """Return the form under which an equal answer of this prompt is filed, else the canonical form."""
        canonical = canonical_answer(answer) if answer is not None else None
        filed = self._margins.get(prompt_id)
        if canonical is None or not filed or canonical in filed:
            return canonical
        return next((other for other in filed if same_answer(other, canonical)), canonical)

    def _decide(self, prompt_id: str) -> str | None:
        for votes in (self._gold.get(prompt_id), self._margins[prompt_id]):
            if votes:
                top = max(votes.values())
                leaders = [answer for answer, count in votes.items() if count == top]
                if top > 0 and len(leaders) == 1:
                    return leaders[0]
        return None
