"""Demonstrations from one data set or several: read, filtered, capped, weighted, and every row accounted for."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trlhf.chats import MalformedRow
from trlhf.config import SourceConfig
from trlhf.data import no_usable_row
from trlhf.data_report import SourceReport
from trlhf.errors import UserError
from trlhf.hub import HubData
from trlhf.rows import Row, iterate_rows
from trlhf.schema import show
from trlhf.seeding import derive_seed, python_rng
from trlhf.sft.filters import ChatFilter, Count
from trlhf.sft.formats import answered_chat, demonstrations_of
from trlhf.types import Demonstration, Message, RowReport

if TYPE_CHECKING:
    from trlhf.config import Config, FilterConfig

ONE = "sft"  # name of the only source where there is no mixture


@dataclass(frozen=True)
class Chat:
    """A chat that may be learned from, and the row that it came from."""

    messages: Sequence[Message]
    row: Row


def is_mixed(config: Config) -> bool:
    """Say whether demonstrations come from a mixture, or through a filter."""
    from trlhf.config import FilterConfig

    return bool(config.data.mixture) or config.data.filters != FilterConfig()


def mixed_demonstrations(config: Config) -> tuple[list[Demonstration], list[RowReport]]:
    """Return the demonstrations of ``data.mixture`` (or of ``data.sft``) that pass ``data.filters``.

    Each source is read row by row; its chats are filtered, then at most ``cap`` of them are drawn at random, and each
    counts ``weight`` times (a part of a time: so many of them, at random). Near duplicates are looked for across all
    sources: the first one stays.

    Raises:
        UserError: a source that cannot be read, that holds no usable row, or of which nothing is left.
    """
    data = config.data
    sources = data.mixture or {ONE: SourceConfig(path=str(data.sft), native=True)}
    keep = ChatFilter(data.filters, _counter(config))
    demonstrations: list[Demonstration] = []
    reports: list[RowReport] = []
    for name, source in sources.items():
        report = SourceReport(source.path, name=name, weight=source.weight)
        chats = _capped(_filtered(source, keep, report, config), source.cap, report, config)
        report.kept = len(chats)
        repeated = _weighted(chats, source.weight, report, python_rng(config.seed, "weight", name))
        made = [
            demonstration
            for chat in repeated
            for demonstration in demonstrations_of(chat.messages, chat.row, name, config.sft.multi_turn)
        ]
        report.demonstrations = len(made)
        demonstrations += made
        reports.append(report)
    if not demonstrations:
        raise UserError(
            f"data.filters={_described(data.filters)}: not one chat passes; loosen them\n"
            + "\n".join(report.describe() for report in reports)
        )
    return demonstrations, reports


def _filtered(source: SourceConfig, keep: ChatFilter, report: SourceReport, config: Config) -> Iterator[Chat]:
    """Yield the chats of a source that pass; stop a stream at its cap."""
    streamed = _is_streamed(source, config)
    seed = derive_seed(config.seed, "stream", report.name) % 2**32 if source.cap else None
    rows = iterate_rows(source.path, source.split, config.data.mirror, streamed=streamed, seed=seed)
    usable = passed = 0
    first: Row | None = None
    for row in rows:
        report.read += 1
        try:
            messages = answered_chat(row, native=source.native)
        except MalformedRow as error:
            report.drop(str(error), row.place)
            first = first or row
            continue
        usable += 1
        reason = keep.reason(messages, f"{report.name} {row.place}")
        if reason is not None:
            report.drop(reason, row.place)
            continue
        passed += 1
        yield Chat(messages, row)
        if streamed and passed == source.cap:
            break
    if not usable and first is not None:
        raise no_usable_row([first], report)


def _is_streamed(source: SourceConfig, config: Config) -> bool:
    return source.stream and config.data.mirror is None and HubData.parse(source.path) is not None


def _capped(chats: Iterator[Chat], cap: int, report: SourceReport, config: Config) -> list[Chat]:
    """Return at most ``cap`` chats, drawn uniformly in one pass (Vitter 1985, algorithm R), in their order."""
    if not cap:
        return list(chats)
    rng = python_rng(config.seed, "cap", report.name)
    drawn: list[tuple[int, Chat]] = []
    for index, chat in enumerate(chats):
        if len(drawn) < cap:
            drawn.append((index, chat))
            continue
        place, left_out = rng.randrange(index + 1), chat
        if place < cap:
            left_out = drawn[place][1]
            drawn[place] = (index, chat)
        report.drop(f"more than cap={cap}; drawn at random", left_out.row.place)
    return [chat for _, chat in sorted(drawn, key=lambda item: item[0])]


def _weighted(chats: list[Chat], weight: float, report: SourceReport, rng: random.Random) -> list[Chat]:
    """Return each chat ``weight`` times; what is left of a weight goes to so many chats, at random."""
    times, part = divmod(weight, 1.0)
    chosen = set(rng.sample(range(len(chats)), round(part * len(chats))))
    for index, chat in enumerate(chats):
        if not times and index not in chosen:
            report.drop(f"weight={show(weight)}; drawn at random", chat.row.place)
    if not times:
        report.kept = len(chosen)
    return chats * int(times) + [chat for index, chat in enumerate(chats) if index in chosen]


def _counter(config: Config) -> Count:
    """Return what counts the tokens of a chat in its template; the tokenizer is loaded when it is first asked."""
    loaded: list[Count] = []

    def count(chat: Sequence[Message]) -> int:
        if not loaded:
            from trlhf.models import encode_chat
            from trlhf.sft.templates import base_tokenizer

            tokenizer = base_tokenizer(config)
            loaded.append(lambda messages: len(encode_chat(tokenizer, messages)))
        return loaded[0](chat)

    return count


def _described(filters: FilterConfig) -> str:
    from trlhf.config import FilterConfig

    plain = vars(FilterConfig())
    changed = {key: value for key, value in vars(filters).items() if value != plain[key]}
    return ", ".join(f"{key}={value}" for key, value in changed.items())
