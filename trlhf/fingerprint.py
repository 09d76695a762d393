"""Which values a result depends on, and whether they are still the same. No torch here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trlhf.config import Config

# Keys (or whole groups) that the result of each stage, in order, depends on.
_SAMPLING = (
    *("seed", "model", "data.name", "data.path", "data.pool", "data.pool_prompts", "data.labels", "template"),
    "data.decontaminate",
)
_BASE = ("model.name", "model.revision", "data.name", "data.path", "template")
_EVAL_MODEL = ("model.dtype", "model.max_length", "model.pad_token")
RELEVANT = {
    "check": ("seed", "data", "check", "reward.max_labelled"),
    "sft": (
        *("seed", "model", "template", "sft"),
        *("data.name", "data.path", "data.sft", "data.mixture", "data.filters", "data.sft_prompts"),
        "data.decontaminate",
    ),
    "reward": (
        *(*_SAMPLING, "reward", "labeler"),
        *("rl.temperature", "rl.max_new_tokens", "rl.rollout_batch_size"),  # how it samples: a batch shares its draws
        "rl.draws",
        "targeting.preference_share",  # what it buys
    ),
    "rl": (*_SAMPLING, "rl", "targeting", "labeler"),
    "eval": ("seed", *_BASE, *_EVAL_MODEL, "data.test", "data.test_prompts", "evaluation"),
}
# What the stages learn from.
DATA = tuple(f"data.{name}" for name in ("name", "path", "sft", "sft_prompts", "pool", "pool_prompts", "labels"))
# One draw splits GSM8K, so that no part shares a question with another: every stage depends on all of its counts.
ONE_DRAW = {"gsm8k": ("seed", "data.sft_prompts", "data.pool_prompts", "data.test_prompts")}
# How much is done at a time, and how often the state is saved: free to change, after running out of memory, say.
FREE = (
    *("sft.microbatch_size", "reward.microbatch_size", "rl.microbatch_size", "evaluation.batch_size"),
    "model.gradient_checkpointing",
    *("sft.save_steps", "rl.save_steps", "sft.save_total_limit", "rl.save_total_limit"),
    *("evaluation.suites", "evaluation.tasks", "evaluation.mirror", "evaluation.file"),  # each task is saved by itself
    *("evaluation.judge.timeout", "evaluation.judge.retries", "evaluation.judge.backoff"),
    *("evaluation.judge.concurrency", "evaluation.judge.url", "evaluation.judge.key_env"),
)


def fingerprint(config: Config) -> str:
    """Return a digest of every value of a configuration except the folder it runs in."""
    from trlhf.config import plain

    values = plain(config)
    del values["run"], values["dry_run"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def differences(stage: str, running: Sequence[str], old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return ``key was …, now …`` for every value that keeps a stage's results from going with what is to be run.

    An earlier stage's results must be what this configuration would make; a later one's must rest on the same earlier
    ones. ``eval`` needs of the models that it compares no more than that they come from one base and one source of
    questions, and no other stage rests on it.

    Args:
        stage: whose results are there.
        running: the stages that are to be run.
        old: the configuration that the results were made with.
        new: the configuration now.
    """
    from trlhf.config import Config, plain

    defaults = dict(_flat(plain(Config())))  # what a key that was not there yet stood for
    was, now = defaults | dict(_flat(old)), dict(_flat(new))
    keys = {key for name in running for key in _shared(stage, name)}
    if keys:
        keys.update(ONE_DRAW.get(str(was.get("data.name")), ()))
    return [
        f"{key} was {was.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(was.keys() | now.keys())
        if key not in FREE and _within(key, keys) and was.get(key) != now.get(key)
    ]


def _shared(stage: str, running: str) -> tuple[str, ...]:
    """Return the keys in which the results of one stage must agree with the run of another (or the same)."""
    if stage == running:
        return RELEVANT[stage]
    if "check" in (stage, running):  # it tells of the data that a stage learns from, and of nothing else in it
        learned = RELEVANT[stage if running == "check" else running] if "eval" not in (stage, running) else ()
        return tuple(key for key in learned if key == "seed" or key in DATA)
    if "eval" in (stage, running):
        return _BASE if running == "eval" else ()
    return RELEVANT[min(stage, running, key=list(RELEVANT).index)]


def _within(key: str, prefixes: Iterable[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
