"""The stages in order over one run directory, and the table at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlhf.admission import open_run
from trlhf.allocator import keep_freed_memory, let_go
from trlhf.closing import news_of, print_closing_table
from trlhf.config import Config
from trlhf.console import progress, quiet_libraries, setup_logging
from trlhf.crew import connect, keep, release, together
from trlhf.data_report import print_report, write_report
from trlhf.evaluation.report import by_task, joined, measured, print_suites
from trlhf.evaluation.suites import wanted
from trlhf.hardware import say
from trlhf.launch import check_folder, check_launch, warn_of_launch
from trlhf.plan import announce_memory, print_plan
from trlhf.preemption import watch
from trlhf.run import CHECK, RunDirectory, RunResult, planned
from trlhf.types import Label, RowReport
from trlhf.versions import commit, versions

if TYPE_CHECKING:
    from trlhf.estimate.lengths import Lengths
    from trlhf.ledger import Ledger
    from trlhf.tasks import Task

log = logging.getLogger("trlhf")
Work = Callable[[Config, RunDirectory, Any], None]  # Any: the task


def run_pipeline(config: Config) -> RunResult:
    """Run the stages that ``config.stage`` names and return the run directory with its summary.

    Where a launcher has started several processes, all call this: one leads, the others follow to the end of the run.

    Raises:
        UserError: something that the user can mend; nothing that was finished is lost.
        Preempted: SIGTERM came; the same call goes on from what is on disk.
    """
    if config.dry_run:
        print_plan(config)
        return RunResult(Path(), {})
    crew = connect()
    if crew is not None and crew.rank > 0:
        followed: RunResult = crew.follow()
        return followed
    result = _lead(config)
    if crew is not None:
        crew.dismiss(result)
    return result


def _lead(config: Config) -> RunResult:
    check_launch(config)
    with watch(), open_run(config) as run:
        setup_logging(run.path)
        warn_of_launch(config)
        release()  # what a run before this one, which failed, may have left
        check_folder(run)
        if planned(config):
            run.update_summary({"seed": config.seed, "versions": versions()})
        names = [name for name in planned(config) if name != CHECK]
        if CHECK in planned(config):
            _perform(CHECK, _check, config, run, None)
        if names:
            _learn(config, run, names)
        _close(config, run)
        if config.stage in ("all", "card"):
            _card(config, run)
        return RunResult(run.path, run.summary())


def _learn(config: Config, run: RunDirectory, names: Sequence[str]) -> None:
    """Run the stages that load models, on one task."""
    together(_prepare_torch, config)
    log.info(say(config))
    from trlhf.tasks import load_task

    task = load_task(config)
    _tell(run, task.reports)
    if CHECK in planned(config):
        from trlhf.contamination.check import without_offending

        task = without_offending(task, run.stage(CHECK))
        _tell(run, task.reports)
    if todo := [name for name in names if not _up_to_date(config, run, name)]:
        task = _fit(config, run, task, todo)
        announce_memory(config, _lengths(config, run, task), _free_memory(config))
    stages: dict[str, Work] = {"sft": _sft, "reward": _reward, "rl": _rl, "eval": _eval}
    for name in names:
        _perform(name, stages[name], config, run, task)
        _let_go()


def _perform(name: str, work: Work, config: Config, run: RunDirectory, task: Task | None) -> None:
    """Do a stage's work unless it is complete, and put its news into the summary."""
    complete = _up_to_date(config, run, name)
    log.info("stage %s is complete already" if complete else "stage %s", name)
    if complete and not run.interrupted(name):
        return
    with run.clock(name):
        if not complete:
            run.update_summary({"commits": {name: commit()}})
            work(config, run, task)
        run.stage(name).tidy()
        run.update_summary(news_of(name, run.stage(name).metrics()))


def _check(config: Config, run: RunDirectory, _: None) -> None:
    """Compare everything that any stage would train on with the evaluation sets."""
    from trlhf.contamination.check import run_check
    from trlhf.tasks import load_task

    task = load_task(replace(config, stage="all"))
    if config.stage == CHECK:  # else the stages that follow tell
        _tell(run, task.reports)
    run_check(config, task, run.stage(CHECK))


def _card(config: Config, run: RunDirectory) -> None:
    """Write the model card beside the weights, and upload both where ``push`` says so."""
    from trlhf.card.push import push
    from trlhf.card.write import write_cards

    folders = write_cards(config, run)
    if config.push:
        push(folders, config.push, config.card)


