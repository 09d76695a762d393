"""Read labels that exist already from files: verdicts and preferences, in the usual shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from trlhf.chats import MalformedRow, chat_from_row
from trlhf.data import LabelledPair, LabelledResponse, Row, read_rows
from trlhf.errors import UserError
from trlhf.rows import spoken
from trlhf.types import Message, Prompt, RowReport

LABEL_SHAPES = (
    "'prompt', 'response' and 'label' (true, 1 or \"right\"; false, 0 or \"wrong\"), or 'prompt', 'chosen' and "
    "'rejected' (with 'tie': true where neither is better); prompts, responses and chosen ones may be lists of messages"
)
RIGHT = {"right", "true", "1", "correct", "yes"}
WRONG = {"wrong", "false", "0", "incorrect", "no"}


@dataclass(frozen=True)
class LabelledSet:
    """Labels from a file.

    Attributes:
        responses: verdicts.
        pairs: preferences.
        report: which rows were used and which were not, and why.
    """

    responses: list[LabelledResponse]
    pairs: list[LabelledPair]
    report: RowReport


@dataclass
class _Prompts:
    """Prompts by their messages: the same question on two rows is one prompt."""

    known: dict[tuple[tuple[str, str], ...], Prompt] = field(default_factory=dict)

    def get(self, messages: Sequence[Message], row: Row, default_task: Literal["exact", "open"]) -> Prompt:
        key = tuple((message["role"], message["content"]) for message in messages)
        if key not in self.known:
            task = row.data.get("task") or default_task
            if task not in ("exact", "open"):
                raise MalformedRow(f"'task' is {task!r}, neither 'exact' nor 'open'")
            kind = str(row.data.get("kind") or "labelled")
            exact = task == "exact"
            self.known[key] = Prompt(row.place, tuple(messages), kind, cast(Literal["exact", "open"], task), exact)
        return self.known[key]


def read_labelled(source: str | Path, mirror: str | None = None) -> LabelledSet:
    """Read verdicts and preferences from a file, a folder or the hub; the two kinds may be mixed.

    A prompt of a verdict counts as one with an exact answer, one of a preference as open, unless the column ``task``
    says otherwise. Equal prompts become one.

    Raises:
        UserError: nothing can be read, or no row is usable; names the first line and the accepted shapes.
    """
    rows = read_rows(source, mirror=mirror)
    report = RowReport(source=str(source), read=len(rows))
    found = LabelledSet([], [], report)
    prompts = _Prompts()
    for row in rows:
        try:
            label = _label(row, prompts)
        except MalformedRow as error:
            report.drop(str(error), row.place)
            continue
        if isinstance(label, LabelledPair):
            found.pairs.append(label)
        else:
            found.responses.append(label)
        report.kept += 1
    if not report.kept:
        reason, places = next(iter(report.dropped.items()))
        raise UserError(
            f"{spoken(places[0])}: {reason}. None of the {len(rows)} rows of {source} is a usable label; "
            f"give each row {LABEL_SHAPES}"
        )
    return found


def _label(row: Row, prompts: _Prompts) -> LabelledResponse | LabelledPair:
    data = row.data
    if data.get("chosen") is not None:
        if data.get("rejected") is None:
            raise MalformedRow("'chosen' without 'rejected'")
        context, first = _last_turn({"prompt": data.get("prompt"), "chosen": data["chosen"]})
        other, second = _last_turn({"prompt": data.get("prompt"), "chosen": data["rejected"]})
        if context != other:
            raise MalformedRow("'chosen' and 'rejected' do not answer the same chat")
        preference = 0.5 if _truth(data.get("tie", False), "tie") else 1.0
        return LabelledPair(prompts.get(context, row, "open"), first, second, preference, row.place)
    response = data.get("response", data.get("completion"))
    if data.get("prompt") is None or response is None:
        missing = "prompt" if data.get("prompt") is None else "response"
        raise MalformedRow(f"missing '{missing}'")
    if data.get("label") is None:
        raise MalformedRow("missing 'label'")
    right = _truth(data["label"], "label")
    context, text = _last_turn({"prompt": data["prompt"], "completion": response})
    return LabelledResponse(prompts.get(context, row, "exact"), text, right, row.place)


def _last_turn(data: Mapping[str, Any]) -> tuple[tuple[Message, ...], str]:
    """Return the chat before the assistant's last turn, and that turn's text."""
    chat = chat_from_row({key: value for key, value in data.items() if value is not None})
    if len(chat) < 2 or chat[-1]["role"] != "assistant":
        raise MalformedRow("no response by the assistant after a prompt")
    return chat[:-1], chat[-1]["content"].strip()


def _truth(value: object, column: str) -> bool:
    """Read a yes or a no."""
    text = str(value).strip().lower()
    if isinstance(value, float) and value in (0.0, 1.0):
        text = str(int(value))
    if text in RIGHT:
        return True
    if text in WRONG:
        return False
    raise MalformedRow(f'\'{column}\' is {value!r}, neither true (1, "right") nor false (0, "wrong")')
