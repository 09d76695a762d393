"""What is measured in each suite: tasks, shots, metric, data sets. No torch and no lm-eval here.

Shot counts and metrics are those of the model cards: Open LLM Leaderboard v1
(https://huggingface.co/spaces/open-llm-leaderboard-old/open_llm_leaderboard), the GPT4All and AGIEval lists of
https://github.com/teknium1/LLM-Benchmark-Logs, TruthfulQA mc1 and mc2. BIG-Bench Hard is 3-shot with chain of thought
(https://arxiv.org/abs/2210.09261).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Engine = Literal["lm-eval", "generate", "judge"]
_LSAT_AND_SAT = "aqua_rat logiqa_en lsat_ar lsat_lr lsat_rc sat_en sat_en_without_passage sat_math"
_SUBJECTS = """
abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics
econometrics electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology
high_school_chemistry high_school_computer_science high_school_european_history high_school_geography
high_school_government_and_politics high_school_macroeconomics high_school_mathematics high_school_microeconomics
high_school_physics high_school_psychology high_school_statistics high_school_us_history high_school_world_history
human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning management marketing
medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory professional_accounting
professional_law professional_medicine professional_psychology public_relations security_studies sociology
us_foreign_policy virology world_religions
"""
_HARD = """
boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies
geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects
logical_deduction_three_objects movie_recommendation multistep_arithmetic_two navigate object_counting
penguins_in_a_table reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks
sports_understanding temporal_sequences tracking_shuffled_objects_five_objects
tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting
"""
_MATH = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra")


@dataclass(frozen=True)
class SuiteTask:
    """One row of a suite's table.

    Attributes:
        name: as it is called in results.
        data: hub data set that it reads ("" where the user names the file).
        metric: which number counts, by lm-eval's name, or ``accuracy`` (math-verify), or ``rating``.
        shots: worked examples before each question.
        folder: lm-eval's folder of it.
        members: lm-eval's tasks whose unweighted mean it is; () where our own engine asks.
        filter: lm-eval's name for how an answer is cut out of a response.
        also: further metrics that are reported.
        configurations: of the data set, for our own engine.
    """

    name: str
    data: str
    metric: str = "acc"
    shots: int = 0
    folder: str = ""
    members: tuple[str, ...] = ()
    filter: str = "none"
    also: tuple[str, ...] = ()
    configurations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suite:
    """A named set of tasks.

    Attributes:
        name: value of ``evaluation.suites``.
        tasks: its rows.
        engine: who asks the questions.
        average: whether the unweighted mean over the tasks is reported, as cards do.
    """

    name: str
    tasks: tuple[SuiteTask, ...]
    engine: Engine = "lm-eval"
    average: bool = True


def _harness(
    name: str, data: str, metric: str = "acc", shots: int = 0, folder: str = "", filter: str = "none"
) -> SuiteTask:
    return SuiteTask(name, data, metric, shots, folder or name, (name,), filter)


def _agieval(name: str) -> SuiteTask:
    data = f"hails/agieval-{name.replace('_', '-')}"
    return SuiteTask(f"agieval_{name}", data, "acc_norm", 0, "agieval", (f"agieval_{name}",), also=("acc",))


def _truthful(kind: str) -> SuiteTask:
    return _harness(f"truthfulqa_{kind}", "truthfulqa/truthful_qa", folder="truthfulqa")


def _common(shots: tuple[int, int, int]) -> tuple[SuiteTask, SuiteTask, SuiteTask]:
    """Return the three tasks that two lists share, with the shots of one of them."""
    return (
        _harness("arc_challenge", "allenai/ai2_arc", "acc_norm", shots[0], "arc"),
        _harness("hellaswag", "Rowan/hellaswag", "acc_norm", shots[1]),
        _harness("winogrande", "allenai/winogrande", "acc", shots[2]),
    )


def _suites() -> Iterator[Suite]:
    arc, hellaswag, winogrande = _common((25, 10, 5))
    subjects = tuple(f"mmlu_{subject}" for subject in _SUBJECTS.split())
    mmlu = SuiteTask("mmlu", "cais/mmlu", "acc", 5, "mmlu/default", subjects)
    gsm8k = _harness("gsm8k", "openai/gsm8k", "exact_match", 5, filter="strict-match")
    yield Suite("open-llm-v1", (arc, hellaswag, mmlu, _truthful("mc2"), winogrande, gsm8k))
    arc, hellaswag, winogrande = _common((0, 0, 0))
    easy = _harness("arc_easy", "allenai/ai2_arc", "acc_norm", folder="arc")
    boolq = _harness("boolq", "aps/super_glue", folder="super_glue/boolq")
    books = _harness("openbookqa", "allenai/openbookqa", "acc_norm")
    yield Suite("gpt4all", (arc, easy, boolq, hellaswag, books, _harness("piqa", "baber/piqa", "acc_norm"), winogrande))
    yield Suite("agieval", tuple(map(_agieval, _LSAT_AND_SAT.split())))
    yield Suite("truthfulqa", (_truthful("mc1"), _truthful("mc2")), average=False)
    hard = tuple(f"bbh_cot_fewshot_{name}" for name in _HARD.split())
    bbh = SuiteTask("bbh", "SaylorTwift/bbh", "exact_match", 3, "bbh/cot_fewshot", hard, "get-answer")
    yield Suite("bbh", (bbh,), average=False)
    reasoning = (
        SuiteTask("gsm8k", "openai/gsm8k", "accuracy", configurations=("main",)),
        SuiteTask("math", "EleutherAI/hendrycks_math", "accuracy", configurations=(*_MATH, "precalculus")),
        SuiteTask("arc_challenge", "allenai/ai2_arc", "accuracy", configurations=("ARC-Challenge",)),
    )
    yield Suite("reasoning", reasoning, "generate", average=False)
    yield Suite("file", (SuiteTask("file", "", "accuracy"),), "generate", average=False)
    yield Suite("mt-bench", (SuiteTask("mt-bench", "", "rating"),), "judge", average=False)


SUITES = {suite.name: suite for suite in _suites()}


def chosen_tasks(suites: Sequence[str], tasks: Sequence[str]) -> list[tuple[Suite, list[SuiteTask]]]:
    """Return the suites by name, each with those of its tasks that are wanted (all where ``tasks`` is empty)."""
    found = [
        (SUITES[name], [task for task in SUITES[name].tasks if not tasks or task.name in tasks])
        for name in dict.fromkeys(suites)
    ]
    return [(suite, rows) for suite, rows in found if rows]


def wanted(suites: Sequence[str], tasks: Sequence[str]) -> set[tuple[str, str]]:
    """Return every suite and task that a configuration asks for."""
    return {(suite.name, task.name) for suite, rows in chosen_tasks(suites, tasks) for task in rows}


def nearest(name: str, known: Sequence[str]) -> str:
    """Say which of the known names was probably meant, or name them all."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}"
