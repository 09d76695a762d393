"""Hashes of all runs of n symbols (characters, words) of many sequences, batch by batch, and where they occur."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T", bound=Sequence[object])
Hashes = NDArray[np.uint64]
Indices = NDArray[np.int64]
BATCH = 2_000_000  # symbols looked at together: some hundred megabytes
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing
_BITS = 26  # of a hash, that the table's quick look goes by: 64 MB


@dataclass(frozen=True)
class Grams:
    """Runs of n symbols, one entry each.

    Attributes:
        hashes: 64 bits; equal runs have equal ones, different runs nearly always different ones.
        owners: which sequence it stands in.
        positions: where it begins there.
    """

    hashes: Hashes
    owners: Indices
    positions: Indices

    def where(self, chosen: NDArray[np.bool_] | Indices) -> Grams:
        """Return some of the entries."""
        return Grams(self.hashes[chosen], self.owners[chosen], self.positions[chosen])


def grams(sequences: Sequence[NDArray[np.uint32]], n: int, first: int = 0) -> Grams:
    """Return every run of ``n`` symbols of each sequence.

    The hash is the polynomial Σ mix(s_i)·b^(n-1-i) mod 2^64 (Karp and Rabin 1987, https://doi.org/10.1147/rd.312.0249)
    over symbols that are mixed first.

    Args:
        sequences: of symbols.
        n: length of a run.
        first: number of the first sequence.
    """
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    symbols = mix(np.concatenate(sequences).astype(np.uint64)) if len(sequences) else np.empty(0, dtype=np.uint64)
    count = max(0, len(symbols) - n + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for i in range(n):
        hashes *= _BASE
        hashes += symbols[i : i + count]
    ends = np.cumsum(lengths)
    owners = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)[:count]
    places = np.arange(count, dtype=np.int64)
    whole = places + n <= ends[owners] if count else np.empty(0, dtype=np.bool_)  # not over the end into the next one
    return Grams(hashes, owners + first, places - (ends - lengths)[owners]).where(whole)


def characters(text: str) -> NDArray[np.uint32]:
    """Return the code points of a text."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def batches(sequences: Iterable[T], most: int = BATCH) -> Iterator[tuple[int, list[T]]]:
    """Yield the sequences in order, as many together as have ``most`` symbols, with the number of the first."""
    first, batch, size = 0, list[T](), 0
    for sequence in sequences:
        if batch and size + len(sequence) > most:
            yield first, batch
            first, batch, size = first + len(batch), [], 0
        batch.append(sequence)
        size += len(sequence)
    if batch:
        yield first, batch


class Table:
    """The different ones among some hashes, in order; says quickly which of many others are among them."""

    def __init__(self, hashes: Hashes) -> None:
        ordered = np.sort(hashes)
        new = np.ones(len(ordered), dtype=np.bool_)
        np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
        self.hashes: Hashes = ordered[new]  # as np.unique, which takes longer with so many different ones
        self._present = np.zeros(2**_BITS, dtype=np.bool_)
        self._present[self.hashes >> np.uint64(64 - _BITS)] = True

    def __len__(self) -> int:
        return len(self.hashes)

    def numbers(self, hashes: Hashes) -> Indices:
        """Return the number of each hash in the table; all of them must be in it."""
        order = np.argsort(hashes)  # neighbours among the queries are then neighbours in memory
        found = np.empty(len(hashes), dtype=np.int64)
        found[order] = np.searchsorted(self.hashes, hashes[order])
        return found

    def hits(self, found: Grams) -> tuple[Grams, Indices]:
        """Return the entries whose hash is in the table, and its number there."""
        likely = found.where(np.flatnonzero(self._present[found.hashes >> np.uint64(64 - _BITS)]))
        numbers = np.minimum(self.numbers(likely.hashes), max(0, len(self) - 1))
        there = self.hashes[numbers] == likely.hashes if len(self) else np.zeros(len(numbers), dtype=np.bool_)
        return likely.where(there), numbers[there]


class Buckets:
    """Entries filed under numbers; pairs each of many queries with every entry under its number.

    Args:
        numbers: under which each entry is filed.
        count: how many numbers there are.
    """

    def __init__(self, numbers: Indices, count: int) -> None:
        self._order = np.argsort(numbers, kind="stable")
        self._sizes = np.bincount(numbers, minlength=count)
        self._starts = np.cumsum(self._sizes) - self._sizes

    def pairs(self, queries: Indices, most: int = BATCH) -> Iterator[tuple[Indices, Indices]]:
        """Yield (place in ``queries``, entry) for every match, at most about ``most`` matches at a time."""
        sizes = self._sizes[queries]
        waiting = np.flatnonzero(sizes)
        total = np.cumsum(sizes[waiting])
        while len(waiting):
            before = total[0] - sizes[waiting[0]]
            taken = max(1, int(np.searchsorted(total, before + most, side="right")))
            now, waiting = waiting[:taken], waiting[taken:]
            ends = total[:taken] - before
            total = total[taken:]
            within = np.arange(ends[-1]) - np.repeat(ends - sizes[now], sizes[now])
            yield np.repeat(now, sizes[now]), self._order[np.repeat(self._starts[queries[now]], sizes[now]) + within]


def mix(symbols: Hashes) -> Hashes:
    """Spread small numbers over 64 bits (splitmix64, https://prng.di.unimi.it/splitmix64.c)."""
    mixed = symbols + _BASE
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
