"""The stages in order over one run directory, and the table at the end."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlhf import __version__
from trlhf.admission import open_run
from trlhf.allocator import keep_freed_memory, let_go
from trlhf.closing import news_of, print_closing_table
from trlhf.config import Config
from trlhf.console import progress, quiet_libraries, setup_logging
from trlhf.hardware import say
from trlhf.plan import announce_memory, print_plan
from trlhf.preemption import watch
from trlhf.run import RunDirectory, RunResult, planned
from trlhf.types import Label, RowReport

if TYPE_CHECKING:
    from trlhf.estimate.lengths import Lengths
    from trlhf.ledger import Ledger
    from trlhf.tasks import Task

log = logging.getLogger("trlhf")
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "hydra-core", "scipy")


def run_pipeline(config: Config) -> RunResult:
    """Run the stages that ``config.stage`` names and return the run directory with its summary.

    Raises:
        UserError: something that the user can mend; nothing that was finished is lost.
        Preempted: SIGTERM came; the same call goes on from what is on disk.
    """
    if config.dry_run:
        print_plan(config)
        return RunResult(Path(), {})
    with watch(), open_run(config) as run:
        setup_logging(run.path)
        _prepare_torch(config)
        log.info(say(config))
        from trlhf.tasks import load_task

        task = load_task(config)
        _tell(task.reports)
        if todo := [name for name in planned(config) if not _up_to_date(run, name)]:
            task = _fit(config, run, task, todo)
            announce_memory(config, _lengths(config, run, task), _free_memory(config))
        run.update_summary({"seed": config.seed, "versions": _versions()})
        stages: dict[str, Callable[..., None]] = {"sft": _sft, "reward": _reward, "rl": _rl, "eval": _eval}
        for name in planned(config):
            complete = _up_to_date(run, name)
            log.info("stage %s is complete already" if complete else "stage %s", name)
            if complete and not run.interrupted(name):
                continue
            with run.clock(name):
                if not complete:
                    stages[name](config, run, task)
                    let_go()
                run.stage(name).tidy()
                run.update_summary(news_of(name, run.stage(name).metrics()))
        _close(config, run)
        return RunResult(run.path, run.summary())


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


def _versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}
    return {"python": platform.python_version(), "trlhf": __version__, **versions}


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _tell(reports: Sequence[RowReport]) -> None:
    for report in reports:
        (log.warning if report.dropped else log.info)(report.describe())


def _up_to_date(run: RunDirectory, name: str) -> bool:
    """Say whether a stage is complete; ``eval`` is so only for the models that there were."""
    stage = run.stage(name)
    return stage.done and (name != "eval" or stage.metrics().get("made") == _made(run))


def _made(run: RunDirectory) -> dict[str, str]:
    """Return when each model that ``eval`` compares with the base was made."""
    return {name: made for name in ("sft", "rl") if (made := run.stage(name).made) is not None}


def _fit(config: Config, run: RunDirectory, task: Task, todo: Sequence[str]) -> Task:
    """Leave out, before anything is trained, the prompts that leave no room for a response."""
    from trlhf.fitting import fit_task

    if list(todo) == ["sft"]:
        return task
    task = fit_task(task, config, _tokenizer(config, run), todo)
    _tell(task.reports)
    return task


def _lengths(config: Config, run: RunDirectory, task: Task) -> Lengths:
    from trlhf.estimate.measure import measure

    return measure(task, _tokenizer(config, run), config)


def _tokenizer(config: Config, run: RunDirectory) -> Any:
    """Return the tokenizer that the stages of this run work with: the SFT model's where it must be there already."""
    from trlhf.models import load_tokenizer

    if config.stage in ("reward", "rl"):
        return load_tokenizer(run.stage("sft").require("model", made_by="stage=sft"))
    return _base_tokenizer(config)


def _base_tokenizer(config: Config) -> Any:
    from trlhf.models import load_tokenizer, model_path
    from trlhf.sft.templates import apply_template

    model = config.model
    tokenizer = load_tokenizer(model_path(model.name), pad_token=model.pad_token, revision=model.revision)
    return apply_template(tokenizer, config.template)


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
        roles = load_roles(config, sft, reward_dir, backbone_of(reward_dir), choose_device(config))
        refit = Refitter(reward_dir, config, Labels(task.labelled, task.pairs), roles.reward)
        inputs = RlInputs(
            pool, sft, roles, ledger, task.labeler(config), archive, refit, held_out, refit.forks, refit.liking
        )
        train_rl(config, run.stage("rl"), inputs)


def _eval(config: Config, run: RunDirectory, task: Task) -> None:
    """Evaluate the base and every stage's model that exists, on the same prompts."""
    from trlhf.errors import UserError
    from trlhf.evaluation.evaluate import Evaluation, compare, describe, evaluate
    from trlhf.models import choose_device, load_causal_lm, load_tokenizer, model_path

    stage = run.stage("eval")
    stage.reopen()
    folders: dict[str, str] = {"base": model_path(config.model.name)}
    folders |= {name: str(run.stage(name).path / "model") for name in ("sft", "rl") if run.stage(name).done}
    if len(folders) == 1 and config.stage == "all":
        raise UserError(f"{run.path}: there is no model to evaluate; run stage=sft first")
    results: dict[str, Evaluation] = {}
    metrics: dict[str, Any] = {"models": {}, "paired": {}, "too_long": len(task.too_long), "made": _made(run)}
    for name, folder in folders.items():
        tokenizer = _base_tokenizer(config) if name == "base" else load_tokenizer(folder)
        model = load_causal_lm(folder, config.model, choose_device(config))
        with progress(f"eval: {name}", len(task.test)) as advance:
            answered = evaluate(model, tokenizer, task.test, task.test_answers, config.evaluation, advance)
        del model  # before the next is loaded: a model and its cycles would stay beside it
        let_go()
        results[name] = answered.with_unanswered(task.too_long, task.test_answers)
        metrics["models"][name] = describe(results[name], config.evaluation, config.seed)
        stage.write_jsonl(f"samples_{name}.jsonl", results[name].samples(task.test_answers))
    names = list(results)
    for before, after in pairwise(names):
        metrics["paired"][f"{before}→{after}"] = compare(
            results[before], results[after], task.taste, config.evaluation.confidence
        )
    stage.write_jsonl("samples.jsonl", results[names[-1]].samples(task.test_answers))
    stage.complete(metrics)


def _close(config: Config, run: RunDirectory) -> None:
    """Print what was reached: accuracy by stage with intervals, the paired tests, labels and time."""
    summary = run.summary()
    if "accuracy" in summary:
        print_closing_table(summary, config.evaluation.confidence)
    labels = summary.get("labels")
    if labels:
        log.info("labels: %g of %g spent", labels["spent"], labels["budget"])
    log.info("time: %.0f s in all; results in %s", sum(summary.get("seconds", {}).values()), run.path)