def _prepare_torch(config: Config) -> None:
    import torch
    import transformers  # noqa: F401  # loaded now, so that its bars and warnings can be silenced

    quiet_libraries()
    keep_freed_memory()
    if config.hardware.threads:
        torch.set_num_threads(config.hardware.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic: Any = torch.utils.deterministic  # the setting is not in its stubs
    deterministic.fill_uninitialized_memory = False  # nothing here reads memory that it did not write


def _free_memory(config: Config) -> float | None:
    """Return the bytes that are free on the device of a run; None where the system does not say."""
    import torch

    from trlhf.models import choose_device

    if choose_device(config) == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def _let_go() -> None:
    """Let go of a stage's models, on every process, before the next one loads its own."""
    release()
    let_go()


def _tell(run: RunDirectory, reports: Sequence[RowReport]) -> None:
    """Say what became of every row, and write it down."""
    for report in reports:
        (log.warning if report.dropped else log.info)(report.describe())
    print_report(reports)
    write_report(run.path, reports)


def _up_to_date(config: Config, run: RunDirectory, name: str) -> bool:
    """Say whether a stage is complete; ``eval`` is so only for the models that there were, and the suites asked for."""
    stage = run.stage(name)
    if not stage.done or name != "eval":
        return stage.done
    metrics = stage.metrics()
    asked = wanted(config.evaluation.suites, config.evaluation.tasks)
    return metrics.get("made") == _made(run) and asked <= measured(metrics.get("suites", {}))


def _made(run: RunDirectory) -> dict[str, str]:
    """Return when each model that ``eval`` compares with the base was made."""
    return {name: made for name in ("sft", "rl") if (made := run.stage(name).made) is not None}


def _fit(config: Config, run: RunDirectory, task: Task, todo: Sequence[str]) -> Task:
    """Leave out, before anything is trained, the prompts that leave no room for a response."""
    from trlhf.fitting import fit_task

    if list(todo) == ["sft"] or (list(todo) == ["eval"] and not _held_out(config)):
        return task
    task = fit_task(task, config, _tokenizer(config, run), todo)
    _tell(run, task.reports)
    return task


def _lengths(config: Config, run: RunDirectory, task: Task) -> Lengths:
    from trlhf.estimate.measure import measure

    return measure(task, _tokenizer(config, run), config)


def _tokenizer(config: Config, run: RunDirectory) -> Any:
    """Return the tokenizer that the stages of this run work with: the SFT model's where it must be there already."""
    from trlhf.models import load_tokenizer
    from trlhf.opening import candidates, open_tokenizer
    from trlhf.sft.templates import base_tokenizer

    if config.stage in ("reward", "rl"):
        return load_tokenizer(run.stage("sft").require("model", made_by="stage=sft"))
    if config.evaluation.model is not None:
        return open_tokenizer(candidates(config, run)[0], config)
    return base_tokenizer(config)


def _sft(config: Config, run: RunDirectory, task: Task) -> None:
    from trlhf.sft.train import train_sft

    train_sft(task.demonstrations, config, run.stage("sft"))


def _reward(config: Config, run: RunDirectory, task: Task) -> None:
    """Buy this stage's labels on uniformly drawn prompts, and train the reward model on them."""
    from trlhf.first_labels import buy_first_labels
    from trlhf.labelling import Archive
    from trlhf.reward.train import train_reward

    stage = run.stage("reward")
    model_dir = run.stage("sft").require("model", made_by="stage=sft")
    archive, labels = Archive(task.pool), list[Label]()
    if task.labelled or task.pairs:
        log.info("%d labels come with the data, so this stage buys none", len(task.labelled) + len(task.pairs))
    elif config.reward.labels:
        with _ledger(config, run) as ledger:
            archive, labels = buy_first_labels(config, stage, model_dir, task.pool, ledger, task.labeler(config))
        let_go()  # of the model that was sampled from: the reward model loads its own
    bought, compared = archive.apply(labels)
    train_reward([*task.labelled, *bought], [*task.pairs, *compared], config, stage, model_dir)


@contextmanager
def _ledger(config: Config, run: RunDirectory) -> Iterator[Ledger]:
    """Open the ledger; when it closes, note what is spent."""
    from trlhf.ledger import Ledger

    with Ledger(run.ledger, config.targeting.budget) as ledger:
        try:
            yield ledger
        finally:
            run.update_summary({"labels": {"budget": ledger.budget, "spent": ledger.spent}})


def _rl(config: Config, run: RunDirectory, task: Task) -> None:
    from trlhf.first_labels import SAMPLES
    from trlhf.labelling import Archive
    from trlhf.models import choose_device
    from trlhf.reward.features import prompt_key
    from trlhf.reward.model import backbone_of
    from trlhf.reward.refit import Refitter
    from trlhf.reward.split import Labels, read_split
    from trlhf.rl.train import RlInputs, train_rl
    from trlhf.roles import load_roles

    sft = run.stage("sft").require("model", made_by="stage=sft")
    reward_dir = run.stage("reward").require("reward.json", made_by="stage=reward").parent
    pool = list(task.pool)
    archive = Archive(pool)
    if (reward_dir / SAMPLES).exists():
        archive.load(reward_dir / SAMPLES)
    sides = read_split(reward_dir)
    held_out = frozenset(prompt.id for prompt in pool if sides.get(prompt_key(prompt)))
    with _ledger(config, run) as ledger:
        roles = keep(load_roles, config, sft, reward_dir, backbone_of(reward_dir), choose_device(config))
        if config.rl.rollout_engine == "vllm":
            from trlhf.vllm_engine import load_engine

            roles.policy.engine = load_engine(config, roles.policy, sft)
        refit = Refitter(reward_dir, config, Labels(task.labelled, task.pairs), roles.reward)
        inputs = RlInputs(
            pool, sft, roles, ledger, task.labeler(config), archive, refit, held_out, refit.forks, refit.liking
        )
        train_rl(config, run.stage("rl"), inputs)


def _eval(config: Config, run: RunDirectory, task: Task) -> None:
    """Evaluate the base and every stage's model that exists, or one other model: held-out prompts, then suites."""
    from trlhf.evaluation.evaluate import Evaluation, compare, describe, evaluate
    from trlhf.evaluation.published import beside
    from trlhf.evaluation.stage import Subject, run_suites
    from trlhf.opening import candidates, open_role, open_tokenizer

    stage = run.stage("eval")
    made, earlier = _made(run), stage.metrics() if stage.done else {}
    stage.reopen()
    results: dict[str, Evaluation] = {}
    suites: dict[str, Any] = {}
    metrics: dict[str, Any] = {"models": {}, "paired": {}, "too_long": len(task.too_long), "made": made}
    for candidate in candidates(config, run):
        name, tokenizer = candidate.name, keep(open_tokenizer, candidate, config)
        role = keep(open_role, candidate, config, tokenizer)
        if _held_out(config):
            with progress(f"eval: {name}", len(task.test)) as advance:
                answered = evaluate(role, tokenizer, task.test, task.test_answers, config.evaluation, advance)
            results[name] = answered.with_unanswered(task.too_long, task.test_answers)
            metrics["models"][name] = describe(results[name], config.evaluation, config.seed)
            stage.write_jsonl(f"samples_{name}.jsonl", results[name].samples(task.test_answers))
        suites[name] = run_suites(Subject(name, role.model, tokenizer, candidate.made), config, stage)
        del role  # before the next is loaded: a model and its cycles would stay beside it
        _let_go()
    names = list(results)
    for before, after in pairwise(names):
        metrics["paired"][f"{before}→{after}"] = compare(
            results[before], results[after], task.taste, config.evaluation.confidence
        )
    if names:
        stage.write_jsonl("samples.jsonl", results[names[-1]].samples(task.test_answers))
    if config.evaluation.suites:
        known = earlier.get("suites", {}) if earlier.get("made") == made else {}
        metrics["suites"] = joined(known, by_task(suites))
        metrics["published"] = beside(metrics["suites"])
    stage.complete(metrics)


def _held_out(config: Config) -> bool:
    """Say whether eval answers the held-out prompts: those of the run's models, and where nothing else is asked."""
    return config.evaluation.model is None or not config.evaluation.suites


def _close(config: Config, run: RunDirectory) -> None:
    """Print what was reached: accuracy by stage with intervals, the paired tests, labels and time."""
    summary = run.summary()
    if CHECK in planned(config):
        from trlhf.contamination.check import print_check

        print_check(run.stage(CHECK).metrics(), run.stage(CHECK).path)
    if "accuracy" in summary:
        print_closing_table(summary, config.evaluation.confidence)
    if "eval" in planned(config) and config.evaluation.suites:
        print_suites(run.stage("eval").metrics(), config.evaluation)
    labels = summary.get("labels")
    if labels:
        log.info("labels: %g of %g spent", labels["spent"], labels["budget"])
    log.info("time: %.0f s in all; results in %s", sum(summary.get("seconds", {}).values()), run.path)
