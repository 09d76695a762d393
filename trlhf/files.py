"""Files that are either whole or absent: temporary name, fsync, rename. No torch here."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trlhf.errors import UserError

WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}
FULL = "the disk is full (or its quota is); free some space and run the same command again, which continues"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the failure of a write into a message for the user.

    Raises:
        UserError: the disk is full, read-only, or refuses the path; also where a library hides it in its own exception.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{path}: cannot be written: {FULL}") from error
        if error.errno in WRITE_ERRORS or error.filename is None or _inside(error.filename, path):
            reason = error.strerror or str(error)
            raise UserError(f"{path}: cannot be written ({reason}); choose another folder with run.dir=…") from error
        raise
    except Exception as error:  # safetensors has an exception of its own, with the system's in its text
        if "StorageFull" in str(error) or "No space left" in str(error):
            raise UserError(f"{path}: cannot be written: {FULL}") from error
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that it is never seen half written.

    Raises:
        UserError: it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with fresh.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
        except BaseException:
            with suppress(OSError):
                fresh.unlink()
            raise
        sync(path.parent)


def write_json(path: Path, value: object) -> None:
    """Write one JSON document (see :func:`jsonable`)."""
    write_bytes(path, (json.dumps(jsonable(value), indent=2, ensure_ascii=False) + "\n").encode())


def write_jsonl(path: Path, rows: Iterable[object]) -> None:
    """Write one JSON document a line (see :func:`jsonable`)."""
    write_bytes(path, "".join(json.dumps(jsonable(row), ensure_ascii=False) + "\n" for row in rows).encode())


def append_json(path: Path, value: object) -> None:
    """Append one line of JSON; a kill can cost at most this line, which :func:`read_jsonl` then leaves out."""
    line = (json.dumps(jsonable(value), ensure_ascii=False) + "\n").encode()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(line)


def read_json(path: Path) -> Any:
    """Read one JSON document.

    Raises:
        UserError: it is missing or broken.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); delete the folder {path.parent} and run the same command again"
        ) from error


def read_jsonl(path: Path) -> list[Any]:
    """Read the whole lines of a JSON-lines file; a torn last line (from a kill) is left out.

    Raises:
        UserError: a line before the last is broken.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn or empty
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON ({error}); delete the line or the file") from error
    return rows


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``path`` when the block succeeds, and vanishes when it fails.

    Raises:
        UserError: it cannot be written.
    """
    recover(path)
    fresh = path.with_name(f".{path.name}.new")
    aside = _aside(path)
    with writing(path):
        shutil.rmtree(fresh, ignore_errors=True)  # of a process that was killed
        fresh.mkdir(parents=True)
        try:
            yield fresh
            for folder, _, names in os.walk(fresh):
                for name in names:
                    sync(Path(folder, name))
                sync(Path(folder))
            if path.exists():
                os.rename(path, aside)
            os.rename(fresh, path)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            recover(path)
            raise
        sync(path.parent)
        shutil.rmtree(aside, ignore_errors=True)


def recover(path: Path) -> None:
    """Put back what :func:`new_directory` had set aside when it was killed between its two renames."""
    aside = _aside(path)
    if not aside.exists():
        return
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        with suppress(OSError):  # another reader may have been faster
            os.rename(aside, path)


def sweep(folder: Path) -> None:
    """Remove what killed processes left of :func:`write_bytes` under a folder that nobody else is writing."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Ask the disk to keep a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def jsonable(value: object) -> Any:
    """Return plain JSON values: paths as text, NumPy and torch scalars as numbers, NaN and infinities as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return jsonable(dataclasses.asdict(value))
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    for method in ("tolist", "item"):  # arrays and scalars of NumPy and torch, which are not imported here
        if hasattr(value, method):
            return jsonable(getattr(value, method)())
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _inside(filename: object, path: Path) -> bool:
    return isinstance(filename, (str, bytes, Path)) and os.fsdecode(filename).startswith(str(path.parent))
