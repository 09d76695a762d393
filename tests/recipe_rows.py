"""A few made-up rows of each data set that a recipe names, in its own files and columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def shared_chats() -> list[dict[str, Any]]:
    """CollectiveCognition: ShareGPT."""
    return [
        {
            "title": f"Chat {i}",
            "conversations": [
                {"from": "human", "value": f"Tell me about the number {i}."},
                {"from": "gpt", "value": f"The number {i} comes before {i + 1}."},
                {"from": "human", "value": "Is it even?"},
                {"from": "gpt", "value": "Yes." if i % 2 == 0 else "No."},
            ],
        }
        for i in range(12)
    ]


def slim_orca() -> list[dict[str, Any]]:
    """SlimOrca: ShareGPT with a system line and weights."""
    return [
        {
            "conversations": [
                {"from": "system", "value": "You are an AI assistant. Think step by step.", "weight": None},
                {"from": "human", "value": f"What is {i} plus {i}?", "weight": 0.0},
                {"from": "gpt", "value": f"{2 * i}.", "weight": 1.0},
            ]
        }
        for i in range(8)
    ]


def amplified(source: str, turns: int) -> list[dict[str, Any]]:
    """The LDJnr sets: pairs of input and output."""
    pairs = [{"input": f"{source} question {i}?", "output": f"A thoughtful answer, number {i}."} for i in range(turns)]
    return [{"source": source, "conversation": pairs[: 1 + row % turns]} for row in range(4)]


def role_plays() -> list[dict[str, Any]]:
    """PIPPA: who is human, and the bot first."""
    said = [(False, "Ahoy, {{user}}!"), (True, "Hello."), (True, "Who are you?"), (False, "I am {{char}}, a pirate.")]
    turns = [{"message": message, "is_human": human} for human, message in said]
    bot = {"bot_id": "x", "bot_name": "Ann", "bot_description": "A pirate.", "bot_definitions": "", "categories": None}
    return [{**bot, "bot_greeting": said[0][1], "conversation": turns[: 2 + 2 * (row > 0)]} for row in range(4)]


def mathematics() -> list[dict[str, Any]]:
    """MetaMathQA: query and response."""
    answer = "She has 4 x {i} = {n} pens.\n#### {n}\nThe answer is: {n}"
    return [
        {
            "type": "GSM_Rephrased",
            "query": f"Ann has 4 boxes of {i} pens. How many pens?",
            "original_question": f"Ann has 4 boxes of {i} pens. How many pens has she?",
            "response": answer.format(i=i, n=4 * i),
        }
        for i in range(8)
    ]


def riddles() -> list[dict[str, Any]]:
    """RiddleSense: choices with their labels."""
    choices = {"label": ["A", "B", "C", "D", "E"], "text": ["candle", "hat", "river", "clock", "shoe"]}
    return [{"answerKey": "A", "question": f"What shrinks as it works ({i})?", "choices": choices} for i in range(2)]


def open_orca() -> list[dict[str, Any]]:
    """OpenOrca: system_prompt, question, response."""
    rows = [
        {"id": f"flan.{i}", "system_prompt": "", "question": f"What is {i} plus 1?", "response": f"It is {i + 1}."}
        for i in range(8)
    ]
    refusal = "I'm sorry, but as an AI language model I cannot."
    return [*rows, {"id": "niv.9", "system_prompt": "Help.", "question": "Who are you?", "response": refusal}]


def problems(count: int) -> list[dict[str, Any]]:
    """GSM8K."""
    answer = "{a}+{b} = <<{a}+{b}={c}>>{c}\n#### {c}"
    return [
        {"question": f"Add {i} and {i % 7}. What is it?", "answer": answer.format(a=i, b=i % 7, c=i + i % 7)}
        for i in range(count)
    ]


def write_recipes(root: Path) -> None:
    """Make a mirror of every data set that a recipe names, under its name."""
    import pyarrow
    import pyarrow.parquet

    def write(name: str, file: str, rows: Sequence[dict[str, Any]]) -> Path:
        path = root / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    write("CollectiveCognition/chats-data-2023-09-27", "train.jsonl", shared_chats())
    write("Open-Orca/SlimOrca", "oo-labeled_correct.gpt4.sharegpt.jsonl", slim_orca())
    write("Open-Orca/OpenOrca", "1M-GPT4-Augmented.parquet", open_orca())
    write("PygmalionAI/PIPPA", "pippa_deduped.jsonl", role_plays())
    write("meta-math/MetaMathQA", "MetaMathQA-395K.jsonl", mathematics())
    write("INK-USC/riddle_sense", "data/train-00000-of-00001.parquet", riddles())
    for name in ("Capybara", "LessWrong-Amplify-Instruct", "Pure-Dove", "Verified-Camel"):
        write(f"LDJnr/{name}", f"{name}.jsonl", amplified(name, 1 if name == "Verified-Camel" else 3))
    for split, count in (("train", 24), ("test", 4)):
        write("openai/gsm8k", f"main/{split}-00000-of-00001.parquet", problems(count))
    files = [f"  - split: {split}\n    path: main/{split}-*" for split in ("train", "test")]
    header = "\n".join(["---", "configs:", "- config_name: main", "  data_files:", *files, "---", ""])
    (root / "openai/gsm8k/README.md").write_text(header)
