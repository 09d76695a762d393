"""GSM8K as published: who gets which questions, so that no question is both learned from and evaluated."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trlhf.checks import SOLUTIONS
from trlhf.data import LabelledResponse, prompts_from_rows
from trlhf.errors import UserError
from trlhf.rows import Row, read_rows
from trlhf.sft.chain_of_thought import native_chain_of_thought
from trlhf.sft.formats import demonstrations_from_rows
from trlhf.types import Demonstration, Prompt, RowReport

KIND = "gsm8k"
CONFIGURATION = "main"  # on the hub: the other, "socratic", has sub-questions


@dataclass(frozen=True)
class Gsm8kSplits:
    """GSM8K, split by question: the four parts share none.

    Attributes:
        demonstrations: worked solutions of training questions, as native chain of thought, for SFT.
        pool: other training questions, for RL.
        pool_gold: their gold answers by prompt id; only a labeller may look.
        test: questions of the test file, for evaluation.
        test_gold: their gold answers by prompt id.
        labelled: solutions by real models, marked right or wrong, to test questions that are *not* in ``test``.
        reports: what became of the rows of each file.
    """

    demonstrations: list[Demonstration]
    pool: list[Prompt]
    pool_gold: dict[str, str]
    test: list[Prompt]
    test_gold: dict[str, str]
    labelled: list[LabelledResponse] = field(default_factory=list)
    reports: list[RowReport] = field(default_factory=list)


def gsm8k_splits(
    path: str | Path,
    *,
    sft_prompts: int,
    pool_prompts: int,
    test_prompts: int,
    seed: int = 0,
    mirror: str | None = None,
) -> Gsm8kSplits:
    """Split GSM8K by question.

    Args:
        path: folder with ``train.jsonl`` and ``test.jsonl``, and ``example_model_solutions.jsonl`` for the reward stage
            (without it ``labelled`` is empty); or a hub name (``openai/gsm8k``, of which ``main`` is read
            unless a configuration is named: ``openai/gsm8k:socratic``).
        sft_prompts: training questions for SFT; 0 = all that the pool does not take.
        pool_prompts: training questions for RL; 0 = all that SFT does not take.
        test_prompts: questions to evaluate; 0 = all, which leaves none for ``labelled``.
        seed: decides which question goes where.
        mirror: folder with copies of hub data sets.

    Raises:
        UserError: a file is missing or malformed, or one part would be left without a question.
    """
    train, test = read_split(path, "train", mirror), read_split(path, "test", mirror)
    randomness = random.Random(f"gsm8k splits {seed}")
    evaluated = _sample(test, test_prompts or len(test), randomness)
    known = {_key(row.data) for row in test}
    free, twice = [], RowReport(source="train.jsonl", read=len(train))
    for row in train:
        key = _key(row.data)
        if key in known:
            twice.drop("its question stands in the test file, or earlier in this one", row.place)
        else:
            free.append(row)
            known.add(key)
    twice.kept = len(free)
    learned, pooled = _share(free, sft_prompts, pool_prompts, randomness)
    demonstrations, sft_report = demonstrations_from_rows(learned, "train.jsonl (SFT)", kind=KIND)
    pool, pool_gold, pool_report = prompts_from_rows(pooled, "train.jsonl (pool)", kind=KIND)
    tests, test_gold, test_report = prompts_from_rows(evaluated, "test.jsonl", answers="required", kind=KIND)
    labelled, label_report = marked_solutions(Path(path).expanduser(), {_key(row.data) for row in [*evaluated, *free]})
    reports = [twice, sft_report, pool_report, test_report, label_report]
    return Gsm8kSplits(demonstrations, pool, pool_gold, tests, test_gold, labelled, reports)


def marked_solutions(folder: Path, taken: set[str]) -> tuple[list[LabelledResponse], RowReport]:
    """Return the solutions by real models of GSM8K's test questions, each marked right or wrong.

    Args:
        folder: holds ``example_model_solutions.jsonl``; without it there are none.
        taken: questions to leave out, as `_key` writes them.
    """
    report = RowReport(source=SOLUTIONS)
    if not (folder / SOLUTIONS).is_file():
        report.drop("the file is not there, so there are no labelled responses", str(folder / SOLUTIONS))
        return [], report
    labelled: list[LabelledResponse] = []
    for row in read_rows(folder / SOLUTIONS):
        report.read += 1
        if _key(row.data) in taken:
            report.drop("its question is among those evaluated or trained on", row.place)
            continue
        solutions = {name: value for name, value in row.data.items() if _is_marked(value)}
        if not solutions:
            report.drop("no marked solution ('solution' and 'is_correct')", row.place)
            continue
        report.kept += 1
        prompt = Prompt(row.place, ({"role": "user", "content": row.data["question"].strip()},), kind=KIND)
        for name, value in solutions.items():
            response = native_chain_of_thought(value["solution"])
            labelled.append(LabelledResponse(prompt, response, value["is_correct"], f"{row.place} {name}"))
    return labelled, report


def read_split(path: str | Path, split: str, mirror: str | None = None) -> list[Row]:
    """Return the rows of ``train`` or ``test``, from a folder, the hub or a mirror of it.

    Raises:
        UserError: the file is missing or malformed.
    """
    folder, name = Path(path).expanduser(), f"{split}.jsonl"
    if not folder.is_dir() and not str(path).startswith((".", "/", "~")) and str(path).count("/") == 1:
        return read_rows(path if ":" in str(path) else f"{path}:{CONFIGURATION}", split, mirror)
    if not (folder / name).is_file():
        raise UserError(
            f"data.path={str(path)!r}: GSM8K's {name} is not there (looked for {(folder / name).absolute()}); "
            "give the folder that holds train.jsonl and test.jsonl"
        )
    return read_rows(folder / name)


def _sample(rows: Sequence[Row], count: int, randomness: random.Random) -> list[Row]:
    """Draw ``count`` rows, in the file's order."""
    chosen = set(randomness.sample(range(len(rows)), min(count, len(rows))))
    return [row for index, row in enumerate(rows) if index in chosen]


def _share(rows: list[Row], sft: int, pool: int, randomness: random.Random) -> tuple[list[Row], list[Row]]:
    wanted = sft or len(rows) - pool
    if not 0 < wanted < len(rows) or (sft == 0 and pool == 0):
        raise UserError(
            f"data.sft_prompts={sft} and data.pool_prompts={pool}: of the {len(rows)} training questions both SFT and "
            "the pool need some; set data.sft_prompts=500, for instance"
        )
    learned = _sample(rows, wanted, randomness)
    places = {row.place for row in learned}
    rest = [row for row in rows if row.place not in places]
    return learned, _sample(rest, pool or len(rest), randomness)


def _is_marked(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("is_correct"), bool)
        and isinstance(value.get("solution"), str)
        and bool(value["solution"].strip())
    )


def _key(data: Mapping[str, Any]) -> str:
    """Return a question without differences of spacing and case, to compare questions across files."""
    question = data.get("question")
    return " ".join(question.lower().split()) if isinstance(question, str) else repr(question)
