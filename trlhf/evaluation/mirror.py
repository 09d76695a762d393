"""Offline mirrors: a folder that holds copies of hub data sets under their names, ``MIRROR/OWNER/NAME``.

A copy is what the hub has: a README.md whose header lists the configurations, and the files that it names. This module
makes such copies from the files as their authors publish them, where there is no hub:

    python -m trlhf.evaluation.mirror MIRROR agieval=AGIEval/data/v1 gsm8k=grade-school-math/grade_school_math/data
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trlhf.errors import UserError
from trlhf.files import write_bytes, write_jsonl
from trlhf.rows import Row, read_rows
from trlhf.types import RowReport

AGIEVAL = ["aqua-rat", "logiqa-en", "lsat-ar", "lsat-lr", "lsat-rc", "sat-en", "sat-en-without-passage", "sat-math"]
LETTERS = "ABCDEFG"


def write_agieval(source: Path, mirror: Path) -> list[RowReport]:
    """Copy AGIEval's English multiple-choice files (https://github.com/ruixiangcui/AGIEval) as ``hails/agieval-…``.

    The question is worded as AGIEval's zero-shot prompt (https://arxiv.org/abs/2304.06364, appendix) and as those data
    sets have it: passage, "Q: ", question, "Answer Choices: ", the options, "A: Among A through E, the answer is".
    """
    reports = []
    for name in AGIEVAL:
        path = source / f"{name}.jsonl"
        rows, report = read_rows(path), RowReport(str(path))
        copied: list[dict[str, Any]] = []
        for row in rows:
            report.read += 1
            found = _choice(row)
            if isinstance(found, str):
                report.drop(found, row.place)
            else:
                copied.append(found)
        report.kept = len(copied)
        if not copied:
            raise UserError(f"{path}: no row has 'question', 'options' and the letter of one of them in 'label'")
        _save(mirror / "hails" / f"agieval-{name}", {"default": {"test": copied}})
        reports.append(report)
    return reports


def write_gsm8k(source: Path, mirror: Path) -> list[RowReport]:
    """Copy ``train.jsonl`` and ``test.jsonl`` (https://github.com/openai/grade-school-math) as ``openai/gsm8k``."""
    splits, reports = {}, []
    for name in ("train", "test"):
        rows = read_rows(source / f"{name}.jsonl")
        for row in rows:
            if not all(isinstance(row.data.get(column), str) for column in ("question", "answer")):
                raise UserError(f"{source / name}.jsonl: {row.place} has no text in 'question' and 'answer'")
        splits[name] = [{key: row.data[key] for key in ("question", "answer")} for row in rows]
        reports.append(RowReport(f"{source / name}.jsonl", len(rows), len(rows)))
    _save(mirror / "openai" / "gsm8k", {"main": splits})
    return reports


def mirrored(mirror: str, name: str) -> tuple[str, str]:
    """Return where a mirror's copy of a data set is, and a cache folder that belongs to its present content alone.

    `datasets` tells local data sets apart by their folder's name and header only: without a cache of its own, a changed
    copy, or another mirror's, would go unnoticed.
    """
    import datasets

    folder = (Path(mirror).expanduser() / name).absolute()
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    content = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in found]
    digest = hashlib.sha256(repr(content).encode()).hexdigest()[:16]
    return str(folder), str(Path(datasets.config.HF_DATASETS_CACHE) / "mirrors" / digest)


MAKERS: dict[str, Callable[[Path, Path], list[RowReport]]] = {"agieval": write_agieval, "gsm8k": write_gsm8k}


def main(arguments: Sequence[str]) -> None:
    """Make the copies that the command line names, and say how many rows each has."""
    pairs = [text.partition("=") for text in arguments[1:]]
    unknown = [name for name, _, source in pairs if name not in MAKERS or not source]
    if not pairs or unknown:
        raise UserError(f"usage: python -m trlhf.evaluation.mirror MIRROR {' '.join(f'{x}=FOLDER' for x in MAKERS)}")
    for name, _, source in pairs:
        for report in MAKERS[name](Path(source).expanduser(), Path(arguments[0]).expanduser()):
            print(report.describe())


def _choice(row: Row) -> dict[str, Any] | str:
    """Return a multiple-choice row in lm-eval's form, or why it has none."""
    question, options, label = (row.data.get(key) for key in ("question", "options", "label"))
    if not isinstance(question, str) or not isinstance(options, list) or not options:
        return "no 'question' with 'options'"
    if label not in tuple(LETTERS[: len(options)]):
        return f"'label' is {label!r}, not the letter of one of the {len(options)} options"
    last = LETTERS[len(options) - 1]
    query = (
        f"{row.data.get('passage') or ''}Q: {question} Answer Choices: {' '.join(options)}\n"
        f"A: Among A through {last}, the answer is"
    )
    return {"query": query, "choices": options, "gold": [LETTERS.index(label)]}


def _save(folder: Path, configurations: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Write the rows and a README.md whose header says where they are."""
    import yaml

    header: list[dict[str, Any]] = []
    for configuration, splits in configurations.items():
        files = []
        for split, rows in splits.items():
            name = f"{configuration}/{split}.jsonl"
            write_jsonl(folder / name, rows)
            files.append({"split": split, "path": name})
        header.append({"config_name": configuration, "data_files": files})
    text = f"---\n{yaml.safe_dump({'configs': header}, sort_keys=False)}---\nA local copy, made by trlhf.\n"
    write_bytes(folder / "README.md", text.encode())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"trlhf: {error}")
