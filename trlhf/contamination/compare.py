"""Which training rows are too close to which evaluation items, and how many items of each set are met."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from trlhf.contamination.near import LEVELS, Match, near_duplicates
from trlhf.contamination.ngrams import ngram_overlaps
from trlhf.contamination.texts import EvaluationItem, Part, TrainingRow

SHOWN = 200  # characters of a text in the list


@dataclass(frozen=True)
class Offence:
    """A training row and the item of an evaluation set that it is closest to.

    Attributes:
        part: ``sft``, ``pool`` or ``labels``.
        row: place of the training row.
        source: evaluation set.
        item: place of the item in it.
        level: 100, 99, 98 or 97; None where only n-grams agree.
        similarity: of the two texts, by edit distance; None as above.
        overlap: share of the item's n-grams that the row holds; None below the share that is asked for.
        compared: which text of the item: ``question`` or ``whole``; with n-grams alone ``question`` or ``answer``.
        train: start of the training text.
        test: start of the item's text.
    """

    part: Part
    row: str
    source: str
    item: str
    level: int | None
    similarity: float | None
    overlap: float | None
    compared: str
    train: str
    test: str


@dataclass
class Findings:
    """What a comparison found.

    Attributes:
        rows: the training rows.
        items: the evaluation items.
        nearest: (number of a row, evaluation set) → the closest item; by similarity first, then by n-grams.
        levels: number of an item → the highest level at which any row meets it.
        dirty: items with any n-gram in the training data.
        overlapping: items of which one row holds the share of n-grams that was asked for.
        short: items without an n-gram.
    """

    rows: Sequence[TrainingRow]
    items: Sequence[EvaluationItem]
    nearest: dict[tuple[int, str], Offence] = field(default_factory=dict)
    levels: dict[int, int] = field(default_factory=dict)
    dirty: set[int] = field(default_factory=set)
    overlapping: set[int] = field(default_factory=set)
    short: set[int] = field(default_factory=set)

    def offences(self) -> list[Offence]:
        """Return one offence for each training row and evaluation set, in the order of the rows."""
        return [self.nearest[key] for key in sorted(self.nearest)]

    def counts(self) -> dict[str, Any]:
        """Return, for each evaluation set, how many items and rows are concerned; and how many rows in all."""
        sets = {source: self._counts_of(source) for source in dict.fromkeys(item.source for item in self.items)}
        offending = Counter(self.rows[i].part for i in {i for i, _ in self.nearest})
        parts = Counter(row.part for row in self.rows)
        return {"training": dict(parts), "offending": {part: offending[part] for part in parts}, "sets": sets}

    def _counts_of(self, source: str) -> dict[str, Any]:
        mine = {j for j, item in enumerate(self.items) if item.source == source}
        rows = [one for (_, name), one in self.nearest.items() if name == source]
        return {
            "items": len(mine),
            "levels": {
                str(level): {
                    "items": sum(self.levels.get(j) == level for j in mine),
                    "rows": sum(one.level == level for one in rows),
                }
                for level in LEVELS
            },
            "ngrams": {
                "items_any": len(mine & self.dirty),
                "items": len(mine & self.overlapping),
                "rows": sum(one.overlap is not None for one in rows),
                "items_too_short": len(mine & self.short),
            },
            "rows": len(rows),
        }


def compare(rows: Sequence[TrainingRow], items: Sequence[EvaluationItem], n: int, share: float) -> Findings:
    """Compare every training row with every evaluation item.

    Args:
        rows: of the training data.
        items: of all evaluation sets.
        n: words in an n-gram; 0: n-grams are not compared.
        share: of an item's n-grams that a row must hold to be listed for them.
    """
    findings = Findings(rows, items)
    ours = {"question": _by_text(row.questions for row in rows), "whole": _by_text(row.wholes for row in rows)}
    theirs = {
        "question": _by_text([item.question] for item in items),
        "whole": _by_text([item.whole] for item in items),
    }
    for view in ours:
        for match in near_duplicates(ours[view], theirs[view]):
            _note(findings, match, view, ours[view][match.train], theirs[view][match.test])
    if n:
        _note_overlaps(findings, n, share)
    return findings


def _by_text(texts: Iterable[Iterable[str]]) -> dict[str, list[int]]:
    """Return text → who has it."""
    owners: defaultdict[str, list[int]] = defaultdict(list)
    for number, owned in enumerate(texts):
        for text in owned:
            if text:
                owners[text].append(number)
    return dict(owners)


def _note(findings: Findings, match: Match, view: str, rows: Sequence[int], items: Sequence[int]) -> None:
    """Note a match of two texts for everyone who has them."""
    first: dict[str, int] = {}
    for j in items:
        findings.levels[j] = max(match.level, findings.levels.get(j, 0))
        first.setdefault(findings.items[j].source, j)
    for source, j in first.items():
        place, texts = findings.items[j].place, (match.train[:SHOWN], match.test[:SHOWN])
        for i in rows:
            known = findings.nearest.get((i, source))
            if known is None or match.similarity > (known.similarity or 0):
                row = findings.rows[i]
                findings.nearest[i, source] = Offence(
                    row.part, row.place, source, place, match.level, match.similarity, None, view, *texts
                )


def _note_overlaps(findings: Findings, n: int, share: float) -> None:
    texts = [
        (j, view, text)
        for j, item in enumerate(findings.items)
        for view, text in (("question", item.question), ("answer", item.answer))
        if text
    ]
    overlaps = ngram_overlaps([row.document for row in findings.rows], [text for *_, text in texts], n, share)
    owners = np.array([j for j, *_ in texts])
    findings.dirty |= set(owners[overlaps.found > 0].tolist())
    findings.short |= set(range(len(findings.items))) - set(owners[overlaps.grams > 0].tolist())
    for (i, k), held in sorted(overlaps.pairs.items(), key=lambda pair: (-pair[1], pair[0])):  # the greatest first
        j, view, text = texts[k]
        row, item = findings.rows[i], findings.items[j]
        findings.overlapping.add(j)
        known = findings.nearest.get((i, item.source))
        if known is None:
            findings.nearest[i, item.source] = Offence(
                *(row.part, row.place, item.source, item.place, None, None, held, view),
                *(row.document[:SHOWN], text[:SHOWN]),
            )
        elif known.item == item.place and known.overlap is None:
            findings.nearest[i, item.source] = replace(known, overlap=held)
