"""What is compared with what: the user's turns with the question of a test item, whole exchanges with whole items."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from trlhf.chats import MalformedRow, chat_from_row, context_of
from trlhf.contamination.published import question_and_answer
from trlhf.errors import UserError
from trlhf.rows import Row
from trlhf.sft.formats import as_native, row_of
from trlhf.tasks import Task
from trlhf.types import Message, RowReport

Part = Literal["sft", "pool", "labels"]
Turn = tuple[str, str]  # role, normalised text
PARTS: tuple[Part, ...] = ("sft", "pool", "labels")


@dataclass(frozen=True)
class TrainingRow:
    """One row of the training data, normalised; system lines are left out.

    Attributes:
        part: what it is for.
        place: where it stands (``train.jsonl:7``).
        questions: each turn of the user.
        wholes: each turn of the user together with its response, and the whole chat where it has several.
        document: everything that is said in it, for the n-grams.
    """

    part: Part
    place: str
    questions: tuple[str, ...]
    wholes: tuple[str, ...]
    document: str


@dataclass(frozen=True)
class EvaluationItem:
    """One item of an evaluation set, normalised.

    Attributes:
        source: name of the set.
        place: where it stands in it.
        question: the last turn of the user, with passage and options where there are some.
        answer: its worked solution or reference response; empty where there is none.
        whole: everything, the answer included; empty where that is the question alone.
    """

    source: str
    place: str
    question: str
    answer: str
    whole: str


def normalise(text: str) -> str:
    """Return a text in Unicode's compatible form (NFKC), lower case, every run of white space one blank."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def training_rows(task: Task) -> list[TrainingRow]:
    """Return every row that a run learns from: demonstrations, the pool, and labels that come with the data."""
    chats: dict[tuple[Part, str], list[Sequence[Message]]] = {}
    for demonstration in task.demonstrations:  # of a row with several responses the last one holds all of its turns
        chats["sft", row_of(demonstration)] = [demonstration.messages]
    for prompt in task.pool:
        chats["pool", prompt.id] = [prompt.messages]
    for label in task.labelled:
        chats["labels", label.source] = [_answered(label.prompt.messages, label.response)]
    for pair in task.pairs:
        chats["labels", pair.source] = [
            _answered(pair.prompt.messages, response) for response in (pair.first, pair.second)
        ]
    return [_training_row(part, place, [_turns(chat) for chat in found]) for (part, place), found in chats.items()]


def evaluation_items(rows: Sequence[Row], source: str) -> tuple[list[EvaluationItem], RowReport]:
    """Turn the rows of an evaluation set into items; multiple choice is read too.

    Raises:
        UserError: no row holds a question.
    """
    report = RowReport(source=source, read=len(rows))
    items: list[EvaluationItem] = []
    for row in rows:
        try:
            chat = chat_from_row(question_and_answer(row.data))
        except MalformedRow as error:
            report.drop(str(error), row.place)
            continue
        items.append(item_of(chat, source, row.place))
    report.kept = len(items)
    if not items:
        reason, places = next(iter(report.dropped.items()))
        raise UserError(f"check.against: {source} has no row with a question ({places[0]}: {reason})")
    return items, report


def item_of(chat: Sequence[Message], source: str, place: str) -> EvaluationItem:
    """Return an evaluation item from a chat, with its response or without."""
    turns = _turns(chat)
    asked = len(_turns(context_of(chat)))
    answer = turns[asked][1] if len(turns) > asked else ""
    return EvaluationItem(source, place, turns[asked - 1][1], answer, _joined(turns) if len(turns) > 1 else "")


def _training_row(part: Part, place: str, chats: Iterable[Sequence[Turn]]) -> TrainingRow:
    questions, wholes, document = dict[str, None](), dict[str, None](), dict[str, None]()
    for turns in chats:
        questions.update((text, None) for role, text in turns if role == "user")
        wholes.update((whole, None) for whole in _wholes(turns))
        document.update((text, None) for _, text in turns)
    return TrainingRow(part, place, tuple(questions), tuple(wholes), "\n".join(document))


def _wholes(turns: Sequence[Turn]) -> Iterator[str]:
    exchanges = [turns[i : i + 2] for i in range(0, len(turns) - 1, 2)]
    yield from map(_joined, exchanges)
    if len(turns) > 2:
        yield _joined(turns)


def _turns(chat: Sequence[Message]) -> list[Turn]:
    """Return the turns, normalised, worked solutions in the form in which they are trained on; no system line."""
    turns = [as_native(message) for message in chat if message["role"] != "system"]
    return [(turn["role"], normalise(turn["content"])) for turn in turns]


def _joined(turns: Iterable[Turn]) -> str:
    return " ".join(text for _, text in turns)


def _answered(context: Sequence[Message], response: str) -> list[Message]:
    return [*context, {"role": "assistant", "content": response}]
