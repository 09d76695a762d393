"""Which of the trainer's checkpoints are whole: a marker, written last, lists every file with its size."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from trlhf import files
from trlhf.errors import UserError

MARKER = "whole.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_log = logging.getLogger(__name__)


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as whole, once all of it is on the disk."""
    sizes = _sizes(checkpoint)
    with files.writing(checkpoint):
        for name in sizes:
            files.sync(checkpoint / name)
    files.write_json(checkpoint / MARKER, sizes)


def newest_whole(folder: Path) -> tuple[Path, int] | None:
    """Return the newest whole checkpoint in a folder, with its step; all broken ones are removed.

    The trainer keeps those that it finds youngest by their times. One that a kill left half deleted would be young, and
    take the place of a whole one.
    """
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    whole = []
    for step, path in sorted(found, reverse=True):
        if _is_whole(path):
            whole.append((path, step))
            continue
        _log.warning("%s is not whole (the run was stopped meanwhile); it is removed", path)
        shutil.rmtree(path, ignore_errors=True)
    return whole[0] if whole else None


def _is_whole(checkpoint: Path) -> bool:
    if not (checkpoint / MARKER).is_file():
        return False
    try:
        return bool(files.read_json(checkpoint / MARKER) == _sizes(checkpoint))
    except UserError:
        return False


def _sizes(checkpoint: Path) -> dict[str, int]:
    return {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != MARKER
    }
