"""What the stages read: prompts with their gold answers kept apart, and labelled responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from trlhf.chats import SHAPES, MalformedRow, chat_from_row, context_of
from trlhf.errors import UserError
from trlhf.rows import Row, read_rows, spoken
from trlhf.types import Prompt, RowReport

__all__ = [
    "GOLD_COLUMNS",
    "LabelledPair",
    "LabelledResponse",
    "Row",
    "final_answer_of",
    "no_usable_row",
    "prompts_from_rows",
    "read_rows",
]

GOLD_COLUMNS = ("answer", "gold", "final_answer", "target")


@dataclass(frozen=True)
class LabelledResponse:
    """A response whose final answer somebody has marked.

    Attributes:
        prompt: the chat it answers.
        response: its text, without EOS.
        right: whether its final answer is right.
        source: where it came from (``file:line``).
    """

    prompt: Prompt
    response: str
    right: bool
    source: str = ""


@dataclass(frozen=True)
class LabelledPair:
    """Two responses to one prompt that somebody has compared.

    Attributes:
        prompt: the chat that both answer.
        first: the first response.
        second: the second response.
        preference: probability that the first is the better one: 1, 0.5 (a tie) or 0.
        source: where it came from (``file:line``).
    """

    prompt: Prompt
    first: str
    second: str
    preference: float
    source: str = ""


def prompts_from_rows(
    rows: Sequence[Row], source: str, *, answers: Literal["required", "optional"] = "optional", kind: str = "prompt"
) -> tuple[list[Prompt], dict[str, str], RowReport]:
    """Turn rows into prompts and, apart from them, their gold answers by prompt id.

    A prompt is the chat up to its last user turn. The gold answer is the column ``answer`` (or ``gold``,
    ``final_answer``, ``target``), after ``####`` where it has that mark. The columns ``kind``, ``task`` and
    ``reasoning`` fill the fields of those names.

    Args:
        rows: the rows.
        source: name of the data set, for the report.
        answers: ``required`` in a test set: an exact-answer prompt without an answer is an error; ``optional`` in a
            pool: it is used as a prompt without gold.
        kind: kind of the prompts whose row names none.

    Raises:
        UserError: no row holds a prompt, or an answer that is required is missing.
    """
    report = RowReport(source=source, read=len(rows))
    prompts: list[Prompt] = []
    gold: dict[str, str] = {}
    for row in rows:
        if row.data.get("options"):
            report.drop("multiple choice ('options'), which is not read yet", row.place)
            continue
        try:
            prompt = _prompt(row, kind)
        except MalformedRow as error:
            report.drop(str(error), row.place)
            continue
        answer = _gold(row.data)
        if answer is not None:
            gold[prompt.id] = answer
        elif answers == "required" and prompt.task == "exact":
            raise UserError(
                f"{spoken(row.place)}: no answer, so the response to it could not be marked; give it a column "
                f"{', '.join(map(repr, GOLD_COLUMNS))}, or set its 'task' to 'open'"
            )
        prompts.append(prompt)
    report.kept = len(prompts)
    if not prompts:
        raise no_usable_row(rows, report)
    return prompts, gold, report


def no_usable_row(rows: Sequence[Row], report: RowReport) -> UserError:
    """Return the error for a data set in which every row is malformed: the first place, what it has, what it should."""
    reason, places = next(iter(report.dropped.items()))
    first = next(row for row in rows if row.place == places[0])
    columns = ", ".join(map(repr, first.data)) or "no columns"
    return UserError(
        f"{spoken(first.place)}: {reason}; found {columns}. None of the {report.read} rows of {report.source} is "
        f"usable; give each row {SHAPES}"
    )


def final_answer_of(text: str) -> str:
    """Return what follows the last ``####`` of a worked solution, thousands commas removed; else the text itself."""
    return text.rpartition("####")[2].strip().replace(",", "") if "####" in text else text.strip()


def _prompt(row: Row, kind: str) -> Prompt:
    data = {key: value for key, value in row.data.items() if key != "answer" or "question" not in row.data}
    task = data.get("task") or "exact"
    if task not in ("exact", "open"):
        raise MalformedRow(f"'task' is {task!r}, neither 'exact' nor 'open'")
    reasoning = data.get("reasoning")
    if isinstance(reasoning, str):  # from a csv file
        reasoning = reasoning.strip().lower() in ("true", "1", "yes")
    return Prompt(
        id=row.place,
        messages=context_of(chat_from_row(data)),
        kind=str(data.get("kind") or kind),
        task=cast(Literal["exact", "open"], task),
        reasoning=task == "exact" if reasoning is None else bool(reasoning),
    )


def _gold(data: dict[str, Any]) -> str | None:
    for column in GOLD_COLUMNS:
        value = data.get(column)
        if value is not None and not isinstance(value, list | dict) and str(value).strip():
            return final_answer_of(str(value)) or None
    return None
