"""A few made-up rows of each data set that a suite asks, in its own columns, configurations and splits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trlhf.contamination.published import data_sets

Rows = list[dict[str, Any]]
SHOTS = 30  # rows of a split that worked examples come from; ARC wants 25


def _choices(number: int) -> dict[str, Any]:
    return {"text": [str(number + i) for i in range(4)], "label": list("ABCD")}


def _arc(i: int) -> dict[str, Any]:
    return {"id": str(i), "question": f"What is {i} plus 1?", "choices": _choices(i), "answerKey": "B"}


def _hellaswag(i: int) -> dict[str, Any]:
    said = {"ctx_a": f"A man counts to {i}.", "ctx_b": "then he", "ctx": f"A man counts to {i}. then he"}
    return {
        "ind": i,
        "activity_label": "Counting",
        **said,
        "endings": ["stops.", "runs.", "sings.", "eats."],
        "label": "0",
    }


def _mmlu(i: int) -> dict[str, Any]:
    return {"question": f"What is {i} plus 2?", "subject": "any", "choices": _choices(i)["text"], "answer": 2}


def _truthful(i: int) -> dict[str, Any]:
    answers = {"choices": ["It is.", "It is not.", "Nobody knows."], "labels": [1, 0, 0]}
    return {"question": f"Is {i} a number?", "mc1_targets": answers, "mc2_targets": answers}


def _winogrande(i: int) -> dict[str, Any]:
    text = f"Ann gave Bob {i} plums since _ was hungry."
    return {"sentence": text, "option1": "Ann", "option2": "Bob", "answer": "2"}


def _gsm8k(i: int) -> dict[str, Any]:
    return {"question": f"Add {i} and 1. What is it?", "answer": f"{i}+1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"}


def _boolq(i: int) -> dict[str, Any]:
    return {"question": f"is {i} even", "passage": f"The number {i} is what it is.", "idx": i, "label": i % 2}


def _openbook(i: int) -> dict[str, Any]:
    return {"id": str(i), "question_stem": f"{i} plus 1 is", "choices": _choices(i), "answerKey": "B"}


def _piqa(i: int) -> dict[str, Any]:
    return {"goal": f"Count to {i}.", "sol1": "Use your fingers.", "sol2": "Use a river.", "label": 0}


def _agieval(i: int) -> dict[str, Any]:
    choices = [f"({letter}){i + place}" for place, letter in enumerate("ABCD")]
    query = f"Q: What is {i} plus 1? Answer Choices: {' '.join(choices)}\nA: Among A through D, the answer is"
    return {"query": query, "choices": choices, "gold": [1]}


def _bbh(i: int) -> dict[str, Any]:
    return {"input": f"not ( {i} is 0 ) is", "target": "True"}


def _math(i: int) -> dict[str, Any]:
    return {"problem": f"Add ${i}$ and $1$.", "level": "Level 1", "type": "x", "solution": f"$\\boxed{{{i + 1}}}$"}


def _turns(i: int) -> dict[str, Any]:
    return {"prompt_id": i, "category": "math", "prompt": [f"What is {i} plus 1?", "And plus 2?"], "reference": []}


# Data set → its row, and the splits that it has.
SETS: dict[str, tuple[Any, Sequence[str]]] = {
    "allenai/ai2_arc": (_arc, ("train", "validation", "test")),
    "Rowan/hellaswag": (_hellaswag, ("train", "validation")),
    "cais/mmlu": (_mmlu, ("dev", "test")),
    "truthfulqa/truthful_qa": (_truthful, ("validation",)),
    "allenai/winogrande": (_winogrande, ("train", "validation")),
    "openai/gsm8k": (_gsm8k, ("train", "test")),
    "aps/super_glue": (_boolq, ("train", "validation")),
    "allenai/openbookqa": (_openbook, ("train", "validation", "test")),
    "baber/piqa": (_piqa, ("train", "validation")),
    "SaylorTwift/bbh": (_bbh, ("test",)),
    "EleutherAI/hendrycks_math": (_math, ("test",)),
    "HuggingFaceH4/mt_bench_prompts": (_turns, ("train",)),
    **{name: (_agieval, ("test",)) for name in data_sets("agieval")},
}


def write_suites(root: Path) -> None:
    """Make a mirror of every data set that a suite asks: all configurations of one have the same rows."""
    from trlhf.evaluation.suites import SUITES

    suites = ("open-llm-v1", "gpt4all", "truthfulqa", "bbh", "reasoning")
    named = [source.partition(":") for suite in suites for source in data_sets(suite)]
    mmlu = next(task for task in SUITES["open-llm-v1"].tasks if task.name == "mmlu")
    subjects = ["all", *(member.removeprefix("mmlu_") for member in mmlu.members)]
    for name, (row, splits) in SETS.items():
        if (root / name / "README.md").exists():
            continue  # a recipe reads it as well
        found = dict.fromkeys(configuration or "default" for one, _, configuration in named if one == name)
        configurations = subjects if name == "cais/mmlu" else list(found) or ["default"]
        files = []
        for split in splits:
            count = SHOTS if split in ("train", "dev") else 2
            path = root / name / "suite" / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row(100 + i)) + "\n" for i in range(count)))
            files.append(f"  - split: {split}\n    path: suite/{split}.jsonl\n")
        heads = [f"- config_name: {one}\n  data_files:\n{''.join(files)}" for one in configurations]
        (root / name / "README.md").write_text(f"---\nconfigs:\n{''.join(heads)}---\n")
