"""Rows of a data set become demonstrations, one for each assistant turn."""

from __future__ import annotations

import re
from collections.abc import Sequence

from trlhf.chats import MalformedRow, chat_from_row
from trlhf.data import no_usable_row
from trlhf.rows import Row
from trlhf.sft.chain_of_thought import is_worked_solution, native_chain_of_thought
from trlhf.types import Demonstration, Message, RowReport

_TURN_NUMBER = re.compile(r" turn \d+$")  # after a row's place, where the row has several responses


def demonstrations_from_rows(
    rows: Sequence[Row], source: str, *, kind: str = "demonstration"
) -> tuple[list[Demonstration], RowReport]:
    """Turn rows of any shape that ``trlhf.chats.SHAPES`` names into demonstrations.

    A chat of several turns is unrolled: each assistant turn becomes a demonstration of its own, so that the loss covers
    every response, EOS included, while the EOS of earlier turns is left out of the context. A user turn that nobody
    answered, at the end of a chat, teaches nothing and is ignored. Worked solutions in GSM8K's notation become native
    chain of thought. A row's own ``kind`` column is kept.

    Raises:
        UserError: no row is usable; names the first one, what it holds and the accepted shapes.
    """
    report = RowReport(source=source, read=len(rows))
    demonstrations: list[Demonstration] = []
    for row in rows:
        try:
            unrolled = _unroll(row, kind)
        except MalformedRow as error:
            report.drop(str(error), row.place)
            continue
        report.kept += 1
        demonstrations += unrolled
    if not demonstrations:
        raise no_usable_row(rows, report)
    return demonstrations, report


def _unroll(row: Row, kind: str) -> list[Demonstration]:
    chat = [native(message) for message in chat_from_row(row.data)]
    ends = [index for index, message in enumerate(chat) if message["role"] == "assistant"]
    if not ends:
        raise MalformedRow("no response to learn from (no assistant turn, completion, chosen, output or answer)")
    return [
        Demonstration(
            messages=tuple(chat[: end + 1]),
            source=row.place if len(ends) == 1 else f"{row.place} turn {turn}",
            kind=str(row.data.get("kind") or kind),
        )
        for turn, end in enumerate(ends, start=1)
    ]


def row_of(demonstration: Demonstration) -> str:
    """Return the place of the row that a demonstration came from, which it may share with others."""
    return _TURN_NUMBER.sub("", demonstration.source)


def native(message: Message) -> Message:
    """Return a turn with its worked solution, if it is one, as native chain of thought."""
    if message["role"] == "assistant" and is_worked_solution(message["content"]):
        return {"role": "assistant", "content": native_chain_of_thought(message["content"])}
    return message
