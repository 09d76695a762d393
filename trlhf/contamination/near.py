"""Near duplicates between two sets of texts, by edit distance: every one of them, and no other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from trlhf.contamination.grams import Buckets, Grams, Indices, Table, batches, characters, grams

LEVELS = (100, 99, 98, 97)  # per cent; Capybara's card checks these (https://huggingface.co/datasets/LDJnr/Capybara)
PIECE = 16  # characters
Length = TypeVar("Length", int, Indices)


@dataclass(frozen=True)
class Match:
    """A training text and a test text that are alike.

    Attributes:
        train: the training text.
        test: the test text.
        distance: Levenshtein's: insertions, deletions and substitutions of one character that make one the other.
    """

    train: str
    test: str
    distance: int

    @property
    def similarity(self) -> float:
        """1 - distance / (length of the longer text)."""
        return 1 - self.distance / max(len(self.train), len(self.test))

    @property
    def level(self) -> int:
        """The highest of `LEVELS` that the similarity reaches; 100 only for equal texts."""
        length = max(len(self.train), len(self.test))
        return next(level for level in LEVELS if 100 * self.distance <= (100 - level) * length)


def allowed(length: Length) -> Length:
    """Return the greatest distance at the lowest level, where the longer text has ``length`` characters."""
    return (100 - LEVELS[-1]) * length // 100


def near_duplicates(train: Collection[str], test: Collection[str]) -> Iterator[Match]:
    """Yield every pair of texts at one of `LEVELS`, each once. Empty texts are like none.

    Equal texts are found by hashing. For the others a test text is cut into pieces of `PIECE` characters. One edit
    damages at most one of them, so that of any D + 1 pieces one stands unharmed in every text within D edits, at most D
    characters off its place. The D + 1 pieces that are rarest in the training texts are looked up there, and what they
    lead to is compared. So nothing is missed, unlike with MinHash (after Li et al. 2011, "Pass-Join",
    https://arxiv.org/abs/1111.7171, and the rarest-first order of prefix filters).
    """
    known = {text for text in train if text}
    ours, theirs = list(dict.fromkeys(text for text in train if text)), list(dict.fromkeys(filter(None, test)))
    yield from (Match(text, text, 0) for text in theirs if text in known)
    for i, j in candidates(ours, theirs):
        if ours[i] != theirs[j] and (distance := _distance(ours[i], theirs[j])) is not None:
            yield Match(ours[i], theirs[j], distance)


def candidates(train: Sequence[str], test: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield (number of the training text, number of the test text) for all that may be near duplicates, each once.

    A test text of n < 33 characters can only be equal to its duplicates, since a single edit takes more than 3 per
    cent, and is not looked at. A longer one has D + 1 pieces at least: its longest duplicate has m = ⌊100n/97⌋
    characters, so that D = ⌊3m/100⌋ ≤ 3n/97 < n/16 - 1 < ⌊n/16⌋.
    """
    train_lengths, test_lengths = (np.array([len(text) for text in texts]) for texts in (train, test))
    edits = allowed(100 * test_lengths // LEVELS[-1])
    pieces = _pieces(test, edits)
    table = Table(pieces.hashes)
    chosen = _rarest(pieces, table.numbers(pieces.hashes), _occurrences(train, table), edits)
    pieces = pieces.where(chosen)
    table = Table(pieces.hashes)
    buckets = Buckets(table.numbers(pieces.hashes), len(table))
    for found in _windows(train):
        there, numbers = table.hits(found)
        seen = np.empty(0, dtype=np.int64)
        for k, piece in buckets.pairs(numbers):
            i, j = there.owners[k], pieces.owners[piece]
            most = allowed(np.maximum(train_lengths[i], test_lengths[j]))
            close = np.abs(there.positions[k] - pieces.positions[piece]) <= most
            close &= np.abs(train_lengths[i] - test_lengths[j]) <= most
            pairs = np.setdiff1d(i[close] * len(test) + j[close], seen)
            last = np.union1d(seen, pairs)
            seen = last[last >= i[-1] * len(test)]  # the next ones can only repeat pairs of the same training text
            yield from zip((pairs // len(test)).tolist(), (pairs % len(test)).tolist(), strict=True)


def _windows(train: Sequence[str]) -> Iterator[Grams]:
    """Yield what stands at every position of the training texts, some texts at a time."""
    for first, texts in batches(train):
        yield grams([characters(text) for text in texts], PIECE, first)


def _pieces(test: Sequence[str], edits: Indices) -> Grams:
    """Return the pieces of the test texts that may differ from their duplicates at all."""
    parts: list[Grams] = []
    for first, texts in batches(test):
        found = grams([characters(text) for text in texts], PIECE, first)
        parts.append(found.where((found.positions % PIECE == 0) & (edits[found.owners] > 0)))
    empty = np.empty(0, dtype=np.int64)
    hashes = np.concatenate([part.hashes for part in parts] or [empty.astype(np.uint64)])
    owners = np.concatenate([part.owners for part in parts] or [empty])
    return Grams(hashes, owners, np.concatenate([part.positions for part in parts] or [empty]))


def _occurrences(train: Sequence[str], table: Table) -> Indices:
    """Return how often each hash of a table stands in the training texts."""
    counts = np.zeros(len(table), dtype=np.int64)
    for found in _windows(train):
        counts += np.bincount(table.hits(found)[1], minlength=len(table))
    return counts


def _rarest(pieces: Grams, numbers: Indices, counts: Indices, edits: Indices) -> NDArray[np.bool_]:
    """Mark the D + 1 rarest pieces of each test text, less those that no training text has."""
    often = counts[numbers]
    order = np.lexsort((often, pieces.owners))
    owners = pieces.owners[order]
    rank = np.arange(len(order)) - np.searchsorted(owners, owners, side="left")
    chosen = np.zeros(len(order), dtype=np.bool_)
    chosen[order] = rank <= edits[owners]
    return chosen & (often > 0)


def _distance(one: str, other: str) -> int | None:
    """Return the edit distance of two texts, or None where it is too great for the lowest level."""
    from rapidfuzz.distance import Levenshtein

    most = allowed(max(len(one), len(other)))
    distance = Levenshtein.distance(one, other, score_cutoff=most)
    return distance if distance <= most else None
