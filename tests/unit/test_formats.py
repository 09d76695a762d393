"""Rows of every shape become demonstrations; GSM8K's notation becomes native chain of thought."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trlhf.errors import UserError
from trlhf.rows import Row
from trlhf.sft.chain_of_thought import final_answer, native_chain_of_thought, plan_of
from trlhf.sft.formats import demonstrations_from_rows

USER = {"role": "user", "content": "Q"}
ASSISTANT = {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}


def _rows(*data: dict[str, Any]) -> list[Row]:
    return [Row(f"sft.jsonl:{line}", item) for line, item in enumerate(data, start=1)]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"prompt": "Q", "completion": " A"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"prompt": "Q", "chosen": [USER, ASSISTANT], "rejected": [USER, {"role": "assistant", "content": "B"}]},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"conversations": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]},
        {"instruction": "Q", "input": "", "output": "A"},
        {"instruction": "Q", "output": "A", "input": None},
        {"question": "Q", "answer": "A"},
        {"question": "Q", "answer": "A", "messages": None},
        {"question": "Q", "response": "A", "id": "flan.1", "system_prompt": ""},  # Open-Orca/OpenOrca
        {"query": "Q", "response": "A", "type": "MATH_AnsAug", "original_question": "q"},  # meta-math/MetaMathQA
        {"conversation": [{"input": "Q", "output": "A"}], "source": "Dove"},  # LDJnr/Capybara and its like
        {"conversations": [{"from": "user", "text": "Q"}, {"from": "bot", "text": "A"}]},
        {"conversations": [{"from": "Human", "value": "Q"}, {"from": "ChatGPT", "value": "A"}], "title": "T"},
        {"conversations": [{"human": "Q", "gpt": "A"}]},
        {"conversations": [{"user": "Q", "assistant": "A"}]},
        {"items": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "id": "x"},
        {"dialog": [{"speaker": "user", "message": "Q"}, {"speaker": "model", "message": "A"}]},
        {"conversations": {"from": ["human", "gpt"], "value": ["Q", "A"]}},  # a sequence of objects in parquet
        {"turns": [1, 2], "question": "Q", "answer": "A"},
    ],
)
def test_every_shape_says_the_same(row: dict[str, Any]) -> None:
    (demonstration,), report = demonstrations_from_rows(_rows(row), "sft.jsonl")
    assert demonstration.messages == (USER, ASSISTANT)
    assert demonstration.source == "sft.jsonl:1"
    assert report.kept == 1 and not report.dropped


def test_shapes_may_be_mixed_and_inputs_and_systems_are_kept() -> None:
    demonstrations, _ = demonstrations_from_rows(
        _rows(
            {"instruction": "Sort.", "input": "b a", "output": "a b", "kind": "sorting"},
            {
                "conversations": [
                    {"from": "system", "value": "S"},
                    {"from": "human", "value": "Q"},
                    {"from": "gpt", "value": "A"},
                ]
            },
            {"system": "S", "question": "Q", "answer": 7},
        ),
        "sft.jsonl",
    )
    assert demonstrations[0].messages[0]["content"] == "Sort.\nb a"
    assert [demonstration.kind for demonstration in demonstrations] == ["sorting", "demonstration", "demonstration"]
    assert demonstrations[1].messages == (SYSTEM, USER, ASSISTANT)
    assert demonstrations[2].messages == (SYSTEM, USER, {"role": "assistant", "content": "7"})


def test_each_assistant_turn_is_learned_from() -> None:
    chat = [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"}, USER]
    demonstrations, report = demonstrations_from_rows(_rows({"messages": chat}), "sft.jsonl")
    assert [demonstration.messages for demonstration in demonstrations] == [tuple(chat[:3]), tuple(chat[:5])]
    assert [demonstration.source for demonstration in demonstrations] == ["sft.jsonl:1 turn 1", "sft.jsonl:1 turn 2"]
    assert report.kept == 1


def test_slim_orca_brings_its_system_line_and_its_weights() -> None:
    """https://huggingface.co/datasets/Open-Orca/SlimOrca."""
    turns = [
        {"from": "system", "value": "S", "weight": None},
        {"from": "human", "value": "Q", "weight": 0.0},
        {"from": "gpt", "value": "A", "weight": 1.0},
    ]
    rows = _rows({"conversations": turns}, {"system_prompt": "S", "question": "Q", "response": "A"})
    demonstrations, _ = demonstrations_from_rows(rows, "sft.jsonl")
    assert [demonstration.messages for demonstration in demonstrations] == [(SYSTEM, USER, ASSISTANT)] * 2


