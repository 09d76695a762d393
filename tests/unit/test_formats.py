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


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "no chat"}, "missing 'messages'"),
        ({"messages": None}, "missing 'messages'"),
        ({"messages": []}, "'messages' is an empty list, not a list of messages"),
        ({"messages": "Q"}, "'messages' is text, not a list of messages"),
        ({"messages": ["Q"]}, r"messages\[0\] is text, not an object with role and content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\] has the role 'tool'"),
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
