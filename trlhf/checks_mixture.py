"""Contradictions in a mixture of data sets and in the filters of its chats. No torch here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from trlhf.hub import DATA, exists_or_on_hub
from trlhf.schema import Problem, show

if TYPE_CHECKING:
    from trlhf.config import DataConfig, SourceConfig


def mixture_problems(data: DataConfig) -> Iterator[Problem]:
    """Yield every problem of ``data.mixture``, ``data.filters`` and ``data.mirror``."""
    if data.mixture and data.name != "file":
        yield Problem(
            ("data.name", "data.mixture"),
            f"data.mixture is read only with data=file, not with data.name={data.name}; add data=file or ~data.mixture",
        )
    if data.mixture and data.sft is not None:
        yield Problem(
            ("data.sft", "data.mixture"),
            f"data.sft={data.sft} and data.mixture both say what to imitate; leave out the one or (~data.mixture) the "
            "other, or add the file to the mixture: data.mixture.mine.path=FILE",
        )
    for name, source in data.mixture.items():
        yield from _source(f"data.mixture.{name}", source, list(data.mixture))
    yield from _filters(data)
    if data.mirror is not None and not Path(data.mirror).expanduser().is_dir():
        yield Problem(
            ("data.mirror",),
            f"data.mirror={data.mirror} is no folder (seen from {Path.cwd()}); give the folder that holds OWNER/NAME "
            "of each data set, or leave it out",
        )


def _source(key: str, source: SourceConfig, names: list[str]) -> Iterator[Problem]:
    if not source.path:
        near = difflib.get_close_matches(
            key.rpartition(".")[2], [name for name in names if not key.endswith(name)], n=1
        )
        yield Problem(
            (f"{key}.path",),
            f"{key}.path is missing; give a file, a folder or a hub name"
            + (f", or did you mean data.mixture.{near[0]}?" if near else ""),
        )
    elif not exists_or_on_hub(source.path, DATA):
        yield Problem(
            (f"{key}.path",),
            f"{key}.path={source.path} does not exist (seen from {Path.cwd()}), and is no hub name like owner/name; "
            "correct the path",
        )


def _filters(data: DataConfig) -> Iterator[Problem]:
    filters = data.filters
    given = {key: value for key, value in vars(filters).items() if value}
    if given and data.name != "file":
        keys = tuple(f"data.filters.{key}" for key in given)
        yield Problem(
            ("data.name", *keys),
            f"{keys[0]} is read only with data=file, not with data.name={data.name}; add data=file or leave it out",
        )
    if 0 < filters.max_tokens < filters.min_tokens:
        yield Problem(
            ("data.filters.min_tokens", "data.filters.max_tokens"),
            f"data.filters.min_tokens={filters.min_tokens} is more than data.filters.max_tokens={filters.max_tokens}, "
            "so that no chat would pass; lower the first or raise the second (0: any)",
        )
    for key in ("drop_matching", "keep_matching"):
        for pattern in getattr(filters, key):
            try:
                re.compile(pattern)
            except re.error as error:
                yield Problem(
                    (f"data.filters.{key}",),
                    f"data.filters.{key}: {pattern!r} is not a regular expression ({error}); mend it",
                )
    for key, value, package in (
        ("languages", f"[{','.join(filters.languages)}]", "py3langid"),
        ("near_duplicates", show(filters.near_duplicates), "datasketch"),
    ):
        if getattr(filters, key) and find_spec(package) is None:
            yield Problem(
                (f"data.filters.{key}",),
                f"data.filters.{key}={value} needs the package {package}, which is not installed; "
                "pip install 'trlhf[data]', or leave it out",
            )
