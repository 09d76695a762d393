"""``dry_run=true``: what a run would do, and what memory it would need. No torch here."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace

from trlhf.checks import labels_come_with
from trlhf.config import Config, ModelConfig
from trlhf.console import CONSOLE
from trlhf.estimate.lengths import Lengths, longest_possible
from trlhf.estimate.measure import at_hand, read_lengths
from trlhf.estimate.memory import Job
from trlhf.estimate.remedies import needed, remedies
from trlhf.estimate.report import print_estimate
from trlhf.estimate.shape import shape_of
from trlhf.evaluation.suites import chosen_tasks
from trlhf.hardware import GIB, say
from trlhf.hardware_checks import missing_packages
from trlhf.run import planned
from trlhf.schema import show

log = logging.getLogger("trlhf")
LEARNING = {"sft", "reward", "rl", "eval"}  # the stages that load models


def job_of(config: Config, lengths: Lengths) -> Job | None:
    """Return what the estimate of a run depends on; None where the model's sizes are not known."""
    shape = shape_of(_loaded(config))
    device = "cuda" if config.hardware.device == "cuda" else "cpu"
    return None if shape is None else Job(config, shape, lengths, device, int(os.environ.get("WORLD_SIZE") or 1))


def print_plan(config: Config) -> None:
    """Print what would be done and what memory it would take."""
    rl = config.rl
    CONSOLE.print(f"[bold]plan[/bold] (dry_run=true: nothing is started){_named(config)}")
    for line in (
        say(config),
        f"stages: {', '.join(planned(config) or (config.stage,))}; seed {config.seed}; "
        f"results in {config.run.dir or 'runs/<date>'}",
        f"model: {config.model.name}, {config.model.dtype}, "
        + ("NF4 base, " if config.model.quantization == "nf4" else "")
        + (f"LoRA r={config.model.lora.r}" if config.model.lora.enabled else "all weights trained")
        + f", attention {config.model.attention}"
        + (", gradient checkpointing" if config.model.gradient_checkpointing else "")
        + f", context {config.model.max_length} tokens, template {config.template.name}",
        f"data: {config.data.name}; at most {config.data.sft_prompts or 'all'} demonstrations, "
        f"{config.data.pool_prompts or 'all'} pool prompts, {config.data.test_prompts or 'all'} test prompts",
        f"labels: {config.targeting.budget} at most, {_labels_of_the_reward_stage(config)}; "
        f"labeler {config.labeler.name}; labels by {config.targeting.acquisition}, update {config.targeting.update}",
        f"rl: {rl.algorithm}, {rl.rounds} rounds of {rl.steps_per_round} steps, "
        f"{rl.prompts_per_step} prompts x {rl.samples_per_prompt} samples a step",
        *_mixture(config),
        *_suites(config),
    ):
        CONSOLE.print("  " + line, highlight=False, markup=False)
    for key, value, package, remedy in missing_packages(config):
        CONSOLE.print(
            f"  missing here: the package {package}, for {key}={value}; {remedy}", highlight=False, markup=False
        )
    if not set(planned(config)) & LEARNING:
        CONSOLE.print("  memory: no model is loaded", highlight=False)
        return
    lengths = read_lengths(config) if at_hand(config) else longest_possible(config)
    job = job_of(config, lengths)
    if job is None:
        CONSOLE.print(
            f"  memory: not estimated, the sizes of {_loaded(config).name} are not known here",
            highlight=False,
            markup=False,
        )
    else:
        print_estimate(job)


def announce_memory(config: Config, lengths: Lengths, free: float | None) -> None:
    """Say before anything is loaded what the run will need at most, and what to change where that is not there.

    Args:
        config: of the run.
        lengths: of the data that it reads.
        free: bytes that are free where it will run; None: not known.
    """
    job = job_of(config, lengths)
    if job is None:
        return
    stage, most = needed(job)
    log.info(
        "memory: about %.1f GiB at most (stage %s, %s); dry_run=true shows what takes it",
        most / GIB, stage, lengths.source,
    )  # fmt: skip
    if free is not None and most > free:
        ways = [remedy.change for remedy in remedies(job)][:3]
        advice = f"what saves most: {', '.join(ways)}" if ways else "nothing that could be changed saves much"
        log.warning("memory: only %.1f GiB are free, so it may not fit; %s", free / GIB, advice)


def _labels_of_the_reward_stage(config: Config) -> str:
    if not labels_come_with(config.data):
        return f"{config.reward.labels} of them for the reward stage"
    some = f" ({config.reward.max_labelled} at most)" if config.reward.max_labelled else ""
    return f"none of them for the reward stage, which takes those that come with the data{some}"


def _named(config: Config) -> str:
    return f" experiment {config.experiment}" if config.experiment else ""


def _suites(config: Config) -> list[str]:
    """Return a line on the suites, where there are some and they are asked."""
    chosen = chosen_tasks(config.evaluation.suites, config.evaluation.tasks)
    if not chosen or "eval" not in planned(config):
        return []
    named = ", ".join(f"{suite.name} ({', '.join(task.name for task in tasks)})" for suite, tasks in chosen)
    return [f"suites: {named}; for {config.evaluation.model or 'the base and every model of the run'}"]


def _loaded(config: Config) -> ModelConfig:
    """Return the model section, with the model's name that is really loaded."""
    return config.model if config.evaluation.model is None else replace(config.model, name=config.evaluation.model)


def _mixture(config: Config) -> Iterator[str]:
    """Yield a line on the data sets of a mixture, and one on the filters."""
    sources = [
        f"{name} ({source.path}"
        + (f", at most {source.cap}" if source.cap else "")
        + (f", x {source.weight:g})" if source.weight != 1 else ")")
        for name, source in config.data.mixture.items()
    ]
    if sources:
        yield f"mixture: {', '.join(sources)}"
    filters = [f"{name}={show(value)}" for name, value in vars(config.data.filters).items() if value]
    if filters:
        yield f"filters: {', '.join(filters)}"
