"""Rows of two published data sets whose shape is nobody else's: role play (PIPPA) and riddles (RiddleSense)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

Turn = tuple[Literal["system", "user", "assistant"], Any]
REASONS = ("chain_of_thought", "rationale", "explanation")  # columns that hold the thoughts before an answer


def unzipped(value: Any) -> Any:
    """Return lists under common names as a list of objects: how `datasets` stores a sequence of objects."""
    if not isinstance(value, Mapping) or not all(isinstance(part, list | tuple) for part in value.values()):
        return value
    if len({len(part) for part in value.values()}) != 1:
        return value
    return [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)]


def is_roleplay(turns: Any) -> bool:
    """Say whether turns are those of PIPPA (https://huggingface.co/datasets/PygmalionAI/PIPPA)."""
    return isinstance(turns, list | tuple) and any(isinstance(turn, Mapping) and "is_human" in turn for turn in turns)


def roleplay_turns(row: Mapping[str, Any], turns: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Return a role play as a chat: who the bot is and what it says first become the system line.

    What one side says in several messages is one turn; ``{{char}}`` and ``{{user}}`` get their names.
    """
    name = str(row.get("bot_name") or "Bot")

    def named(text: Any) -> str:
        return str(text or "").strip().replace("{{char}}", name).replace("{{user}}", "User")

    sides = groupby(turns, key=lambda turn: bool(turn.get("is_human")))
    said = [(human, "\n".join(named(turn.get("message")) for turn in run).strip()) for human, run in sides]
    description = named(row.get("bot_description"))
    system = [f"{name}'s persona: {description}"] if description else []
    if said and not said[0][0]:
        system.append(f"{name}: {said.pop(0)[1]}")
    chat: list[Turn] = [("system", "\n".join(system))] if system else []
    return chat + [("user" if human else "assistant", text) for human, text in said]


def multiple_choice_turns(row: Mapping[str, Any]) -> list[Turn]:
    """Return a question with its choices, and the answer behind its thoughts where the row has some.

    As in RiddleSense (https://huggingface.co/datasets/INK-USC/riddle_sense): ``choices`` with ``label`` and ``text``,
    and ``answerKey``, which is empty in its test split.
    """
    choices = {str(choice.get("label")): str(choice.get("text")) for choice in unzipped(row["choices"])}
    options = "\n".join(f"({label}) {text}" for label, text in choices.items())
    chat: list[Turn] = [("user", f"{str(row['question']).strip()}\n{options}")]
    right = str(row["answerKey"])
    if right in choices:
        thoughts = next((str(row[name]).strip() for name in REASONS if row.get(name)), "")
        chat.append(("assistant", f"{thoughts} The answer is ({right}) {choices[right]}.".strip()))
    return chat
