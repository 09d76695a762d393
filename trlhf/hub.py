"""Data sets of the Hugging Face hub: their names, a mirror in a folder, one file of them, rows over the network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trlhf.errors import UserError

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
DATA = re.compile(rf"{NAME.pattern}(:\w[\w./-]*)?")  # openai/gsm8k:main, Open-Orca/OpenOrca:1M-GPT4-Augmented.parquet
FILE_SUFFIXES = {".jsonl", ".json", ".csv", ".parquet", ".jinja", ".txt", ".gguf"}
EXPORT = "refs/convert/parquet"  # the branch on which the hub keeps every data set as parquet files
SHUFFLED = 10_000  # rows that a shuffled stream holds at a time


def exists_or_on_hub(name: str, pattern: re.Pattern[str] = NAME) -> bool:
    """Say whether a name is a path that exists, or may be a hub name (which only a download can tell)."""
    return Path(name).expanduser().exists() or (
        pattern.fullmatch(name) is not None and Path(name.partition(":")[0]).suffix not in FILE_SUFFIXES
    )


@dataclass(frozen=True)
class HubData:
    """What a hub name names.

    Attributes:
        name: ``owner/name``.
        configuration: of the data set, where one is named (``main``).
        file: in the data set's repository, where one is named (``1M-GPT4-Augmented.parquet``).
    """

    name: str
    configuration: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, source: str) -> HubData | None:
        """Return what ``source`` names on the hub; None where it is a path."""
        name, _, rest = source.partition(":")
        if Path(name).expanduser().exists() or not DATA.fullmatch(source) or Path(name).suffix in FILE_SUFFIXES:
            return None
        is_file = Path(rest).suffix in FILE_SUFFIXES
        return cls(name, None if is_file else rest or None, rest if is_file else None)


def mirrored(source: str, mirror: str) -> tuple[str, str | None]:
    """Return where a mirror keeps a hub data set, and its configuration; a path is returned as it is.

    Raises:
        UserError: the mirror does not have it.
    """
    wanted = HubData.parse(source)
    if wanted is None:
        return source, None
    folder = Path(mirror).expanduser() / wanted.name
    path = folder / wanted.file if wanted.file else folder
    if not path.exists():
        raise UserError(
            f"{source}: data.mirror={mirror} has no {path}; bring it there with: hf download {wanted.name} "
            f"--repo-type dataset --local-dir {folder}"
        )
    return str(path), wanted.configuration


def download(data: HubData) -> Path:
    """Return the local copy of one file of a data set; a download that broke off goes on where it was."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(data.name, str(data.file), repo_type="dataset"))


def open_split(path: str, configuration: str | None, split: str) -> Any:
    """Open a split of a hub data set or a folder.

    Data sets that are a script are read as the parquet files that the hub makes of them: `datasets` runs no scripts.
    """
    import datasets

    try:
        return datasets.load_dataset(path, configuration, split=split)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error) or Path(path).exists():
            raise
        return datasets.load_dataset(path, configuration, split=split, revision=EXPORT)


def stream(data: HubData, split: str, seed: int | None) -> Iterator[dict[str, Any]]:
    """Yield rows as they come over the network; with a seed, in a shuffled order."""
    import datasets

    if data.file is not None:
        kind = {".jsonl": "json"}.get(Path(data.file).suffix, Path(data.file).suffix[1:])
        address = f"hf://datasets/{data.name}/{data.file}"
        rows: Any = datasets.load_dataset(kind, data_files=address, split="train", streaming=True)
    else:
        rows = datasets.load_dataset(data.name, data.configuration, split=split, streaming=True)
    yield from rows if seed is None else rows.shuffle(seed=seed, buffer_size=SHUFFLED)
