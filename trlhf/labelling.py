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
        self._samples: dict[str, dict[int, dict[str, tuple[str | None, int]]]] = {}  # prompt id → round → text → …

    def add(self, rollouts: Iterable[Rollout], round_number: int = 0) -> None:
        """Keep some samples of a round; equal texts are counted."""
        for rollout in rollouts:
            self._keep(rollout.prompt_id, round_number, rollout.text, rollout.answer, 1)

    def rows(self) -> list[dict[str, Any]]:
        """Return one JSON row for each prompt and round."""
        return [
            {"prompt_id": prompt_id, "round": number, "samples": samples}
            for prompt_id, rounds in self._samples.items()
            for number, samples in rounds.items()
        ]

    def load(self, path: Path) -> None:
        """Take up what `rows` gave to a file; read twice it counts once."""
        for row in files.read_jsonl(path):
            samples = {text: (answer, count) for text, (answer, count) in row["samples"].items()}
            self._samples.setdefault(row["prompt_id"], {})[row["round"]] = samples

    def shares(self, labels: Sequence[Label]) -> tuple[list[float], list[float]]:
        """Return for each verdict its answer's share of the samples, and 1 if it was right.

        The share is what the question was chosen by: of the samples of the verdict's own round, without those whose
        answers the labels of earlier rounds had ruled out.
        """
        shares, right = [], []
        for number in sorted({label.round for label in labels}):
            before = Knowledge([label for label in labels if label.round < number])
            for label in labels:
                if label.kind != "verdict" or label.round != number:
                    continue
                samples = self._samples.get(label.prompt_id, {}).get(number, {}).values()
                possible = sum(
                    n for answer, n in samples if answer is None or before.known(label.prompt_id, answer) is not False
                )
                if possible:
                    shares.append(sum(n for answer, n in samples if answer == label.answer) / possible)
                    right.append(float(label.outcome == "right"))
        return shares, right

    def _keep(self, prompt_id: str, number: int, text: str, answer: str | None, count: int) -> None:
        kept = self._samples.setdefault(prompt_id, {}).setdefault(number, {})
        kept[text] = (answer, kept.get(text, (answer, 0))[1] + count)

    def sampled(self, prompt_id: str) -> list[dict[str, tuple[str, int]]]:
        """Return for each round the texts with an answer that were sampled for a prompt, with it and how often."""
        rounds = self._samples.get(prompt_id, {})
        return [
            {text: (answer, count) for text, (answer, count) in rounds[number].items() if answer is not None}
            for number in sorted(rounds)
        ]

    def _all_samples(self, prompt_id: str) -> dict[str, str | None]:
        """Return each text that was sampled for a prompt in any round, with its answer."""
        rounds = self._samples.get(prompt_id, {}).values()
        return {text: answer for samples in rounds for text, (answer, _) in samples.items()}

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
            for text, answer in self._all_samples(prompt.id).items():
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
