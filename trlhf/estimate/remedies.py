"""What to change when memory is short: every remedy tried on the estimate itself, the one that saves most first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from trlhf.config import Config, check
from trlhf.estimate.memory import Job, peaks
from trlhf.estimate.stages import phases_of

CONTEXT = 0.5 * 2**30  # bytes that CUDA and its libraries take on a card (0.3 to 0.6 GiB)
HOLES = 0.05  # of the rest: what torch's allocator cannot hand out again, since no block fits
LIBRARIES = 0.6e9  # bytes that Python with all libraries takes in main memory


@dataclass(frozen=True)
class Remedy:
    """A change, what it saves of the largest stage's memory in bytes, and what the run needs then."""

    change: str
    saved: float
    needed: float


def needed(job: Job) -> tuple[str, float]:
    """Return the stage that needs most and how much, with what lies beside the estimate's parts, in bytes."""
    largest = max(peaks(phases_of(job)).items(), key=lambda item: item[1].total)
    stage, total = largest[0], largest[1].total
    return stage, total + LIBRARIES if job.device == "cpu" else total * (1 + HOLES) + CONTEXT


def remedies(job: Job) -> list[Remedy]:
    """Return the changes that lower the need of the largest stage, by what they save."""
    before = needed(job)[1]
    found = []
    for change, config in _changes(job.config):
        if check(replace(config, dry_run=True)):
            continue
        after = needed(replace(job, config=config))[1]
        if before - after > 0.005 * before:
            found.append(Remedy(change, before - after, after))
    return sorted(found, key=lambda remedy: -remedy.saved)


def _changes(config: Config) -> Iterator[tuple[str, Config]]:
    """Yield each change as it is typed, and the configuration with it."""
    model = config.model
    if not model.lora.enabled:
        lora = replace(model, lora=replace(model.lora, enabled=True))
        reward = replace(config.reward, finetune="lora" if config.reward.finetune == "full" else config.reward.finetune)
        text = "model.lora.enabled=true" + (" reward.finetune=lora" if config.reward.finetune == "full" else "")
        yield text, replace(config, model=lora, reward=reward)
    elif model.quantization == "none":
        yield "model.quantization=nf4", replace(config, model=replace(model, quantization="nf4"))
    if model.dtype == "float32":
        yield "model.dtype=bfloat16", replace(config, model=replace(model, dtype="bfloat16"))
    if not model.gradient_checkpointing:
        changed = replace(config, model=replace(model, gradient_checkpointing=True))
        yield "model.gradient_checkpointing=true", changed
    for group, key, least in (
        ("sft", "microbatch_size", 1),
        ("reward", "microbatch_size", 1),
        ("rl", "microbatch_size", 1),
        ("rl", "rollout_batch_size", config.rl.samples_per_prompt),
        ("evaluation", "batch_size", 1),
    ):
        section: Any = getattr(config, group)
        size = getattr(section, key) // 2
        if size >= least and (key != "microbatch_size" or getattr(section, key) % 2 == 0):
            changed = replace(config, **{group: replace(section, **{key: size})})
            yield f"{group}.{key}={size}", changed
