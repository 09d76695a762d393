"""From samples to labels and back: the archive of labelled prompts' samples, and what their labels say of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from trlhf import files
from trlhf.data import LabelledPair, LabelledResponse
from trlhf.knowledge import Knowledge
from trlhf.ledger_store import question_row, read_question
from trlhf.run import StageDirectory
from trlhf.types import Label, Prompt, Question, Rollout

_PREFERENCE = {"A": 1.0, "B": 0.0, "tie": 0.5}


def settle_questions(stage: StageDirectory, name: str, choose: Callable[[], list[Question]]) -> list[Question]:
    """Return the questions that an earlier start had settled on; else choose them, and write them down first.

    Sampling once more after a kill may differ in the last bit (another number of threads, a GPU), and so choose others;
    then labels would be paid that nobody uses.

    Args:
        stage: whose questions they are.
        name: file in its folder.
        choose: makes the questions; what they rest on must be on disk when it returns.
    """
    path = stage.path / name
    if path.exists():
        return [read_question(row) for row in files.read_jsonl(path)]
    questions = choose()
    stage.write_jsonl(name, [question_row(question) for question in questions])
    return questions


class Archive:
    """Samples of the prompts that labels were bought on, so that one verdict can label a whole cluster of them."""

    def __init__(self, prompts: Iterable[Prompt]) -> None:
        self._prompts = {prompt.id: prompt for prompt in prompts}
        self._samples: dict[str, dict[str, tuple[str | None, int]]] = {}  # prompt id → text → answer, how often

    def add(self, rollouts: Iterable[Rollout]) -> None:
        """Keep some samples; equal texts are counted."""
        for rollout in rollouts:
            self._keep(rollout.prompt_id, rollout.text, rollout.answer, 1)

    def rows(self) -> list[dict[str, Any]]:
        """Return one JSON row a prompt."""
        return [{"prompt_id": prompt_id, "samples": samples} for prompt_id, samples in self._samples.items()]

    def load(self, path: Path) -> None:
        """Add what `rows` gave to a file."""
        for row in files.read_jsonl(path):
            for text, (answer, count) in row["samples"].items():
                self._keep(row["prompt_id"], text, answer, count)

    def shares(self, labels: Sequence[Label]) -> tuple[list[float], list[float]]:
        """Return for each verdict the share of the prompt's samples with the judged answer, and 1 if it was right."""
        shares, right = [], []
        for label in labels:
            samples = self._samples.get(label.prompt_id, {})
            total = sum(count for _, count in samples.values())
            if label.kind == "verdict" and total:
                shares.append(sum(n for answer, n in samples.values() if answer == label.answer) / total)
                right.append(float(label.outcome == "right"))
        return shares, right

    def _keep(self, prompt_id: str, text: str, answer: str | None, count: int) -> None:
        kept = self._samples.setdefault(prompt_id, {})
        kept[text] = (answer, kept.get(text, (answer, 0))[1] + count)

    def apply(self, labels: Sequence[Label]) -> tuple[list[LabelledResponse], list[LabelledPair]]:
        """Return every kept sample that the labels decide (the cluster rule), and every compared pair."""
        knowledge = Knowledge(labels)
        labelled: list[LabelledResponse] = []
        seen: set[str] = set()
        for label in labels:
            prompt = self._prompts.get(label.prompt_id)
            if label.kind == "preference" or prompt is None or prompt.id in seen:
                continue
            seen.add(prompt.id)
            for text, (answer, _) in self._samples.get(prompt.id, {}).items():
                right = knowledge.known(prompt.id, answer)
                if right is not None:
                    labelled.append(LabelledResponse(prompt, text, right, f"label {label.id}"))
        pairs = [
            LabelledPair(
                self._prompts[x.prompt_id], x.responses[0], x.responses[1], _PREFERENCE[x.outcome], f"label {x.id}"
            )
            for x in labels
            if x.kind == "preference" and x.prompt_id in self._prompts
        ]
        return labelled, pairs
