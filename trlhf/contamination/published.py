"""Published evaluation sets: which data lie behind a suite, the split that is asked, and rows of their shapes.

No torch, no lm-eval and no `datasets` here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trlhf.evaluation.suites import SUITES, SuiteTask

HUMANEVAL = "openai/openai_humaneval"
# Where a task of lm-eval does not say by its data set's name which configuration it reads.
CONFIGURATIONS = {
    "arc_challenge": "ARC-Challenge",
    "arc_easy": "ARC-Easy",
    "boolq": "boolq",
    "gsm8k": "main",
    "mmlu": "all",
    "openbookqa": "main",
    "truthfulqa_mc1": "multiple_choice",
    "truthfulqa_mc2": "multiple_choice",
    "winogrande": "winogrande_xl",
}
# The splits with answers, where those are not the test split's: what lm-eval asks.
SPLITS = {
    **dict.fromkeys(("truthfulqa/truthful_qa", "Rowan/hellaswag", "baber/piqa", "allenai/winogrande"), "validation"),
    "aps/super_glue": "validation",
}
KNOWN = (*(name for name, suite in SUITES.items() if suite.engine != "judge" and name != "file"), "humaneval")


def data_sets(name: str) -> list[str]:
    """Return the hub names of a suite's data (or of ``humaneval``'s), each once; [] of what is no suite."""
    if name not in KNOWN:
        return []
    if name == "humaneval":
        return [HUMANEVAL]
    return list(dict.fromkeys(source for task in SUITES[name].tasks for source in _sources(task)))


def split_of(source: str) -> str:
    """Return the split of a hub data set that is asked: ``test``, or ``validation`` where that has no answers."""
    return SPLITS.get(source.partition(":")[0], "test")


def _sources(task: SuiteTask) -> Iterator[str]:
    if task.name == "bbh":
        yield from (f"{task.data}:{member.removeprefix('bbh_cot_fewshot_')}" for member in task.members)
    elif task.configurations:
        yield from (f"{task.data}:{configuration}" for configuration in task.configurations)
    else:
        configuration = CONFIGURATIONS.get(task.name)
        yield f"{task.data}:{configuration}" if configuration else task.data


def question_and_answer(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of an evaluation set as ``question`` (passage and options inside) and ``answer``; others unchanged.

    Read are the shapes of AGIEval (both), ARC, BIG-Bench Hard, BoolQ, HellaSwag, HumanEval, MATH, MMLU, MT-Bench (its
    first turn), OpenBookQA, PIQA, TruthfulQA and Winogrande.
    """
    if isinstance(row.get("query"), str) and "choices" in row and "gold" in row:  # AGIEval, as lm-eval reads it
        return {"question": row["query"].partition("\nA: Among")[0].replace("Q: ", "\n", 1)}
    if isinstance(row.get("ctx"), str) and "endings" in row:
        return _with_answer(row["ctx"], row["endings"], row.get("label"))
    if isinstance(row.get("goal"), str) and "sol1" in row:
        return _with_answer(row["goal"], [row["sol1"], row.get("sol2")], row.get("label"))
    if isinstance(row.get("sentence"), str) and "option1" in row:
        return {"question": row["sentence"]}
    if isinstance(row.get("problem"), str) and isinstance(row.get("solution"), str):
        return {"question": row["problem"], "answer": row["solution"]}
    if isinstance(row.get("prompt"), str) and isinstance(row.get("canonical_solution"), str):
        return {"question": row["prompt"], "answer": row["canonical_solution"]}
    if isinstance(row.get("input"), str) and isinstance(row.get("target"), str):
        return {"question": row["input"], "answer": row["target"]}
    turns = row.get("turns") or row.get("prompt")
    if isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns):
        return {"question": turns[0]}
    asked = row.get("question") or row.get("question_stem")
    return _asked(asked, row) if isinstance(asked, str) else dict(row)


def _asked(question: str, row: Mapping[str, Any]) -> dict[str, Any]:
    options = row.get("options") or row.get("choices")
    if isinstance(options, Mapping):  # {"text": […], "label": […]}
        options = options.get("text")
    parts = [row.get("passage"), question, *(options if isinstance(options, list | tuple) else [])]
    read = {"question": "\n".join(part for part in parts if isinstance(part, str) and part.strip())}
    answer = next((row[name] for name in ("answer", "response") if isinstance(row.get(name), str)), "")
    return read | ({"answer": answer} if answer.strip() else {})  # the number of an option is none


def _with_answer(question: str, options: Any, label: Any) -> dict[str, Any]:
    """Return the question with the right one of its options; 0 is the first."""
    number = int(label) if str(label).isdigit() else -1  # the hub's test splits hide it
    known = 0 <= number < len(options)
    return {"question": question, **({"answer": str(options[number])} if known else {})}
