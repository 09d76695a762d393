"""Plain nested mappings into frozen dataclasses, with *all* problems collected. No torch, no omegaconf."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, TypeVar, cast

T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """The range of a number and what to do when a value leaves it.

    Attributes:
        low: smallest allowed value.
        high: largest allowed value.
        above: values must be greater than this.
        below: values must be smaller than this.
        remedy: what the user should do, in place of the general advice.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    remedy: str | None = None

    def broken_by(self, value: float) -> bool:
        """Say whether the value is out of range."""
        return (
            (self.low is not None and value < self.low)
            or (self.high is not None and value > self.high)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
        )

    def describe(self) -> str:
        """Return the range in words."""
        parts = [
            f"{words} {bound:g}"
            for words, bound in (
                ("at least", self.low),
                ("greater than", self.above),
                ("at most", self.high),
                ("smaller than", self.below),
            )
            if bound is not None
        ]
        return " and ".join(parts)


def setting(
    default: T,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    remedy: str | None = None,
) -> T:
    """Declare a dataclass field with its default and its range (see :class:`Rule`)."""
    metadata = {"rule": Rule(low, high, above, below, remedy)}
    if isinstance(default, list):
        made: Any = field(default_factory=lambda: list(default), metadata=metadata)
    else:
        made = field(default=default, metadata=metadata)
    return cast(T, made)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the dotted keys it is about, and a sentence with value, rule and remedy."""

    keys: tuple[str, ...]
    text: str


def build(cls: type[T], values: Mapping[str, Any]) -> tuple[T, list[Problem]]:
    """Build a dataclass of dataclasses; a value that is refused keeps its default and becomes a problem."""
    problems: list[Problem] = []
    known = tuple(leaf_keys(cls))
    made: T = _build(cls, values, "", known, problems)
    return made, problems


def leaf_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every value in a dataclass of dataclasses."""
    for name, kind in _kinds(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from leaf_keys(cast(type, kind), f"{prefix}{name}.")
        else:
            yield prefix + name


def show(value: object) -> str:
    """Write a value as it would stand on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


@cache
def _kinds(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {item.name: hints[item.name] for item in dataclasses.fields(cls)}


def _build(cls: type, values: Mapping[str, Any], prefix: str, known: tuple[str, ...], problems: list[Problem]) -> Any:
    kinds = _kinds(cls)
    rules = {item.name: item.metadata.get("rule") for item in dataclasses.fields(cls)}
    chosen: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        kind = kinds.get(str(name))
        if kind is None:
            problems.append(Problem((key,), _unknown(key, value, known)))
        elif not (dataclasses.is_dataclass(kind) or typing.get_origin(kind) is dict):
            _accept(key, kind, rules[name], value, chosen, problems)
        elif not isinstance(value, Mapping):
            problems.append(
                Problem((key,), f"{key}={show(value)} must be a group of values; set the values in it, {key}.…=…")
            )
        elif dataclasses.is_dataclass(kind):
            chosen[name] = _build(cast(type, kind), value, f"{key}.", known, problems)
        else:
            chosen[name] = _named(typing.get_args(kind)[1], value, f"{key}.", known, problems)
    return cls(**chosen)


def _named(
    cls: type, values: Mapping[str, Any], prefix: str, known: tuple[str, ...], problems: list[Problem]
) -> dict[str, Any]:
    """Build the groups of a dictionary, whose names are the user's; null takes one out."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            found[str(name)] = _build(cls, value, f"{key}.", (*known, *leaf_keys(cls, f"{key}.")), problems)
        elif value is not None:
            problems.append(
                Problem((key,), f"{key}={show(value)} must be a group of values; set the values in it, {key}.…=…")
            )
    return found


def _accept(
    key: str, kind: Any, rule: Rule | None, value: object, chosen: dict[str, Any], problems: list[Problem]
) -> None:
    name = key.rpartition(".")[2]
    fitted, expected = _fit(kind, value)
    if expected is not None:
        problems.append(Problem((key,), f"{key}={show(value)} must be {expected}"))
    elif rule is not None and isinstance(fitted, (int, float)) and rule.broken_by(fitted):
        remedy = f": {rule.remedy}" if rule.remedy else "; give a value in that range"
        problems.append(Problem((key,), f"{key}={show(fitted)} must be {rule.describe()}{remedy}"))
    else:
        chosen[name] = fitted


def _fit(kind: Any, value: object) -> tuple[Any, str | None]:
    """Return the value in its type and None, or the value and what was expected (with the remedy)."""
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None, None
        inner = next(option for option in typing.get_args(kind) if option is not type(None))
        fitted, expected = _fit(inner, value)
        return fitted, None if expected is None else f"null or {expected}"
    if origin is Literal:
        options = typing.get_args(kind)
        if value in options and not isinstance(value, bool):
            return value, None
        near = difflib.get_close_matches(str(value), options, n=1)
        return value, f"one of {', '.join(options)}" + (f"; did you mean {near[0]}?" if near else "; choose one")
    if origin is list:
        if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            return list(value), None
        return value, "a list of texts; write it as [first,second]"
    return _fit_plain(kind, value)


def _fit_plain(kind: type, value: object) -> tuple[Any, str | None]:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is bool:
        return value, None if isinstance(value, bool) else "true or false; write one of the two"
    if kind is int:
        return value, None if number and isinstance(value, int) else "a whole number; write it without quotes or point"
    if kind is float:
        if number and math.isfinite(cast(float, value)):
            return float(cast(float, value)), None
        return value, "a finite number; write it like 0.5 or 1e-5"
    if isinstance(value, str):
        return value, None if value.strip() else "a text that is not empty; write null to leave it out"
    return value, "a text; put it in quotes inside quotes, as in key=\"'123'\""


def _unknown(key: str, value: object, known: tuple[str, ...]) -> str:
    """Say that a key does not exist, and which one was probably meant."""
    group, _, name = key.rpartition(".")
    siblings = [other for other in known if other.rpartition(".")[0] == group]
    near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.75) or difflib.get_close_matches(
        key, known, n=1, cutoff=0.75
    )
    if not near:
        near = [other for other in known if other.rpartition(".")[2] == name][:1]
    if near:
        remedy = f"did you mean {near[0]}?"
    elif siblings:
        remedy = f"{group or 'the top level'} has " + ", ".join(other.rpartition(".")[2] for other in siblings)
    else:
        remedy = "the groups are " + ", ".join(sorted({other.partition(".")[0] for other in known if "." in other}))
    shown = key if isinstance(value, Mapping) else f"{key}={show(value)}"
    return f"{shown}: there is no such key (a leading + does not make one); {remedy}"
