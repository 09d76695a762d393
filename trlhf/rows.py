"""Rows from files, folders and the hub; an error names the file and the line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trlhf.errors import UserError


@dataclass(frozen=True)
class Row:
    """One row of a data set, and where it stands (``train.jsonl:7``), for error messages and ids."""

    place: str
    data: dict[str, Any]


def read_rows(source: str | Path, split: str = "train") -> list[Row]:
    """Read every row of a file (.jsonl, .json, .csv, .parquet), a local folder, or a data set on the hub.

    Args:
        source: path, or hub name, with a configuration after a colon where needed (``openai/gsm8k:main``).
        split: split to read from a folder or the hub; files have none.

    Raises:
        UserError: nothing there, nothing in it, or something unreadable in it; names file and line.
    """
    path = Path(source).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if reader is not None and not path.is_dir():
        if not path.is_file():
            raise UserError(f"{source}: there is no such file (looked for {path.absolute()}); check the path")
        rows = reader(path)
    elif path.is_file():
        raise UserError(f"{source}: unknown kind of file; give one of {', '.join(_READERS)}, a folder or a hub name")
    else:
        rows = _read_with_datasets(str(source), path, split)
    if not rows:
        raise UserError(f"{source}: the file is empty; at least one row is needed")
    return rows


def spoken(place: str) -> str:
    """Return a row's place as an error says it: ``train.jsonl line 7``."""
    name, colon, line = place.rpartition(":")
    return f"{name} line {line}" if colon and line.isdigit() else place


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path} line {line}: not UTF-8 text; convert the file to UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _read_jsonl(path: Path) -> list[Row]:
    return [
        _row(path, f":{number}", f"line {number}", _load_json(path, line, number))
        for number, line in enumerate(_read_text(path).split("\n"), start=1)
        if line.strip()
    ]


def _load_json(path: Path, line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {number}: not valid JSON ({error.msg}, column {error.colno})") from error


def _read_json(path: Path) -> list[Row]:
    text = _read_text(path)
    if not text.strip():
        return []
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line, under the wrong ending
            return _read_jsonl(path)
        raise UserError(f"{path} line {error.lineno}: not valid JSON ({error.msg}, column {error.colno})") from error
    if isinstance(value, dict):  # {"data": [...]}, as some tools write it
        lists = [item for item in value.values() if isinstance(item, list)]
        value = lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list):
        raise UserError(f"{path}: a list of objects was expected, found {type(value).__name__}")
    return [_row(path, f" item {n}", f"item {n}", item) for n, item in enumerate(value, start=1)]


def _row(path: Path, suffix: str, spoken: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{path} {spoken}: an object with named fields was expected, found {type(value).__name__}")
    return Row(path.name + suffix, value)


def _read_csv(path: Path) -> list[Row]:
    reader = csv.reader(io.StringIO(_read_text(path), newline=""))
    rows: list[Row] = []
    header: list[str] = []
    try:
        for line, values in _numbered(reader, lambda: reader.line_num):
            if not any(value.strip() for value in values):
                continue
            if not header:
                header = values
            elif len(values) != len(header):
                raise UserError(f"{path} line {line}: {len(values)} values under {len(header)} column names")
            else:
                cells = ((name, value if value.strip() else None) for name, value in zip(header, values, strict=True))
                rows.append(Row(f"{path.name}:{line}", dict(cells)))
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: not valid CSV ({error})") from error
    return rows


def _numbered(values: Iterable[list[str]], line_num: Callable[[], int]) -> Iterator[tuple[int, list[str]]]:
    """Pair each record with the line on which it starts: a quoted field may run over several."""
    start = 1
    for value in values:
        yield start, value
        start = line_num() + 1


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise UserError(f"{path}: not a readable parquet file ({_first_line(error)})") from error
    return [Row(f"{path.name} row {number}", row) for number, row in enumerate(table, start=1)]


def _read_with_datasets(source: str, path: Path, split: str) -> list[Row]:
    if not path.is_dir() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise UserError(f"{source}: there is no such file or folder (looked for {path.absolute()}); check the path")
    import datasets

    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            saved: Any = datasets.load_from_disk(str(path))
            data: Any = saved[split] if isinstance(saved, dict) else saved
        elif path.is_dir():
            data = datasets.load_dataset(str(path), split=split)
        else:
            name, _, configuration = source.partition(":")
            data = datasets.load_dataset(name, configuration or None, split=split)
        rows = [dict(row) for row in data]
    except Exception as error:  # datasets, the hub and the network each raise kinds of their own
        if path.is_dir():
            raise UserError(f"{source}: split {split!r} of the folder cannot be read ({_first_line(error)})") from error
        raise UserError(
            f"{source}: there is no such path here (looked for {path.absolute()}), and it cannot be read from the "
            f"Hugging Face hub ({_first_line(error)}); check the name and the connection, or download it and give its "
            "path"
        ) from error
    return [Row(f"{path.name} {split} row {number}", row) for number, row in enumerate(rows, start=1)]


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
