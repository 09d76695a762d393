"""Which suites there are, what is wrong with asking for them, and how their results are named and told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trlhf.config import EvaluationConfig, build_config
from trlhf.errors import ConfigError, UserError
from trlhf.evaluation import mirror, report
from trlhf.evaluation.protocol import Protocol
from trlhf.evaluation.published import beside, figures
from trlhf.evaluation.suites import SUITES, chosen_tasks
from trlhf.files import read_jsonl, write_jsonl

CARDS = [  # the eight of the cards' AGIEval tables
    *("agieval_aqua_rat", "agieval_logiqa_en", "agieval_lsat_ar", "agieval_lsat_lr", "agieval_lsat_rc"),
    *("agieval_sat_en", "agieval_sat_en_without_passage", "agieval_sat_math"),
]


def problems(**evaluation: Any) -> tuple[str, ...]:
    stage = evaluation.pop("stage", "eval")
    with pytest.raises(ConfigError) as caught:
        build_config({"stage": stage, "evaluation": evaluation})
    return caught.value.problems


# ---- what there is ----


def test_shots_and_metrics_are_the_cards() -> None:
    leaderboard = {task.name: (task.shots, task.metric) for task in SUITES["open-llm-v1"].tasks}
    assert leaderboard == {
        "arc_challenge": (25, "acc_norm"),
        "hellaswag": (10, "acc_norm"),
        "mmlu": (5, "acc"),
        "truthfulqa_mc2": (0, "acc"),
        "winogrande": (5, "acc"),
        "gsm8k": (5, "exact_match"),
    }
    assert [task.name for task in SUITES["agieval"].tasks] == CARDS
    assert {task.metric for task in SUITES["agieval"].tasks} == {"acc_norm"}
    assert [len(SUITES[name].tasks) for name in ("gpt4all", "truthfulqa", "bbh")] == [7, 2, 1]
    assert len(SUITES["open-llm-v1"].tasks[2].members) == 57 and len(SUITES["bbh"].tasks[0].members) == 27
    assert all(task.shots == 0 for name in ("gpt4all", "agieval", "reasoning") for task in SUITES[name].tasks)


def test_lm_eval_knows_every_task_under_the_name_and_data_that_we_give() -> None:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    from trlhf.evaluation.harness import TASKS

    tasks = [task for suite in SUITES.values() if suite.engine == "lm-eval" for task in suite.tasks]
    folders = sorted({str(TASKS / task.folder) for task in tasks})
    index = TaskManager(include_path=[*folders], include_defaults=False).task_index
    for task in tasks:
        for member in task.members:
            found = load_yaml(index[member].yaml_path, resolve_func=False)
            assert found["dataset_path"] == task.data, member
            metrics = {entry["metric"] for entry in found["metric_list"]}
            assert {task.metric, *task.also} <= metrics, member
            assert task.filter in {"none", *(entry["name"] for entry in found.get("filter_list", []))}, member


def test_only_some_tasks_of_the_suites() -> None:
    chosen = chosen_tasks(["agieval", "reasoning", "agieval"], ["gsm8k", "agieval_sat_en"])
    assert [(suite.name, [task.name for task in tasks]) for suite, tasks in chosen] == [
        ("agieval", ["agieval_sat_en"]),
        ("reasoning", ["gsm8k"]),
    ]
    assert [len(tasks) for _, tasks in chosen_tasks(["agieval"], [])] == [8]


# ---- wrong input ----


def test_a_typo_is_answered_with_the_nearest_names() -> None:
    assert problems(suites=["agivall"]) == (
        "evaluation.suites=[agivall]: there is no suite agivall; did you mean agieval or gpt4all?",
    )
    assert problems(suites=["xyz"])[0].endswith(
        "choose from open-llm-v1, gpt4all, agieval, truthfulqa, bbh, reasoning, file, mt-bench"
    )
    assert problems(suites=["agieval"], tasks=["agieval_sat_mat"])[0].startswith(
        "evaluation.tasks: the suites have no task agieval_sat_mat; did you mean agieval_sat_math or "
    )
    assert problems(tasks=["gsm8k"])[0].endswith("evaluation.suites=[] names none; add evaluation=SUITE")


def test_a_missing_package_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("trlhf.evaluation.checks.find_spec", lambda name: None)
    assert problems(suites=["agieval"])[0].endswith("which is not installed; pip install 'trlhf[suites]'")
    (tmp_path / "model.gguf").touch()
    assert "needs the package gguf" in problems(model=str(tmp_path / "model.gguf"))[0]


def test_files_that_are_missing_or_not_asked_for(tmp_path: Path) -> None:
    assert problems(suites=["file"])[0].startswith("evaluation.file is missing")
    assert problems(file=str(tmp_path))[0].endswith("add evaluation=file, or leave it out")
    assert "does not exist" in problems(suites=["file"], file="no/such/file.jsonl")[0]
    assert "is no folder" in problems(suites=["agieval"], mirror=str(tmp_path / "none"))[0]
    (tmp_path / "hails/agieval-sat-en").mkdir(parents=True)
    (found,) = problems(suites=["agieval"], tasks=["agieval_sat_en", "agieval_sat_math"], mirror=str(tmp_path))
    assert "has no copy of hails/agieval-sat-math; put it there under that name" in found
    assert build_config({"evaluation": {"suites": ["agieval"], "tasks": ["agieval_sat_en"], "mirror": str(tmp_path)}})


def test_a_model_that_cannot_be_one(tmp_path: Path) -> None:
    assert "neither a folder nor a .gguf file" in problems(model="nowhere")[0]
    assert "holds neither config.json" in problems(model=str(tmp_path))[0]
    (tmp_path / "weights.bin").touch()
    assert "but no .gguf file" in problems(model=str(tmp_path / "weights.bin"))[0]
    assert problems(stage="all", model="owner/name")[0].endswith("add stage=eval, or leave it out")
    assert "neither a folder nor a .gguf file" in problems(model="owner/name.gguf")[0]


def test_votes_need_something_to_vote_on() -> None:
    assert "none of them is asked" in problems(majority=8)[0]
    assert problems(majority=1, suites=["reasoning"])[0].startswith("evaluation.majority=1: one vote is no majority")


# ---- mirrors ----


def agieval_rows(count: int = 3) -> list[dict[str, Any]]:
    return [
        {
            "passage": "Ann has 3 plums." if number % 2 else None,
            "question": f"What is {number} plus 1?",
            "options": [f"(A){number}", f"(B){number + 1}", f"(C){number + 2}", f"(D){number + 3}"],
            "label": "B",
        }
        for number in range(count)
    ]


def test_a_mirror_words_questions_as_agieval_does(tmp_path: Path) -> None:
    rows = [*agieval_rows(), {"passage": None, "question": "What?", "options": ["(A)1", "(B)2"], "label": "C"}]
    for name in mirror.AGIEVAL:
        write_jsonl(tmp_path / "raw" / f"{name}.jsonl", rows)
    reports = mirror.write_agieval(tmp_path / "raw", tmp_path / "mirror")
    assert [(found.read, found.kept) for found in reports] == [(4, 3)] * 8
    assert "'label' is 'C', not the letter of one of the 2 options" in reports[0].describe()
    copied = read_jsonl(tmp_path / "mirror/hails/agieval-sat-en/default/test.jsonl")
    assert copied[1] == {
        "query": "Ann has 3 plums.Q: What is 1 plus 1? Answer Choices: (A)1 (B)2 (C)3 (D)4\n"
        "A: Among A through D, the answer is",
        "choices": ["(A)1", "(B)2", "(C)3", "(D)4"],
        "gold": [1],
    }
    assert copied[0]["query"].startswith("Q: What is 0 plus 1?")


def test_a_mirror_is_not_made_of_other_things(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="usage: python -m trlhf"):
        mirror.main([str(tmp_path), "agivall=x"])
    write_jsonl(tmp_path / "train.jsonl", [{"question": "q", "answer": 3}])
    with pytest.raises(UserError, match=r"train\.jsonl:1 has no text in 'question' and 'answer'"):
        mirror.main([str(tmp_path / "mirror"), f"gsm8k={tmp_path}"])


# ---- published figures ----


def test_every_published_figure_belongs_to_a_task_and_has_a_source() -> None:
    assert len(figures()) > 40
    for figure in figures():
        suite = SUITES[figure.suite]
        assert figure.task in {task.name for task in suite.tasks} or (figure.task == "average" and suite.average)
        assert figure.source.startswith("https://"), figure
    models = {figure.model for figure in figures()}
    assert {"mistralai/Mistral-7B-v0.1", "Open-Orca/Mistral-7B-OpenOrca"} < models and len(models) == 4


def test_published_means_are_the_means_of_their_tasks() -> None:
    """What a card prints as its average is the unweighted mean of what it prints for the tasks."""
    checked = 0
    for whole in (figure for figure in figures() if figure.task == "average"):
        names = whole.protocol.tasks or tuple(task.name for task in SUITES[whole.suite].tasks)
        parts = [
            float(figure.text)
            for figure in figures()
            if (figure.model, figure.suite) == (whole.model, whole.suite) and figure.task in names
        ]
        if len(parts) == len(names):
            assert sum(parts) / len(parts) == pytest.approx(float(whole.text), abs=0.011), whole
            checked += 1
    assert checked == 6


def entry(value: float, protocol: Protocol) -> dict[str, Any]:
    numbers = {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 9}
    return {**numbers, "metric": protocol.metric, "shots": protocol.shots, "protocol": protocol.plain()}


def test_the_protocol_difference_is_named() -> None:
    greedy = entry(0.25, Protocol("trlhf, math-verify", "accuracy", 0, 1, True))
    votes = entry(0.5, Protocol("trlhf, math-verify", "accuracy", 0, 8, True, 0.7))
    (row,) = beside({"reasoning": {"gsm8k": {"sft": greedy, "rl": greedy}}})
    assert (row["model"], row["published"]) == ("mistralai/Mistral-7B-v0.1", "52.2")
    assert row["here"] == "25.0 [15.0, 35.0] (rl)"
    assert row["difference"].startswith("8-shot, here zero-shot; maj@8, here one greedy answer; ")
    (row,) = beside({"reasoning": {"gsm8k": {"rl": greedy}, "gsm8k maj@8": {"rl": votes}}})
    assert row["here"] == "50.0 [40.0, 60.0] (rl)"
    assert row["difference"].startswith("8-shot, here zero-shot; no chat template")
    (row,) = beside({"reasoning": {"gsm8k": {"rl": greedy}, "gsm8k maj@4": {"rl": votes}}})
    assert row["here"] == "25.0 [15.0, 35.0] (rl)"


def test_equal_protocols_differ_in_nothing() -> None:
    protocol = Protocol("lm-eval", "acc", 5, 1, False)
    assert protocol.differences(protocol) == "none that its source states"
    assert Protocol("lm-eval", "acc", 5).differences(protocol) == "none that its source states"
    four = Protocol(shots=-1, tasks=("a", "b"))
    assert four.differences(Protocol(shots=-1, tasks=("a", "b", "c"))) == "mean of 2 tasks (a, b), here of 3"


# ---- tables ----


def test_a_table_says_where_guessing_is_as_good(capsys: pytest.CaptureFixture[str]) -> None:
    protocol = Protocol("lm-eval", "acc_norm", 0, 1, False)
    guess = entry(0.25, protocol) | {"chance": 0.2, "at_chance": True, "truncated": 7}
    better = entry(0.5, protocol) | {"chance": 0.2, "at_chance": False}
    metrics = {"suites": {"agieval": {"agieval_sat_en": {"sft": guess, "rl": better}}}}
    report.print_suites(metrics, EvaluationConfig(suites=["agieval"], limit=9))
    out = " ".join(capsys.readouterr().out.split())
    assert "agieval: percent [95% interval], the first 9 questions of each task" in out
    assert "25.0† [15.0, 35.0]" in out and "50.0 [40.0, 60.0]" in out
    assert "† no better or worse than guessing (20 percent) as far as the interval tells" in out
    assert "7 sequences were longer than the model's context and lost their beginning: agieval_sat_en (sft) 7" in out


def test_a_suite_of_which_no_task_was_asked_has_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    entries = {"agieval": {"agieval_sat_en": {"rl": entry(0.25, Protocol("lm-eval", "acc_norm", 0, 1, False))}}}
    asked = EvaluationConfig(suites=["reasoning", "agieval"], tasks=["agieval_sat_en"])
    report.print_suites({"suites": entries}, asked)
    assert "agieval_sat_en" in (shown := capsys.readouterr().out) and "reasoning" not in shown


def test_tasks_of_an_earlier_start_stay() -> None:
    """And one whose answers wait for a rating is not whole yet."""
    earlier = {"a": {"x": {"rl": {"value": 1}}, "y": {"rl": {"value": 2}}}, "b": {"z": {"rl": {"value": 3}}}}
    fresh = {"a": {"y": {"rl": {"value": 4, "unjudged": 1}}}, "c": {"w": {"rl": {"value": 5}}}}
    found = report.joined(earlier, fresh)
    values = {suite: {task: models["rl"]["value"] for task, models in tasks.items()} for suite, tasks in found.items()}
    assert values == {"a": {"x": 1, "y": 4}, "b": {"z": 3}, "c": {"w": 5}}
    assert report.measured(found) == {("a", "x"), ("b", "z"), ("c", "w")}


def test_published_figures_stand_beside_with_what_was_done_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    here = entry(0.25, Protocol("lm-eval 0.4.13", "acc_norm", 0, 1, False))
    suites = {"agieval": {"agieval_sat_en": {"rl": here}, "agieval_sat_math": {"rl": here}}}
    report.print_suites({"suites": suites, "published": beside(suites)}, EvaluationConfig(suites=["agieval"]))
    out = [line.split() for line in capsys.readouterr().out.splitlines()]
    here = ["25.0", "[15.0,", "35.0]", "(rl)"]
    assert ["│", "agieval_sat_en", "│", *here, "│", "48.54", "a", "│", "56.31", "a", "│"] in out
    assert any(line[:4] == ["a:", "shots", "not", "stated,"] and line[-1] == "0.4.13" for line in out)
    assert sum(line[:1] == ["a:"] for line in out) == 1 and not any(line[:1] == ["b:"] for line in out)
