"""Rows from files, folders and the hub; an error names the file and the line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from trlhf.errors import UserError
from trlhf.hub import HubData, download, mirrored, open_split, stream

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One row of a data set, and where it stands (``train.jsonl:7``), for error messages and ids."""

    place: str
    data: dict[str, Any]


def read_rows(source: str | Path, split: str = "train", mirror: str | None = None) -> list[Row]:
    """Read every row of a file (.jsonl, .json, .csv, .parquet), a local folder, or a data set on the hub.

    Args:
        source: path, or hub name, with a configuration or a file after a colon where needed (``openai/gsm8k:main``).
        split: split to read from a folder or the hub; files have none.
        mirror: folder with copies of hub data sets; null: the hub itself.

    Raises:
        UserError: nothing there, nothing in it, or something unreadable in it; names file and line.
    """
    return list(iterate_rows(source, split, mirror))


def iterate_rows(
    source: str | Path,
    split: str = "train",
    mirror: str | None = None,
    *,
    streamed: bool = False,
    seed: int | None = None,
) -> Iterator[Row]:
    """Yield the rows that `read_rows` returns; .jsonl, .parquet, folders and the hub are held a few rows at a time.

    Args:
        source: as for `read_rows`.
        split: as for `read_rows`.
        mirror: as for `read_rows`.
        streamed: read a hub data set over the network, without a copy on the disk.
        seed: of the order in which a streamed one comes; null: its own.

    Raises:
        UserError: as for `read_rows`.
    """
    text, configuration = str(source), None
    if mirror is not None:
        text, configuration = mirrored(text, mirror)
    rows = _rows_of(text, configuration, split, streamed, seed)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise UserError(f"{source}: the file is empty; at least one row is needed")


def _rows_of(source: str, configuration: str | None, split: str, streamed: bool, seed: int | None) -> Iterator[Row]:
    path = Path(source).expanduser()
    hub = HubData.parse(source)
    if hub is not None and hub.file is not None and not streamed:
        path = _with_hub(source, lambda: download(hub))
    reader = _READERS.get(path.suffix.lower())
    if hub is not None and (streamed or hub.file is None):
        return _hub_rows(source, hub, split, streamed, seed)
    if reader is not None and not path.is_dir():
        if not path.is_file():
            raise UserError(f"{source}: there is no such file (looked for {path.absolute()}); check the path")
        return reader(path)
    if path.is_file():
        raise UserError(f"{source}: unknown kind of file; give one of {', '.join(_READERS)}, a folder or a hub name")
    if not path.is_dir():
        raise UserError(f"{source}: there is no such file or folder (looked for {path.absolute()}); check the path")
    return _folder_rows(path, configuration, split)


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


def _read_jsonl(path: Path) -> Iterator[Row]:
    with _opened(path) as file:
        for number, raw in enumerate(file, start=1):  # in bytes: only \n ends a line
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path} line {number}: not UTF-8 text; convert the file to UTF-8") from error
            if line.strip():
                yield _row(path, f":{number}", f"line {number}", _load_json(path, line, number))


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _load_json(path: Path, line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {number}: not valid JSON ({error.msg}, column {error.colno})") from error


def _read_json(path: Path) -> Iterator[Row]:
    text = _read_text(path)
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line, under the wrong ending
            yield from _read_jsonl(path)
            return
        raise UserError(f"{path} line {error.lineno}: not valid JSON ({error.msg}, column {error.colno})") from error
    if isinstance(value, dict):  # {"data": [...]}, as some tools write it
        lists = [item for item in value.values() if isinstance(item, list)]
        value = lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list):
        raise UserError(f"{path}: a list of objects was expected, found {type(value).__name__}")
    yield from (_row(path, f" item {n}", f"item {n}", item) for n, item in enumerate(value, start=1))


def _row(path: Path, suffix: str, spoken: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{path} {spoken}: an object with named fields was expected, found {type(value).__name__}")
    return Row(path.name + suffix, value)


def _read_csv(path: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(_read_text(path), newline=""))
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
                yield Row(f"{path.name}:{line}", dict(cells))
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: not valid CSV ({error})") from error


def _numbered(values: Iterable[list[str]], line_num: Callable[[], int]) -> Iterator[tuple[int, list[str]]]:
    """Pair each record with the line on which it starts: a quoted field may run over several."""
    start = 1
    for value in values:
        yield start, value
        start = line_num() + 1


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield Row(f"{path.name} row {number}", row)
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise UserError(f"{path}: not a readable parquet file ({_first_line(error)})") from error


def _folder_rows(path: Path, configuration: str | None, split: str) -> Iterator[Row]:
    import datasets

    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            saved: Any = datasets.load_from_disk(str(path))
            data: Any = saved[split] if isinstance(saved, dict) else saved
        else:
            data = open_split(str(path), configuration, split)
    except Exception as error:  # datasets raises kinds of its own
        raise UserError(f"{path}: split {split!r} of the folder cannot be read ({_first_line(error)})") from error
    yield from _numbered_rows(path.name, split, data)


def _hub_rows(source: str, hub: HubData, split: str, streamed: bool, seed: int | None) -> Iterator[Row]:
    if streamed:
        data = _with_hub(source, lambda: stream(hub, split, seed))
    else:
        data = _with_hub(source, lambda: open_split(hub.name, hub.configuration, split))
    rows = _numbered_rows(Path(source).name, split, data)
    while (row := _with_hub(source, lambda: next(rows, None))) is not None:
        yield row


def _numbered_rows(name: str, split: str, data: Iterable[Any]) -> Iterator[Row]:
    return (Row(f"{name} {split} row {number}", dict(row)) for number, row in enumerate(data, start=1))


def _with_hub(source: str, action: Callable[[], T]) -> T:
    try:
        return action()
    except Exception as error:  # datasets, the hub and the network each raise kinds of their own
        raise UserError(
            f"{source}: there is no such path here (looked for {Path(source).absolute()}), and it cannot be read from "
            f"the Hugging Face hub ({_first_line(error)}); check the name and the connection, or download it and give "
            "its path"
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
