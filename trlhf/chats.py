"""One row of a data set, in any of the usual shapes, becomes one chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from trlhf.rarer_rows import is_roleplay, multiple_choice_turns, roleplay_turns, unzipped
from trlhf.types import Message

Role = Literal["system", "user", "assistant"]

SHAPES = (
    "'messages' (a list of role and content), 'prompt' and 'completion', 'prompt' and 'chosen', "
    "'conversations' (ShareGPT: from and value), 'instruction', 'input' and 'output' (Alpaca), 'question' and 'answer'"
)
COLUMNS = ("messages", "conversations", "conversation", "items", "dialogue", "dialog", "turns")  # that hold turns
_ROLES: dict[str, Role] = {
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai", "bing", "bard"), "assistant"),
}
_SPEAKERS = ("role", "from", "speaker", "author")  # who speaks in a turn …
_TEXTS = ("content", "value", "text", "message")  # … and what
_PAIRS = (("input", "output"), ("human", "gpt"), ("user", "assistant"), ("human", "assistant"), ("user", "bot"))


class MalformedRow(ValueError):
    """A row that holds no usable chat; the message says what is wrong with it, and becomes a reason in a RowReport."""


def chat_from_row(data: Mapping[str, Any]) -> tuple[Message, ...]:
    """Return the chat that a row holds, response included where the row has one.

    The shape is read off the row's own columns, so a data set may mix shapes; a column that is None counts as absent.
    ``rejected`` is not read: it is not to be imitated.

    Raises:
        MalformedRow: no known shape, a turn without text, or turns in an impossible order.
    """
    row = {key: unzipped(value) if key in COLUMNS else value for key, value in data.items() if value is not None}
    column = next((name for name in COLUMNS if name in row), None)
    if column in COLUMNS[:2]:
        messages = _turns(row[column], column)
    elif "chosen" in row:
        messages = _join(row.get("prompt", []), "chosen", row["chosen"])
    elif "prompt" in row:
        messages = _join(row["prompt"], "completion", row.get("completion", []))
    elif "instruction" in row:
        messages = _alpaca(row)
    elif "question" in row and "choices" in row and "answerKey" in row:
        messages = _multiple_choice(row)
    elif "question" in row or ("query" in row and "response" in row):
        asked = "question" if "question" in row else "query"
        messages = [_message("user", row[asked], asked)]
        answer = next((name for name in ("answer", "response") if name in row), None)
        if answer is not None:
            text = str(row[answer]) if isinstance(row[answer], int | float) else row[answer]
            messages.append(_message("assistant", text, answer))
    elif column is not None:  # names that other shapes use too, for something else
        messages = _roleplay(row, column) if is_roleplay(row[column]) else _turns(row[column], column)
    else:
        raise MalformedRow("missing 'messages' (or another known shape)")
    for name in ("system", "system_prompt"):
        if isinstance(row.get(name), str) and row[name].strip() and messages[0]["role"] != "system":
            messages.insert(0, _message("system", row[name], name))
    _check_order(messages)
    return tuple(messages)


def context_of(chat: Sequence[Message]) -> tuple[Message, ...]:
    """Return a chat up to its last user turn: the part that waits for a response."""
    last = max(index for index, message in enumerate(chat) if message["role"] == "user")
    return tuple(chat[: last + 1])


def _join(prompt: Any, column: str, response: Any) -> list[Message]:
    before = [_message("user", prompt, "prompt")] if isinstance(prompt, str) else _optional_turns(prompt, "prompt")
    if isinstance(response, str):
        return [*before, _message("assistant", response, column)]
    after = _optional_turns(response, column)
    if after and after[0]["role"] != "assistant":  # the column repeats the whole chat, prompt included
        return after
    return before + after


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    instruction, extra = row["instruction"], row.get("input", "")
    if not isinstance(extra, str):
        raise MalformedRow(f"'input' is {_kind(extra)}, not text")
    if isinstance(instruction, str) and extra.strip():
        instruction = f"{instruction.strip()}\n{extra.strip()}"
    messages = [_message("user", instruction, "instruction")]
    if "output" in row:
        messages.append(_message("assistant", row["output"], "output"))
    return messages


def _optional_turns(value: Any, column: str) -> list[Message]:
    return _turns(value, column) if isinstance(value, list | tuple) and len(value) else _empty(value, column)


def _empty(value: Any, column: str) -> list[Message]:
    if isinstance(value, list | tuple):
        return []
    raise MalformedRow(f"{column!r} is {_kind(value)}, neither text nor a list of messages")


def _roleplay(row: Mapping[str, Any], column: str) -> list[Message]:
    if not all(isinstance(turn, Mapping) for turn in row[column]):
        raise MalformedRow(f"{column!r} holds something that is no object with message and is_human")
    return [_message(role, text, f"a turn of {column!r}") for role, text in roleplay_turns(row, row[column])]


def _multiple_choice(row: Mapping[str, Any]) -> list[Message]:
    choices = unzipped(row["choices"])
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, Mapping) for choice in choices):
        raise MalformedRow(f"'choices' is {_kind(choices)}, not a list of objects with label and text")
    return [_message(role, text, "question") for role, text in multiple_choice_turns(row)]


def _turns(value: Any, column: str) -> list[Message]:
    if not isinstance(value, list | tuple) or not value:
        raise MalformedRow(f"{column!r} is {_kind(value)}, not a list of messages")
    return [message for index, turn in enumerate(value) for message in _turn(turn, f"{column}[{index}]")]


def _turn(turn: Any, place: str) -> list[Message]:
    """Return the message of a turn, or the two of a turn that holds a question with its answer."""
    if not isinstance(turn, Mapping):
        raise MalformedRow(f"{place} is {_kind(turn)}, not an object with role and content")
    for asked, answered in _PAIRS:
        if asked in turn and answered in turn:
            return [_message("user", turn[asked], place), _message("assistant", turn[answered], place)]
    role = next((turn[key] for key in _SPEAKERS if turn.get(key) is not None), None)
    known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise MalformedRow(f"{place} has the role {role!r}, which is none of {', '.join(_ROLES)}")
    return [_message(known, next((turn[key] for key in _TEXTS if turn.get(key) is not None), None), place)]


def _message(role: Role, content: Any, place: str) -> Message:
    if not isinstance(content, str):
        raise MalformedRow(f"{place} is {_kind(content)}, not text")
    if not content.strip():
        raise MalformedRow(f"{place} is empty")
    return {"role": role, "content": content.strip()}


def _check_order(messages: Sequence[Message]) -> None:
    turns = [message["role"] for message in messages]
    if turns and turns[0] == "system":
        turns = turns[1:]
    if not turns:
        raise MalformedRow("no user turn")
    for index, role in enumerate(turns):
        expected = "assistant" if index % 2 else "user"
        if role != expected:
            raise MalformedRow(f"turn {index + 1} is by the {role} where the {expected}'s was expected")


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, list | tuple) and not value:
        return "an empty list"
    return {str: "text", dict: "an object", list: "a list", bool: "true/false"}.get(type(value), type(value).__name__)