def test_a_role_play_becomes_a_chat() -> None:
    """https://huggingface.co/datasets/PygmalionAI/PIPPA: the bot greets first, a side may speak twice."""
    said = [
        (False, "Ahoy, {{user}}!"),
        (True, "Hi."),
        (True, "Who are you?"),
        (False, "I am {{char}}."),
        (False, "Aye."),
    ]
    row = {
        "bot_name": "Ann",
        "bot_description": "{{char}} is a pirate.",
        "bot_greeting": "Ahoy, {{user}}!",
        "categories": ["Pirates"],
        "conversation": [{"is_human": human, "message": message} for human, message in said],
    }
    zipped = {**row, "conversation": {"is_human": [h for h, _ in said], "message": [m for _, m in said]}}
    demonstrations, _ = demonstrations_from_rows(_rows(row, zipped), "pippa.jsonl")
    assert [demonstration.messages for demonstration in demonstrations] == [
        (
            {"role": "system", "content": "Ann's persona: Ann is a pirate.\nAnn: Ahoy, User!"},
            {"role": "user", "content": "Hi.\nWho are you?"},
            {"role": "assistant", "content": "I am Ann.\nAye."},
        )
    ] * 2


@pytest.mark.parametrize("thoughts", [{}, {"rationale": "Wax melts and gives light."}])
def test_a_riddle_becomes_a_chat(thoughts: dict[str, str]) -> None:
    """https://huggingface.co/datasets/INK-USC/riddle_sense; the published rows have no thoughts."""
    choices = {"label": ["A", "B"], "text": ["candle", "hat"]}
    row = {"question": "What shrinks as it works?", "choices": choices, "answerKey": "A", **thoughts}
    listed = {**row, "choices": [{"label": "A", "text": "candle"}, {"label": "B", "text": "hat"}]}
    demonstrations, report = demonstrations_from_rows(_rows(row, listed, {**row, "answerKey": ""}), "riddles.jsonl")
    answer = " ".join([*thoughts.values(), "The answer is (A) candle."])
    assert [[message["content"] for message in demonstration.messages] for demonstration in demonstrations] == [
        ["What shrinks as it works?\n(A) candle\n(B) hat", answer]
    ] * 2
    assert report.kept == 2, "a riddle without its answer teaches nothing"


def test_a_whole_chat_is_one_demonstration() -> None:
    chat = [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"}, USER]
    demonstrations, report = demonstrations_from_rows(_rows({"messages": chat}), "sft.jsonl", multi_turn="whole")
    assert [demonstration.messages for demonstration in demonstrations] == [tuple(chat[:5])]
    assert demonstrations[0].source == "sft.jsonl:1" and report.kept == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "no chat"}, "missing 'messages'"),
        ({"messages": None}, "missing 'messages'"),
        ({"messages": []}, "'messages' is an empty list, not a list of messages"),
        ({"messages": "Q"}, "'messages' is text, not a list of messages"),
        ({"messages": ["Q"]}, r"messages\[0\] is text, not an object with role and content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\] has the role 'tool'"),
        ({"conversations": [{"value": "x"}]}, r"conversations\[0\] has the role None"),
        ({"conversations": [{"human": "Q", "gpt": ""}]}, r"conversations\[0\] is empty"),
        ({"conversation": [{"is_human": True, "message": "Q"}, {"is_human": False, "message": ""}]}, "is empty"),
        ({"conversation": [{"is_human": True, "message": "Q"}, "A"]}, "'conversation' holds something that is no obj"),
        ({"question": "Q", "choices": ["a"], "answerKey": "A"}, "'choices' is a list, not a list of objects"),
        ({"messages": [USER, {"role": "assistant", "content": [1]}]}, r"messages\[1\] is a list, not text"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, r"messages\[1\] is empty"),
        ({"messages": [ASSISTANT]}, "turn 1 is by the assistant where the user's was expected"),
        ({"messages": [USER, USER]}, "turn 2 is by the user"),
        ({"messages": [SYSTEM]}, "no user turn"),
        ({"messages": [USER]}, "no response to learn from"),
        ({"prompt": "Q"}, "no response to learn from"),
        ({"prompt": "Q", "completion": ""}, "completion is empty"),
        ({"prompt": 3, "completion": "A"}, "'prompt' is int, neither text nor a list of messages"),
        ({"question": "Q"}, "no response to learn from"),
        ({"instruction": "Q", "input": [1], "output": "A"}, "'input' is a list, not text"),
    ],
)
def test_malformed_rows_are_listed_with_the_reason(row: dict[str, Any], reason: str) -> None:
    good = {"messages": [USER, ASSISTANT]}
    demonstrations, report = demonstrations_from_rows(_rows(good, row), "sft.jsonl")
    assert len(demonstrations) == 1 and report.read == 2 and report.kept == 1
    ((found, places),) = report.dropped.items()
    assert places == ["sft.jsonl:2"]
    with pytest.raises(UserError, match=reason):
        demonstrations_from_rows(_rows(row), "sft.jsonl")
    assert found in report.describe()


