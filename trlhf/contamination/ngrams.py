"""N-gram overlap: which share of a test text's runs of n words stands in the training texts."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trlhf.contamination.grams import BATCH, Buckets, Grams, Indices, Table, batches, grams, mix

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Overlaps:
    """What training texts and test texts have in common.

    Attributes:
        grams: different n-grams of each test text; 0 for one of fewer than n words.
        found: how many of them stand in any of the training texts.
        pairs: (training text, test text) → share of the test text's n-grams that this one training text holds, where
            it is at least the share asked for.
    """

    grams: Indices
    found: Indices
    pairs: dict[tuple[int, int], float]


def ngram_overlaps(train: Sequence[str], test: Sequence[str], n: int, share: float) -> Overlaps:
    """Compare runs of ``n`` words, lower case, without punctuation (as Brown et al. 2020, appendix C, do with n = 13).

    https://arxiv.org/abs/2005.14165. They call a test text dirty when any of its n-grams was trained on; Chowdhery et
    al. 2022, sec. 8 (https://arxiv.org/abs/2204.02311), when 70 per cent of its 8-grams were. N-grams are compared by
    64-bit hashes: one chance collision is expected in 10^5 comparisons of 10^7 n-grams with 10^7.

    Args:
        train: normalised training texts.
        test: normalised test texts.
        n: words in a run.
        share: smallest share for `Overlaps.pairs`.
    """
    vocabulary: defaultdict[str, int] = defaultdict()
    vocabulary.default_factory = vocabulary.__len__
    theirs = _distinct(list(_runs(test, n, vocabulary)))
    table = Table(theirs.hashes)
    numbers = table.numbers(theirs.hashes)
    present = np.zeros(len(table), dtype=np.bool_)
    held: list[tuple[Indices, Indices]] = []  # (number of an n-gram, training text that holds it)
    for found in _runs(train, n, vocabulary):
        there, their_numbers = table.hits(_distinct([found]))
        present[their_numbers] = True
        held.append((their_numbers, there.owners))
    counts = np.bincount(theirs.owners, minlength=len(test))
    common = np.bincount(theirs.owners[present[numbers]], minlength=len(test))
    likely = (common >= share * counts) & (counts > 0)
    wanted = likely[theirs.owners]
    buckets = Buckets(numbers[wanted], len(table))
    pairs: dict[tuple[int, int], float] = {}
    for their_numbers, owners in held:
        for pair, number in _counted(buckets, their_numbers, owners, theirs.owners[wanted], len(test)):
            i, j = divmod(pair, len(test))
            if number >= share * counts[j]:
                pairs[i, j] = number / int(counts[j])
    return Overlaps(counts, common, pairs)


def _counted(
    buckets: Buckets, numbers: Indices, owners: Indices, items: Indices, count: int
) -> Iterator[tuple[int, int]]:
    """Yield (training text · count + test text, n-grams in common) for one batch of training texts."""
    common: list[tuple[Indices, Indices]] = []
    for k, entry in buckets.pairs(numbers):
        common.append(np.unique(owners[k] * count + items[entry], return_counts=True))
    if common:
        pairs, place = np.unique(np.concatenate([pair for pair, _ in common]), return_inverse=True)
        sums = np.bincount(place, weights=np.concatenate([number for _, number in common])).astype(np.int64)
        yield from zip(pairs.tolist(), sums.tolist(), strict=True)


def _runs(texts: Sequence[str], n: int, vocabulary: defaultdict[str, int]) -> Iterator[Grams]:
    """Yield the n-grams of the texts, some texts at a time."""
    for first, batch in batches(texts, 6 * BATCH):  # characters; fewer words
        yield grams([_words(text, vocabulary) for text in batch], n, first)


def _words(text: str, vocabulary: defaultdict[str, int]) -> NDArray[np.uint32]:
    return np.fromiter(map(vocabulary.__getitem__, _WORD.findall(text)), dtype=np.uint32)


def _distinct(parts: Sequence[Grams]) -> Grams:
    """Return the n-grams of each text once, in no order."""
    hashes = np.concatenate([part.hashes for part in parts])
    owners = np.concatenate([part.owners for part in parts])
    both = hashes ^ mix(owners.astype(np.uint64))
    order = np.argsort(both)
    both = both[order]
    new = np.ones(len(order), dtype=np.bool_)
    np.not_equal(both[1:], both[:-1], out=new[1:])
    chosen = order[new]
    return Grams(hashes[chosen], owners[chosen], np.zeros(len(chosen), dtype=np.int64))
