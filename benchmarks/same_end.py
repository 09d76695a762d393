"""Whether two runs ended the same in everything but times; and whether a killed one kept its labels."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

TIMES = frozenset({"seconds", "tokens_per_second", "made", "time"})  # keys and columns that say when, or how fast
PASSING = frozenset({".lock", "trlhf.log"})  # what tells of a process, not of its result
SETS = frozenset({"target_modules"})  # keys whose list is a set, which peft writes in a random order
Rows = dict[str, dict[str, tuple[Any, ...]]]  # table → key → row


def differences(run: Path, other: Path) -> dict[str, str]:
    """Return for every file of two finished runs ``""`` where they agree, else what differs.

    JSON is compared value by value without the `TIMES`, the ledger row by row in order, everything else byte by byte;
    a run's own folder may stand in its files.
    """
    files = {path.relative_to(root).as_posix() for root in (run, other) for path in root.rglob("*") if path.is_file()}
    return {name: _difference(run, other, name) for name in sorted(files) if name not in PASSING}


def unlike(run: Path, other: Path, tolerance: float) -> dict[str, str]:
    """Return for every JSON file and ledger of two finished runs ``""`` where they agree, else what differs.

    Text, whole numbers and flags must be the same; other numbers may differ by ``tolerance``, of the larger or of 1e-2.
    """
    names = {path.relative_to(root).as_posix() for root in (run, other) for path in root.rglob("*") if path.is_file()}
    found: dict[str, str] = {}
    for name in sorted(names - PASSING):
        one, two = run / name, other / name
        if not (one.exists() and two.exists()):
            found[name] = f"only {one if one.exists() else two} exists"
        elif one.suffix == ".sqlite":
            pair = (_without_times(ledger_rows(one)), _without_times(ledger_rows(two)))
            found[name] = _first_difference(*pair, tolerance=tolerance)
        elif one.suffix in (".json", ".jsonl"):
            found[name] = _first_difference(_values(run, one), _values(other, two), tolerance=tolerance)
    return found


def ledger_rows(path: Path) -> Rows:
    """Return the rows of a ledger by key, in order, times included; nothing is written beside the file."""
    if not path.exists():
        return {"questions": {}, "answers": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in (path.name, f"{path.name}-wal"):  # what a killed process had not yet copied into the file
            if path.with_name(name).exists():
                shutil.copy(path.with_name(name), folder)
        connection = sqlite3.connect(Path(folder, path.name))
        try:
            return {table: dict(_rows(connection, table, key)) for table, key in _KEYS.items()}
        finally:
            connection.close()


def kept_labels(before: Rows, after: Rows) -> tuple[int, int]:
    """Return how many answers of an earlier state are gone, and how many questions are there or were paid anew."""
    lost = sum(after["answers"].get(key) != row for key, row in before["answers"].items())
    again = sum(after["questions"].get(key) != row for key, row in before["questions"].items())
    return lost, again


_KEYS = {"questions": "key", "answers": "question_key"}


def _rows(connection: sqlite3.Connection, table: str, key: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone():
        return
    cursor = connection.execute(f"SELECT * FROM {table} ORDER BY id")
    names = [column[0] for column in cursor.description]
    for row in cursor:
        yield row[names.index(key)], tuple(zip(names, row, strict=True))


def _difference(run: Path, other: Path, name: str) -> str:
    one, two = run / name, other / name
    if not (one.exists() and two.exists()):
        return f"only {one if one.exists() else two} exists"
    if one.name == "done":  # holds a time
        return ""
    if one.suffix == ".sqlite":
        return _first_difference(_without_times(ledger_rows(one)), _without_times(ledger_rows(two)))
    if one.suffix in (".json", ".jsonl", ".yaml"):
        return _first_difference(_values(run, one), _values(other, two))
    placeless = [(root / name).read_bytes().replace(os.fsencode(root), b"RUN") for root in (run, other)]
    digests = [hashlib.sha256(content).hexdigest()[:16] for content in placeless]
    return "" if digests[0] == digests[1] else f"sha256 {digests[0]} against {digests[1]}"


def _values(run: Path, path: Path) -> Any:
    text = path.read_text(encoding="utf-8").replace(str(run), "RUN")
    if path.suffix == ".jsonl":
        return [_timeless(json.loads(line)) for line in text.splitlines()]
    return _timeless(json.loads(text) if path.suffix == ".json" else yaml.safe_load(text))


def _timeless(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {key: item for key, item in value.items() if key not in TIMES}
        return {key: sorted(item) if key in SETS and item else _timeless(item) for key, item in kept.items()}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def _without_times(rows: Rows) -> list[Any]:
    return [
        (table, key, [(name, value) for name, value in row if name not in TIMES])
        for table, found in rows.items()
        for key, row in found.items()
    ]


def _first_difference(one: Any, two: Any, place: str = "", tolerance: float = 0.0) -> str:
    """Return where two JSON values part first, as ``place: value against value``."""
    if (
        isinstance(one, float)
        and isinstance(two, float)
        and abs(one - two) <= tolerance * max(abs(one), abs(two), 1e-2)
    ):
        return ""
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        pairs = [(f"{place}.{key}", one[key], two[key]) for key in one]
    elif isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)) and len(one) == len(two):
        pairs = [(f"{place}[{i}]", a, b) for i, (a, b) in enumerate(zip(one, two, strict=True))]
    else:
        return "" if one == two and type(one) is type(two) else f"{place}: {_short(one)} against {_short(two)}"
    return next((found for at, a, b in pairs if (found := _first_difference(a, b, at, tolerance))), "")


def _short(value: Any) -> str:
    text = f"{len(value)} entries: {value!r}" if isinstance(value, (list, tuple, dict)) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
