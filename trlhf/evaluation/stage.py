"""The suites of the eval stage: every task of every suite for one model, each saved as soon as it is done."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trlhf import files
from trlhf.config import Config, EvaluationConfig
from trlhf.console import progress
from trlhf.evaluation.means import mean_of_means
from trlhf.evaluation.protocol import Protocol
from trlhf.evaluation.suites import Suite, SuiteTask, chosen_tasks

if TYPE_CHECKING:
    from trlhf.run import StageDirectory

log = logging.getLogger("trlhf")
Entry = dict[str, Any]  # value, low, high, n, metric, protocol, and what else there is to say


@dataclass(frozen=True)
class Subject:
    """A model that is being evaluated.

    Attributes:
        name: ``base``, ``sft``, ``rl`` or ``model``.
        model: a causal language model.
        tokenizer: with its chat template.
        made: when it was made, or where it came from: results for another one are not taken for its own.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    made: str


def run_suites(subject: Subject, config: Config, stage: StageDirectory) -> dict[str, dict[str, Entry]]:
    """Run what ``config.evaluation.suites`` names for one model; what an earlier process finished is not done again.

    Returns:
        Suite → task → entry; a suite that cards average has a task ``average``.
    """
    results: dict[str, dict[str, Entry]] = {}
    for suite, tasks in chosen_tasks(config.evaluation.suites, config.evaluation.tasks):
        rows: dict[str, Entry] = {}
        for task in tasks:
            rows |= _remembered(subject, config, stage, suite, task)
        if suite.average and len(tasks) == len(suite.tasks):
            rows["average"] = _average(suite, rows)
        results[suite.name] = rows
    return results


def with_mirror(config: Config) -> EvaluationConfig:
    """Return the evaluation section; where it names no mirror of its own, that of the run's data serves the suites."""
    return replace(config.evaluation, mirror=config.evaluation.mirror or config.data.mirror)


def _remembered(
    subject: Subject, config: Config, stage: StageDirectory, suite: Suite, task: SuiteTask
) -> dict[str, Entry]:
    """Return a task's entries, from disk where they are there for this very model."""
    folder = f"suites/{subject.name}/{suite.name}"
    path = stage.path / folder / f"{task.name}.json"
    of = {"made": subject.made, "data": task.data or config.evaluation.file}
    if path.exists():
        kept: dict[str, Any] = files.read_json(path)
        if kept["of"] == of and not any(entry.get("unjudged") for entry in kept["entries"].values()):
            log.info("%s: %s of %s is done already", subject.name, task.name, suite.name)
            return dict(kept["entries"])
    entries, samples = _run(subject, config, stage, suite, task)
    stage.write_jsonl(f"{folder}/{task.name}.jsonl", samples)
    stage.write_json(f"{folder}/{task.name}.json", {"of": of, "entries": entries})
    return entries


def _run(
    subject: Subject, config: Config, stage: StageDirectory, suite: Suite, task: SuiteTask
) -> tuple[dict[str, Entry], Any]:
    title = f"eval: {task.name} ({subject.name})"
    if suite.engine == "lm-eval":
        return _harness(subject, config, task, title)
    if suite.engine == "judge":
        return _judged(subject, config, task, stage.path / f"suites/{subject.name}/{suite.name}")
    return _generate(subject, config, task, title)


def _harness(subject: Subject, config: Config, task: SuiteTask, title: str) -> tuple[dict[str, Entry], Any]:
    from trlhf.evaluation.harness import VERSION, run_task

    asked = with_mirror(config)
    found = run_task(subject.model, subject.tokenizer, task, asked, title, config.seed)
    protocol = Protocol(f"lm-eval {VERSION}", task.metric, task.shots, 1, asked.chat_template)
    entry = _entry(found.estimate, protocol, found.chance)
    entry |= {"also": found.also} if found.also else {}
    entry |= {"members": found.members} if found.members else {}
    entry |= {"truncated": found.truncated} if found.truncated else {}
    return {task.name: entry}, found.samples


