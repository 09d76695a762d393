"""The stages in order over one run directory, and the table at the end."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from trlhf import __version__
from trlhf.config import Config
from trlhf.console import print_table, progress, setup_logging
from trlhf.run import RunDirectory, RunResult, open_run, planned
from trlhf.seeding import numpy_rng, python_rng, torch_generator

log = logging.getLogger("trlhf")
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "hydra-core", "scipy")


def run_pipeline(config: Config) -> RunResult:
    """Run the stages that ``config.stage`` names and return the run directory with its summary.

    Raises:
        UserError: something that the user can mend; nothing that was finished is lost.
    """
    if config.dry_run:
        from trlhf.plan import print_plan

        print_plan(config)
        return RunResult(Path(), {})
    with open_run(config) as run:
        setup_logging(run.path)
        _prepare_torch(config)
        from trlhf.tasks import load_task

        task = load_task(config)
        for report in task.reports:
            (log.warning if report.dropped else log.info)(report.describe())
        run.update_summary({"seed": config.seed, "versions": _versions()})
        stages: dict[str, Callable[..., None]] = {"sft": _sft, "reward": _reward, "rl": _rl, "eval": _eval}
        for name in planned(config):
            if run.stage(name).done:
                log.info("stage %s is complete already", name)
                continue
            log.info("stage %s", name)
            start = time.monotonic()
            stages[name](config, run, task)
            _add_seconds(run, name, time.monotonic() - start)
        _close(config, run)
        return RunResult(run.path, run.summary())


def _prepare_torch(config: Config) -> None:
    import torch

    from trlhf.allocator import keep_freed_memory

    keep_freed_memory()
    if config.hardware.threads:
        torch.set_num_threads(config.hardware.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic: Any = torch.utils.deterministic  # the setting is not in its stubs
    deterministic.fill_uninitialized_memory = False  # nothing here reads memory that it did not write


def _versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}
    return {"python": platform.python_version(), "trlhf": __version__, **versions}


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _add_seconds(run: RunDirectory, name: str, seconds: float) -> None:
    """Add to what an earlier, interrupted process may have spent on the stage."""
    before = run.summary().get("seconds", {}).get(name, 0.0)
    run.update_summary({"seconds": {name: round(before + seconds, 2)}})


def _sft(config: Config, run: RunDirectory, task: Any) -> None:
    from trlhf.sft.train import train_sft

    metrics = train_sft(task.demonstrations, config, run.stage("sft"))
    run.update_summary({"demonstrations": metrics["demonstrations"]})


def _reward(config: Config, run: RunDirectory, task: Any) -> None:
    """Buy this stage's labels on uniformly drawn prompts, and train the reward model on them."""
    from trlhf.knowledge import Knowledge
    from trlhf.labelling import Archive
    from trlhf.ledger import Ledger
    from trlhf.models import choose_device, load_causal_lm, load_tokenizer
    from trlhf.reward.train import train_reward
    from trlhf.rollout import Sampling, sample_responses
    from trlhf.targeting import Candidate, choose_pairs, choose_verdicts

    stage = run.stage("reward")
    model_dir = run.stage("sft").require("model", made_by="stage=sft")
    pool = task.answerable(config)
    archive = Archive(pool)
    labels = []
    if config.reward.labels and not task.labelled and not task.pairs:
        tokenizer = load_tokenizer(model_dir)
        model = load_causal_lm(model_dir, config.model, choose_device(config))
        open_share = config.targeting.preference_share
        pairs_wanted = round(config.reward.labels * open_share) if any(p.task == "open" for p in pool) else 0
        rng = python_rng(config.seed, "reward", "prompts")
        shuffled = rng.sample(pool, len(pool))
        verdicts_wanted = config.reward.labels - pairs_wanted
        drawn = [p for p in shuffled if p.task == "exact"][
            : verdicts_wanted + verdicts_wanted // 4
        ]  # some have no answer
        drawn += [p for p in shuffled if p.task == "open"][: pairs_wanted + pairs_wanted // 4]
        sampling = Sampling(
            config.rl.temperature,
            config.rl.max_new_tokens,
            config.reward.samples_per_prompt,
            config.evaluation.batch_size,
        )
        with progress("reward: sampling responses to label", len(drawn)) as advance:
            sampled = sample_responses(
                model, tokenizer, drawn, sampling, torch_generator(config.seed, "reward", "rollouts"), advance
            )
        candidates = [Candidate(p, tuple(rollouts)) for p, rollouts in zip(drawn, sampled, strict=True)]
        draw = numpy_rng(config.seed, "reward", "choose")
        questions = choose_pairs(candidates, pairs_wanted, draw)
        questions += choose_verdicts(candidates, Knowledge(), config.reward.labels - len(questions), None, 2, draw)
        asked = {question.prompt.id for question in questions}
        for candidate in candidates:
            if candidate.prompt.id in asked:
                archive.add(candidate.rollouts)
        stage.write_jsonl("labelled_samples.jsonl", archive.rows())
        with Ledger(run.ledger, config.targeting.budget) as ledger:
            labels = ledger.ask(questions, task.labeler(config))
            _note_labels(run, ledger)
    bought, compared = archive.apply(labels)
    report = train_reward([*task.labelled, *bought], [*task.pairs, *compared], config, stage, model_dir)
    run.update_summary({"reward": {"held_out": report["held_out"]}})


def _rl(config: Config, run: RunDirectory, task: Any) -> None:
    from trlhf.labelling import Archive
    from trlhf.ledger import Ledger
    from trlhf.rl.train import RlInputs, train_rl

    sft = run.stage("sft").require("model", made_by="stage=sft")
    reward_dir = run.stage("reward").require("reward.json", made_by="stage=reward").parent
    pool = task.answerable(config)
    archive = Archive(pool)
    samples = reward_dir / "labelled_samples.jsonl"
    if samples.exists():
        archive.load(samples)
    with Ledger(run.ledger, config.targeting.budget) as ledger:
        inputs = RlInputs(
            pool, sft, reward_dir / "model", ledger, task.labeler(config), archive, _refitter(config, reward_dir, task)
        )
        train_rl(config, run.stage("rl"), inputs)
        _note_labels(run, ledger)


def _refitter(config: Config, reward_dir: Path, task: Any) -> Callable[[Sequence[Any], Sequence[Any]], Any]:
    """Return what refits the heads of the saved reward model on a larger set of labels, its backbone as it is."""
    from trlhf.models import choose_device
    from trlhf.reward.calibration import calibrate
    from trlhf.reward.fit import fit, fit_settings
    from trlhf.reward.model import RewardModel
    from trlhf.reward.split import Labels, split_by_prompt

    def refit(labelled: Sequence[Any], pairs: Sequence[Any]) -> RewardModel:
        model = RewardModel.load(reward_dir, config.model, choose_device(config))
        labels = Labels([*task.labelled, *labelled], [*task.pairs, *pairs])
        training, held = split_by_prompt(labels, config.reward.holdout, config.seed)
        fit(model, training.responses, training.pairs, replace(fit_settings(config), finetune="frozen"))
        calibrate(model, held.responses, held.pairs)
        return model

    return refit


def _note_labels(run: RunDirectory, ledger: Any) -> None:
    run.update_summary({"labels": {"budget": ledger.budget, "spent": ledger.spent}})


def _eval(config: Config, run: RunDirectory, task: Any) -> None:
    """Evaluate the base and every stage's model that exists, on the same prompts."""
    from trlhf.errors import UserError
    from trlhf.evaluation.evaluate import Evaluation, compare, describe, evaluate
    from trlhf.models import choose_device, load_causal_lm, load_tokenizer, model_path
    from trlhf.sft.templates import apply_template

    stage = run.stage("eval")
    folders: dict[str, str] = {"base": model_path(config.model.name)}
    folders |= {name: str(run.stage(name).path / "model") for name in ("sft", "rl") if run.stage(name).done}
    if len(folders) == 1 and config.stage == "all":
        raise UserError(f"{run.path}: there is no model to evaluate; run stage=sft first")
    results: dict[str, Evaluation] = {}
    metrics: dict[str, Any] = {"models": {}, "paired": {}}
    for name, folder in folders.items():
        tokenizer = load_tokenizer(
            folder, pad_token=config.model.pad_token, revision=config.model.revision if name == "base" else None
        )
        if name == "base":
            apply_template(tokenizer, config.template)
        model = load_causal_lm(folder, config.model, choose_device(config))
        with progress(f"eval: {name}", len(task.test)) as advance:
            results[name] = evaluate(model, tokenizer, task.test, task.test_answers, config.evaluation, advance)
        metrics["models"][name] = describe(results[name], config.evaluation, config.seed)
        stage.write_jsonl(f"samples_{name}.jsonl", results[name].samples(task.test_answers))
    names = list(results)
    for before, after in pairwise(names):
        metrics["paired"][f"{before}→{after}"] = compare(
            results[before], results[after], task.taste, config.evaluation.confidence
        )
    stage.write_jsonl("samples.jsonl", results[names[-1]].samples(task.test_answers))
    stage.complete(metrics)
    run.update_summary(
        {
            "accuracy": {name: entry["accuracy"] for name, entry in metrics["models"].items()},
            "by_kind": {name: entry["by_kind"] for name, entry in metrics["models"].items()},
            "plans": {name: entry["plans"] for name, entry in metrics["models"].items()},
            "paired": metrics["paired"],
        }
    )


def _close(config: Config, run: RunDirectory) -> None:
    """Print what was reached: accuracy by stage with intervals, the paired tests, labels and time."""
    summary = run.summary()
    seconds = summary.get("seconds", {})
    if "accuracy" in summary:
        paired = {key.split("→")[1]: value for key, value in summary.get("paired", {}).items()}
        rows = []
        for name, accuracy in summary["accuracy"].items():
            test = paired.get(name, {})
            mcnemar, win = test.get("mcnemar"), test.get("win_rate")
            plans = summary["plans"][name]
            rows.append(
                (
                    name,
                    f"{accuracy['value']:.1%} [{accuracy['low']:.1%}, {accuracy['high']:.1%}]" if accuracy else "–",
                    f"+{mcnemar['gained']} / -{mcnemar['lost']}, p = {mcnemar['p']:.2g}" if mcnemar else "–",
                    f"{plans['reasoning']['value']:.0%} / {plans['other']['value']:.0%}"
                    if plans["reasoning"] and plans["other"]
                    else "–",
                    f"{win['value']:.0%} [{win['low']:.0%}, {win['high']:.0%}]" if win else "–",
                    f"{seconds.get(name, 0):.0f} s" if name in seconds else "–",
                )
            )
        first = next(iter(summary["accuracy"].values()))
        title = f"Accuracy at temperature 0, zero-shot, {first['n'] if first else 0} held-out reasoning prompts"
        columns = (
            "stage",
            f"accuracy [{config.evaluation.confidence:.0%}]",
            "against the stage before",
            "plans: reasoning / other",
            "taste: win rate",
            "time",
        )
        print_table(title, columns, rows)
    labels = summary.get("labels")
    if labels:
        log.info("labels: %g of %g spent", labels["spent"], labels["budget"])
    log.info("time: %.0f s in all; results in %s", sum(seconds.values()), run.path)
