"""Near duplicates among texts: MinHash finds the candidates, exact Jaccard similarity decides."""

from __future__ import annotations

from typing import Any

WORDS = 5  # in a shingle, as in https://arxiv.org/abs/2107.06499, sec. 4.2
PERMUTATIONS = 128


class NearDuplicates:
    """Texts seen so far, and which of them a new one nearly repeats.

    The similarity of two texts is that of their sets of shingles (runs of five words, in lower case),
    J(A, B) = |A ∩ B| / |A ∪ B|. Candidates come from locality-sensitive hashing of MinHash signatures (Broder 1997,
    https://doi.org/10.1109/SEQUEN.1997.666900) and are compared exactly, so nothing below the threshold is ever called
    a duplicate; one above it may be missed, since the signatures are random, more rarely the more similar it is.

    Args:
        threshold: similarity from which texts are near duplicates; above 0, at most 1.
    """

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHashLSH

        self.threshold = threshold
        # Missing a duplicate counts nine times as much as a candidate in vain, which costs one exact comparison; above
        # 0.95 all permutations would fall into one band, which the index refuses.
        self._index: Any = MinHashLSH(min(threshold, 0.95), PERMUTATIONS, weights=(0.1, 0.9))
        self._seen: list[tuple[str, str]] = []  # name and text

    def find(self, text: str, name: str) -> str | None:
        """Return the name of the first earlier text that this one nearly repeats; else None, and remember this one.

        Args:
            text: any.
            name: under which it is remembered.
        """
        from datasketch import MinHash

        mine = shingles(text)
        signature = MinHash(PERMUTATIONS)
        signature.update_batch([shingle.encode() for shingle in sorted(mine)])
        candidates: list[int] = sorted(self._index.query(signature))
        for index in candidates:
            if jaccard(mine, shingles(self._seen[index][1])) >= self.threshold:
                return self._seen[index][0]
        self._index.insert(len(self._seen), signature)
        self._seen.append((name, text))
        return None


def shingles(text: str) -> frozenset[str]:
    """Return the runs of five words of a text; a shorter text is one run."""
    words = text.lower().split()
    return frozenset(" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1)))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Return the share of common members, |A ∩ B| / |A ∪ B|; 1 for two empty sets."""
    union = len(first | second)
    return len(first & second) / union if union else 1.0
