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
    rows: Sequence[Row], source: str, *, kind: str = "demonstration", multi_turn: str = "unrolled"
) -> tuple[list[Demonstration], RowReport]:
    """Turn rows of any shape that ``trlhf.chats.SHAPES`` names into demonstrations.

    A chat of several turns is unrolled: each assistant turn becomes a demonstration of its own, so that the loss covers
    every response, EOS included, while the EOS of earlier turns is left out of the context where the template says so.
    A ``whole`` chat is one demonstration. A user turn that nobody answered, at the end of a chat, teaches nothing and
    is ignored. Worked solutions in GSM8K's notation become native chain of thought. A row's own ``kind`` column is
    kept.

    Raises:
        UserError: no row is usable; names the first one, what it holds and the accepted shapes.
    """
    report = RowReport(source=source, read=len(rows))
    demonstrations: list[Demonstration] = []
    for row in rows:
        try:
            chat = answered_chat(row)
        except MalformedRow as error:
            report.drop(str(error), row.place)
            continue
        report.kept += 1
        demonstrations += demonstrations_of(chat, row, kind, multi_turn)
    if not demonstrations:
        raise no_usable_row(rows, report)
    return demonstrations, report


def answered_chat(row: Row, *, native: bool = True) -> list[Message]:
    """Return the chat of a row up to its last response.

    Args:
        row: of any shape.
        native: turn worked solutions into native chain of thought.

    Raises:
        MalformedRow: no known shape, or no response to learn from.
    """
    chat = [as_native(message) if native else message for message in chat_from_row(row.data)]
    while chat and chat[-1]["role"] != "assistant":
        chat.pop()
    if not chat:
        raise MalformedRow("no response to learn from (no assistant turn, completion, chosen, output or answer)")
    return chat


def demonstrations_of(
    chat: Sequence[Message], row: Row, kind: str = "demonstration", multi_turn: str = "unrolled"
) -> list[Demonstration]:
    """Return the demonstrations in a chat that ends in a response: one for each response, or the ``whole`` of it."""
    kind = str(row.data.get("kind") or kind)
    ends = [index for index, message in enumerate(chat) if message["role"] == "assistant"]
    if multi_turn == "whole" or len(ends) == 1:
        return [Demonstration(messages=tuple(chat), source=row.place, kind=kind)]
    return [
        Demonstration(messages=tuple(chat[: end + 1]), source=f"{row.place} turn {turn}", kind=kind)
        for turn, end in enumerate(ends, start=1)
    ]


def row_of(demonstration: Demonstration) -> str:
    """Return the place of the row that a demonstration came from, which it may share with others."""
    return _TURN_NUMBER.sub("", demonstration.source)


def as_native(message: Message) -> Message:
    """Return a turn with its worked solution, if it is one, as native chain of thought."""
    if message["role"] == "assistant" and is_worked_solution(message["content"]):
        return {"role": "assistant", "content": native_chain_of_thought(message["content"])}
    return message
