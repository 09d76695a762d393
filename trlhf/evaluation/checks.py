"""What is wrong with the evaluation section: names that do not exist, files and packages that are missing. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from trlhf.evaluation.suites import SUITES, Suite, SuiteTask, chosen_tasks, nearest
from trlhf.schema import Problem

if TYPE_CHECKING:
    from trlhf.config import Config, EvaluationConfig


def evaluation_problems(config: Config) -> Iterator[Problem]:
    """Yield every contradiction of the evaluation section."""
    evaluation = config.evaluation
    unknown = [name for name in evaluation.suites if name not in SUITES]
    for name in unknown:
        text = (
            f"evaluation.suites=[{','.join(evaluation.suites)}]: there is no suite {name}; {nearest(name, [*SUITES])}"
        )
        yield Problem(("evaluation.suites",), text)
    yield from _model(config)
    if unknown:
        return
    known = [task.name for name in evaluation.suites for task in SUITES[name].tasks]
    for name in evaluation.tasks:
        if name not in known:
            yield Problem(("evaluation.tasks",), f"evaluation.tasks: {_no_task(name, known)}")
    chosen = chosen_tasks(evaluation.suites, evaluation.tasks)
    engines = {suite.engine for suite, _ in chosen}
    if "lm-eval" in engines and find_spec("lm_eval") is None:
        yield Problem(
            ("evaluation.suites",),
            f"evaluation.suites=[{','.join(evaluation.suites)}] needs the package lm_eval, which is not installed; "
            "pip install 'trlhf[suites]'",
        )
    yield from _file(evaluation)
    yield from _mirror(config, chosen)
    yield from _votes(evaluation, "generate" in engines)
    if "judge" in engines:
        yield from _judge(evaluation)


def _no_task(name: str, known: list[str]) -> str:
    if not known:
        return f"{name} is a task of a suite, but evaluation.suites=[] names none; add evaluation=SUITE"
    return f"the suites have no task {name}; {nearest(name, known)}"


def _model(config: Config) -> Iterator[Problem]:
    from trlhf.hub import exists_or_on_hub

    name = config.evaluation.model
    if name is None:
        return
    path = Path(name).expanduser()
    if config.stage != "eval":
        yield Problem(
            ("evaluation.model", "stage"),
            f"evaluation.model={name} is evaluated alone, but stage={config.stage}; add stage=eval, or leave it out",
        )
    if not exists_or_on_hub(name):
        yield Problem(
            ("evaluation.model",),
            f"evaluation.model={name} is neither a folder nor a .gguf file that exists, nor a hub name like "
            "owner/name; correct it",
        )
    elif path.is_file() and path.suffix != ".gguf":
        yield Problem(("evaluation.model",), f"evaluation.model={name} is a file, but no .gguf file; give the folder")
    elif path.is_dir() and not any((path / found).is_file() for found in ("config.json", "adapter_config.json")):
        yield Problem(
            ("evaluation.model",),
            f"evaluation.model={name} holds neither config.json (a model) nor adapter_config.json (an adapter); "
            "give the folder that does, RUN/rl/model for instance",
        )
    elif path.suffix == ".gguf" and find_spec("gguf") is None:
        yield Problem(
            ("evaluation.model",),
            f"evaluation.model={name} needs the package gguf, which is not installed; pip install 'trlhf[suites]'",
        )


def _file(evaluation: EvaluationConfig) -> Iterator[Problem]:
    from trlhf.hub import DATA, exists_or_on_hub

    file = evaluation.file
    if "file" in evaluation.suites and file is None:
        yield Problem(
            ("evaluation.suites", "evaluation.file"),
            "evaluation.file is missing, but the suite file reads its questions there; give evaluation.file=FILE "
            "(.jsonl, .json, .csv, .parquet, a folder or a hub name)",
        )
    if file is not None and "file" not in evaluation.suites:
        yield Problem(
            ("evaluation.suites", "evaluation.file"),
            f"evaluation.file={file} is read only by the suite file; add evaluation=file, or leave it out",
        )
    elif file is not None and not exists_or_on_hub(file, DATA):
        yield Problem(
            ("evaluation.file",),
            f"evaluation.file={file} does not exist (seen from {Path.cwd()}), and is no hub name like owner/name; "
            "correct the path",
        )


def _mirror(config: Config, chosen: list[tuple[Suite, list[SuiteTask]]]) -> Iterator[Problem]:
    evaluation, key = config.evaluation, "evaluation.mirror"
    given = evaluation.mirror
    if given is None and config.stage in ("all", "eval"):  # the one mirror of a run, unless the suites have their own
        key, given = "data.mirror", config.data.mirror
    if given is None:
        return
    mirror = Path(given).expanduser()
    if not mirror.is_dir() and key == "data.mirror":
        return  # trlhf/checks_mixture.py says so
    if not mirror.is_dir():
        yield Problem(
            ("evaluation.mirror",),
            f"evaluation.mirror={evaluation.mirror} is no folder (seen from {Path.cwd()}); make one with "
            "python -m trlhf.evaluation.mirror, or leave it out to read from the hub",
        )
        return
    needed = dict.fromkeys(task.data for _, tasks in chosen for task in tasks if task.data)
    missing = [name for name in needed if not (mirror / name).is_dir()]
    if missing:
        yield Problem(
            (key, "evaluation.suites"),
            f"{key}={given} has no copy of {', '.join(missing)}; put it there under that name, or choose other tasks "
            "with evaluation.tasks=[…] (evaluation.suites=[]: none)",
        )


def _votes(evaluation: EvaluationConfig, asked: bool) -> Iterator[Problem]:
    votes = evaluation.majority
    if votes and not asked:
        yield Problem(
            ("evaluation.majority", "evaluation.suites"),
            f"evaluation.majority={votes} counts votes in the suites reasoning and file, but none of them is asked; "
            "add evaluation=reasoning, or leave it out",
        )
    elif votes == 1:
        yield Problem(("evaluation.majority",), "evaluation.majority=1: one vote is no majority; try 8, or 0 for none")


def _judge(evaluation: EvaluationConfig) -> Iterator[Problem]:
    from trlhf.hub import DATA, exists_or_on_hub

    judge, questions, prompts = evaluation.judge, evaluation.mt_bench.questions, evaluation.mt_bench.prompts
    for key, value, example in (
        ("url", judge.url, "http://localhost:8000/v1"),
        ("model", judge.model, "the name that the server gives it"),
    ):
        if value is None:
            yield Problem(
                ("evaluation.suites", f"evaluation.judge.{key}"),
                f"evaluation.judge.{key} is missing, but mt-bench is rated by a judge; give evaluation.judge.{key}=… "
                f"({example})",
            )
    if judge.url is not None and not judge.url.startswith(("http://", "https://")):
        yield Problem(
            ("evaluation.judge.url",),
            f"evaluation.judge.url={judge.url} must begin with http:// or https://; try http://{judge.url}",
        )
    if judge.key_env is not None and not os.environ.get(judge.key_env):
        yield Problem(
            ("evaluation.judge.key_env",),
            f"evaluation.judge.key_env={judge.key_env}: there is no environment variable of that name with a key in "
            "it; set it, or leave evaluation.judge.key_env out",
        )
    if not exists_or_on_hub(questions, DATA):
        yield Problem(
            ("evaluation.mt_bench.questions",),
            f"evaluation.mt_bench.questions={questions} does not exist, and is no hub name; correct the path",
        )
    if prompts is not None and not Path(prompts).expanduser().is_file():
        yield Problem(
            ("evaluation.mt_bench.prompts",),
            f"evaluation.mt_bench.prompts={prompts} does not exist; correct the path, or leave it out for our prompts",
        )