def _generate(subject: Subject, config: Config, task: SuiteTask, title: str) -> tuple[dict[str, Entry], Any]:
    from trlhf.evaluation.questions import load_questions
    from trlhf.evaluation.reasoning import answer_questions

    asked = with_mirror(config)
    questions, reports = load_questions(task, asked.mirror, asked.file)
    for report in reports:
        (log.warning if report.dropped else log.info)(report.describe())
    questions = questions[: asked.limit or None]
    with progress(title, len(questions) * (2 if asked.majority else 1)) as advance:
        found = answer_questions(
            subject.model, subject.tokenizer, questions, asked, config.model.max_length, config.seed, advance
        )
    greedy = Protocol("trlhf, math-verify", task.metric, 0, 1, True)
    entries = {task.name: _entry(found.greedy, greedy, found.chance) | {"unfinished": found.unfinished}}
    if found.too_long:
        entries[task.name]["too_long"] = found.too_long
    if found.votes is not None and found.single is not None:
        votes = Protocol("trlhf, math-verify", task.metric, 0, asked.majority, True, asked.temperature)
        entries[f"{task.name} maj@{asked.majority}"] = _entry(found.votes, votes, found.chance)
        single = Protocol("trlhf, math-verify", task.metric, 0, 1, True, asked.temperature)
        entries[f"{task.name} mean@{asked.majority}"] = _entry(found.single, single, found.chance)
    return entries, found.samples


def _judged(subject: Subject, config: Config, task: SuiteTask, folder: Path) -> tuple[dict[str, Entry], Any]:
    from trlhf.evaluation.judge import Judge
    from trlhf.evaluation.mt_bench import (
        answer_two_turns,
        load_prompts,
        load_two_turns,
        rate_answers,
        remembered_answers,
    )

    asked, seed = with_mirror(config), config.seed
    questions, prompts = load_two_turns(asked), load_prompts(asked.mt_bench.prompts)

    def make() -> dict[str, list[str]]:
        with progress(f"eval: {task.name} ({subject.name}), answers", 2 * len(questions)) as advance:
            return answer_two_turns(subject.model, subject.tokenizer, questions, asked, seed, advance)

    answers = remembered_answers(folder / "answers.json", [subject.made, questions, asked.mt_bench, seed], make)
    with progress(f"eval: {task.name} ({subject.name}), ratings", 2 * len(answers)) as advance:
        judge = Judge(asked.judge, folder / "ratings.jsonl")
        found = rate_answers(questions, answers, judge, prompts, asked.confidence, seed, advance)
    for reason, count in found.reasons.items():
        log.warning("%s: %d answers of %s have no rating: %s", task.name, count, subject.name, reason)
    whose = "our prompts" if asked.mt_bench.prompts is None else f"prompts of {Path(asked.mt_bench.prompts).name}"
    note = f"rated by {asked.judge.model} with {whose}"
    protocol = Protocol("trlhf", task.metric, 0, 1, True, temperature=None, note=note)
    nothing: dict[str, Any] = {"value": None, "low": None, "high": None, "n": 0}
    entry = _entry(found.estimate or nothing, protocol, None) | {"members": found.parts}
    entry |= {"unjudged": found.unjudged, "reasons": found.reasons} if found.unjudged else {}
    entry |= {"too_long": found.too_long} if found.too_long else {}
    return {task.name: entry}, found.samples


def _entry(estimate: Mapping[str, Any], protocol: Protocol, chance: float | None) -> Entry:
    """Return one row of a suite; where guessing is inside the interval, it says so."""
    entry: Entry = {**estimate, "metric": protocol.metric, "shots": protocol.shots, "protocol": protocol.plain()}
    if chance is not None:
        entry |= {"chance": chance, "at_chance": bool(estimate["low"] <= chance <= estimate["high"])}
    return entry


def _average(suite: Suite, rows: Mapping[str, Entry]) -> Entry:
    parts = [rows[task.name] for task in suite.tasks]
    chances = [part.get("chance") for part in parts]
    known = [chance for chance in chances if chance is not None]
    protocols = [Protocol(**part["protocol"]) for part in parts]
    means: Any = [{key: part[key] for key in ("value", "low", "high", "n")} for part in parts]
    whole = Protocol.joint(protocols, [task.name for task in suite.tasks])
    chance = sum(known) / len(known) if len(known) == len(parts) else None
    return _entry(mean_of_means(means), whole, chance)
