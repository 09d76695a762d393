"""Which values a result depends on, and whether they are still the same. No torch here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trlhf.config import Config

# Keys (or whole groups) that a stage's result depends on; later stages' keys, the hardware and the folder are free.
_SAMPLING = ("seed", "model", "data.name", "data.path", "data.pool", "data.pool_prompts", "template")
RELEVANT = {
    "sft": ("seed", "model", "data.name", "data.path", "data.sft", "data.sft_prompts", "template", "sft"),
    "reward": (*_SAMPLING, "data.labels", "reward", "labeler"),
    "rl": (*_SAMPLING, "rl", "targeting", "labeler"),
    "eval": ("model", "data.name", "data.path", "data.test", "data.test_prompts", "template", "evaluation"),
}


def fingerprint(config: Config) -> str:
    """Return a digest of every value of a configuration except the folder it runs in."""
    from trlhf.config import plain

    values = plain(config)
    del values["run"], values["dry_run"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def differences(stage: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return ``key was …, now …`` for every value that matters to a stage and is no longer the same."""
    was, now = dict(_flat(old)), dict(_flat(new))
    return [
        f"{key} was {was.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(was.keys() | now.keys())
        if _relevant(key, stage) and was.get(key) != now.get(key)
    ]


def _relevant(key: str, stage: str) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in RELEVANT[stage])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
