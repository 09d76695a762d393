"""Command-line overrides into checked configurations. Hydra's objects do not leave this file and ``__main__``."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trlhf.config import Config, build_config, plain
from trlhf.errors import ConfigError, UserError
from trlhf.hardware import look
from trlhf.schema import show

HYDRA_ERRORS = (HydraException, OmegaConfBaseException)
CHECKED_AT_MOST = 100  # combinations of a sweep; each job checks its own again


@dataclass(frozen=True)
class Composed:
    """What a command line means.

    Attributes:
        configs: one configuration, or one for each job of a sweep (the first hundred).
        overrides: the same overrides in the form in which Hydra accepts them all.
    """

    configs: tuple[Config, ...]
    overrides: tuple[str, ...]


def register_schema() -> None:
    """Tell Hydra every key and its default, so that YAML files need to hold only what differs."""
    ConfigStore.instance().store(name="schema", node=plain(Config()))


def compose(overrides: Sequence[str], *, multirun: bool = False, config_dir: str | None = None) -> Composed:
    """Compose and check.

    Args:
        overrides: as on the command line.
        multirun: whether several values of one key make several jobs.
        config_dir: a further folder with YAML files.

    Raises:
        ConfigError: with every problem of every job.
    """
    problems: list[str] = []
    with _hydra() as loader:
        groups = {name: loader.get_group_options(name) for name in loader.list_groups("") if name != "hydra"}
        extra = [] if config_dir is None else [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]
        choices: list[list[str]] = []
        accepted: list[str] = []
        for override in _parse([_template_file(text) for text in overrides], problems):
            grouped = override.key_or_group in groups
            if override.is_sweep_override() and not multirun:
                problems.append(
                    f"{override.input_line}: several values make several runs; add --multirun, or quote the value"
                )
                continue
            if grouped:
                known = groups[override.key_or_group] + _own_choices(config_dir, override.key_or_group)
                texts = list(_group_texts(override, known, problems))
            else:
                texts = list(_value_texts(override))
            if texts:  # without any, there is a problem on the list
                choices.append(texts)
                accepted.append(_normal(override, grouped))
        if machine := _machine(choices, accepted, extra):
            choices = [[text for text in texts if text != "hardware=auto"] for texts in choices]
            choices = [texts for texts in choices if texts] + [[text] for text in machine]
            accepted = [text for text in accepted if text != "hardware=auto"] + machine
        configs: list[Config] = []
        for job in itertools.islice(itertools.product(*choices), CHECKED_AT_MOST):
            values = _values([*extra, *job], problems)
            try:
                configs.append(build_config(values))
            except ConfigError as error:
                problems += error.problems
    problems += _shared_folders(configs)
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return Composed(tuple(configs), tuple(accepted))


def config_of(values: Any) -> Config:
    """Check the configuration that Hydra hands to a job.

    Raises:
        ConfigError: with every problem.
    """
    return build_config(_plain_values(values))


@contextmanager
def _hydra() -> Iterator[ConfigLoader]:
    register_schema()
    shared = GlobalHydra.instance()
    outer = shared.hydra  # the command line's own, while a job of it runs
    shared.clear()
    try:
        with initialize_config_module("trlhf.conf", version_base="1.3"):
            yield GlobalHydra.instance().config_loader()
    finally:
        shared.hydra = outer


def _parse(overrides: Sequence[str], problems: list[str]) -> Iterator[Override]:
    parser = OverridesParser.create()
    for text in overrides:
        try:
            yield parser.parse_override(text)
        except HydraException as error:
            reason = str(error).strip().splitlines()[0].partition(" expecting")[0]
            problems.append(f"{text}: cannot be read ({reason}); write KEY=VALUE, with quotes around odd characters")


def _template_file(text: str) -> str:
    """Let ``template=FILE.jinja`` mean ``template.name=FILE.jinja``."""
    key, _, value = text.partition("=")
    return f"template.name={value}" if key == "template" and value.strip("'\"").endswith(".jinja") else text


def _own_choices(config_dir: str | None, group: str) -> list[str]:
    return [] if config_dir is None else sorted(path.stem for path in Path(config_dir, group).glob("*.yaml"))


def _group_texts(override: Override, known: list[str], problems: list[str]) -> Iterator[str]:
    """Yield ``group=choice`` for each choice that exists."""
    group = override.key_or_group
    if override.is_delete():
        yield override.input_line or ""
        return
    for value in override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]:
        if isinstance(value, str) and value in known:
            yield f"{override.get_key_element().lstrip('+')}={value}"
            continue
        near = difflib.get_close_matches(str(value), known, n=1) if group != "hardware" else []  # gpu is near to cpu
        if value is None:
            remedy = f"choose one, or write ~{group} to do without"
        elif near:
            remedy = f"did you mean {near[0]}?"
        elif group == "hardware":
            remedy = "choose by the memory of your card, or leave hardware out: the machine is looked at"
        elif group in ("model", "template"):
            remedy = f"choose one, or give a name or path of your own as {group}.name={value}"
        else:
            remedy = f"choose one; the values in the group are set as {group}.KEY=VALUE"
        problems.append(f"{group}={show(value)} must be one of {', '.join(known)}; {remedy}")


def _value_texts(override: Override) -> Iterator[str]:
    """Yield ``++key=value`` for each value; forced, so that one unknown key does not hide the next."""
    line = override.input_line or ""
    if override.is_delete() or override.is_hydra_override():
        yield line
    elif override.is_sweep_override():
        key = override.get_key_element().lstrip("+")
        yield from (f"++{key}={value}" for value in override.sweep_string_iterator())
    else:
        yield f"++{line.lstrip('+')}"


def _normal(override: Override, grouped: bool) -> str:
    """Return an override in the form that Hydra accepts whether the key is in the YAML files or not."""
    line = override.input_line or ""
    if override.is_delete() or override.is_hydra_override():
        return line
    return line.lstrip("+") if grouped else f"++{line.lstrip('+')}"


def _machine(choices: Sequence[Sequence[str]], accepted: Sequence[str], extra: Sequence[str]) -> list[str]:
    """Return the overrides that choose the hardware, where neither the command line nor an experiment has chosen it."""
    if any(text.lstrip("~").partition("=")[0] == "hardware" and text != "hardware=auto" for text in accepted):
        return []
    given = {text.lstrip("+").partition("=")[0]: text.partition("=")[2] for text in accepted}
    hardware: Any = {"name": "auto", "device": given.get("hardware.device", "auto")}
    if "experiment" in given or extra:  # which may choose it: only composing tells
        hardware = _values([*extra, *(texts[0] for texts in choices)], []).get("hardware")
    if not isinstance(hardware, dict) or hardware.get("name") != "auto" or "hardware.name" in given:
        return []
    name = "cpu" if hardware.get("device") == "cpu" else look().name
    if name == "auto" or (name == "cpu" and hardware.get("device") == "cuda"):
        return []
    return [f"hardware={name}", "++hardware.automatic=true"]


def _values(overrides: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """Compose one job; when Hydra refuses, name each override that it refuses alone, and go on without them."""
    try:
        return _plain_values(hydra_compose("config", overrides=list(overrides)))
    except UserError as error:
        problems.append(str(error))
        return {}
    except HYDRA_ERRORS as error:
        reason = str(error)
    accepted: list[str] = []
    for text in overrides:
        try:
            hydra_compose("config", overrides=[text])
            accepted.append(text)
        except HYDRA_ERRORS as error:
            problems.append(f"{text.lstrip('+')}: {' '.join(str(error).split())}")
    if len(accepted) == len(overrides):
        problems.append(" ".join(reason.split()))
        return {}
    return _values(accepted, problems)


def _plain_values(config: Any) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "configuration"
        raise UserError(
            f"{key}: the reference in it cannot be resolved ({str(error).splitlines()[0]}); "
            "refer to keys that exist, as in ${seed}"
        ) from error
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def _shared_folders(configs: Sequence[Config]) -> Iterator[str]:
    """Say when two jobs of a sweep would write one folder."""
    folders = [config.run.dir for config in configs if config.run.dir is not None]
    for folder in sorted({name for name in folders if folders.count(name) > 1}):
        yield (
            f"run.dir={folder} is the same for {folders.count(folder)} jobs; leave it out (they go to runs/multirun/), "
            "or let it differ, as in run.dir='runs/seed-${seed}'"
        )
