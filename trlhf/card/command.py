"""A configuration as the command line that makes it again. No torch here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trlhf.config import Config, SourceConfig, plain
from trlhf.errors import ConfigError

# What says where a run lies and what is done with its results, but not what they are.
APART = ("run", "card", "push", "dry_run", "experiment")
_PLAIN = re.compile(r"[A-Za-z_./][\w./:@-]*")
_RESERVED = {"true", "false", "null", "nan", "inf"}


def command_of(config: Config, stage: str) -> str:
    """Return ``python -m trlhf …`` with every value that differs from what the command would take by itself.

    Files and folders are given by the last part of their paths: the folders above them are nobody else's business.

    Args:
        config: of the run.
        stage: whose model it is; the command goes on to ``rl`` through every stage before it.
    """
    whole = replace(config, stage="sft" if stage == "sft" else "all")
    return shlex.join(["python", "-m", "trlhf", *overrides_of(whole, public=True)])


def overrides_of(config: Config, *, public: bool = False) -> list[str]:
    """Return the shortest overrides that compose to a configuration, `APART` from what is not part of a recipe.

    Args:
        config: of a run.
        public: leave out the folders above files and folders.
    """
    from trlhf.compose import compose

    found: list[list[str]] = []
    for start in ([], [f"experiment={config.experiment}"]) if config.experiment else ([],):
        try:
            base = compose(start).configs[0]
        except ConfigError:  # a recipe from a folder of the user's own
            continue
        changed = _changes(plain(base), plain(config))
        found.append(start + [f"{key}={_written(_public(value) if public else value)}" for key, value in changed])
    return min(found, key=len)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in new.items():
        if not prefix and name in APART:
            continue
        if isinstance(value, Mapping):
            before = old[name] if name in old else asdict(SourceConfig())  # a data set that is new in the mixture
            yield from _changes(before, value, f"{prefix}{name}.")
        elif value != old[name]:
            yield f"{prefix}{name}", value
    yield from ((f"{prefix}{name}", None) for name in old if name not in new)  # a data set that was taken out


def _public(value: Any) -> Any:
    if isinstance(value, list):
        return [_public(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _written(value: Any) -> str:
    """Return a value in the grammar of Hydra's overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if not isinstance(value, str) or (_PLAIN.fullmatch(value) and value.lower() not in _RESERVED):
        return str(value)
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)$", r"\1\1", value)) + "'"