def test_a_file_without_messages_says_what_it_has_and_what_it_needs() -> None:
    with pytest.raises(UserError, match=r"sft\.jsonl line 1: missing 'messages'.*found 'text', 'id'\..*'completion'"):
        demonstrations_from_rows(_rows({"text": "x", "id": 1}, {"text": "y", "id": 2}), "sft.jsonl")


def test_worked_solutions_become_native_chain_of_thought() -> None:
    answer = (
        "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
        "Natalia sold 48+24 = <<48+24=72>>72 clips altogether\n#### 1,072"
    )
    (demonstration,), _ = demonstrations_from_rows(_rows({"question": "Q", "answer": answer}), "train.jsonl")
    assert demonstration.messages[-1]["content"] == (
        "Plan: divide, then add. Natalia sold 48/2 = 24 clips in May. "
        "Natalia sold 48+24 = 72 clips altogether. The answer is 1072."
    )


@pytest.mark.parametrize(
    ("solution", "plan"),
    [
        ("<<16-3-4=9>> <<9*2=18>>", "Plan: subtract, then multiply."),
        ("<<1*2=2>> <<2*2=4>> <<3*2=6>> <<2+4+6=12>>", "Plan: multiply three times, then add."),
        ("<<5/2=2.5>> <<4/2=2>> <<-1+2.5=1.5>>", "Plan: divide twice, then add."),
        ("<<100*20*.01=20>>", "Plan: multiply."),
        ("<<(3+4)*2=14>>", "Plan: add and multiply."),
        ("349 - 108 = 241 and 241 - 153 = 88", "Plan: subtract twice."),
        ("Let x be the price. We get 2x = 4.", "Plan: set up an equation, then solve it."),
        ("Half of it.\nHalf again.", "Plan: work it out in two steps."),
        ("It is three.", "Plan: work it out in one step."),
    ],
)
def test_a_plan_says_what_the_solution_does(solution: str, plan: str) -> None:
    assert plan_of(solution) == plan


def test_sampled_solutions_may_break_off() -> None:
    text = native_chain_of_thought("He runs 3/440 = <<3/440=0.0068181818")
    assert text == "Plan: divide. He runs 3/440 =."
    assert final_answer("so 9\nA: -1,234 dollars") == "-1234 dollars"
    assert final_answer("A: 5\nmore") is None


def test_every_real_solution_converts_and_keeps_its_answer(shared_data: Callable[[str], Path]) -> None:
    lines = shared_data("gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 7473
    for line in lines:
        answer = json.loads(line)["answer"]
        text = native_chain_of_thought(answer)
        gold = answer.rsplit("####", 1)[1].strip().replace(",", "")
        assert text.startswith("Plan: ") and text.endswith(f" The answer is {gold}.")
        assert not any(mark in text for mark in ("<<", ">>", "####", "\n"))
        assert not any(character.isdigit() for character in text.split(". ")[0]), "a plan gives no result away"
