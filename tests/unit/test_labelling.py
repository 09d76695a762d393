"""The archive: one verdict labels a whole cluster of samples, and nothing that no label decides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from trlhf import files
from trlhf.data import LabelledPair
from trlhf.labelling import Archive
from trlhf.types import Label, LabelKind, Prompt, Rollout

EXACT = [Prompt("a", ()), Prompt("b", ()), Prompt("c", ())]
OPEN = Prompt("o", (), task="open", reasoning=False)


def label(prompt_id: str, answer: str | None, outcome: str, kind: LabelKind = "verdict", number: int = 1) -> Label:
    return Label(kind, prompt_id, (f"text {answer}",), answer, outcome, "test", 1.0, "", 1, id=number)


@pytest.fixture
def archive() -> Archive:
    """Four samples of a: 5 in two texts, one of them twice, and 6; two of b; one of c without an answer."""
    kept = Archive([*EXACT, OPEN])
    rows = [("a", "first 5", "5"), ("a", "again 5", "5"), ("a", "again 5", "5"), ("a", "it is 6", "6")]
    rows += [("b", "it is 7", "7"), ("b", "it is 8", "8"), ("c", "I do not know", None)]
    kept.add((Rollout(prompt_id, text, answer=answer) for prompt_id, text, answer in rows), 1)
    return kept


def decided(archive: Archive, *labels: Label) -> dict[str, bool]:
    return {row.response: row.right for row in archive.apply(labels)[0]}


def test_a_right_verdict_decides_every_sample_of_its_prompt(archive: Archive) -> None:
    rows, pairs = archive.apply([label("a", "5", "right", number=3)])
    assert {row.response: row.right for row in rows} == {"first 5": True, "again 5": True, "it is 6": False}
    assert [(row.prompt, row.source) for row in rows] == [(EXACT[0], "label 3")] * 3 and pairs == []


def test_a_wrong_verdict_decides_its_cluster_only(archive: Archive) -> None:
    assert decided(archive, label("a", "5", "wrong")) == {"first 5": False, "again 5": False}
    both = decided(archive, label("a", "5", "wrong"), label("a", "6", "right", number=2))
    assert both == {"first 5": False, "again 5": False, "it is 6": True}


def test_a_label_says_nothing_of_other_prompts(archive: Archive) -> None:
    assert decided(archive, label("b", "9", "wrong")) == {}
    assert decided(archive) == {}
    assert decided(archive, label("stranger", "5", "right")) == {}


def test_two_labels_on_a_prompt_give_each_sample_once(archive: Archive) -> None:
    rows, _ = archive.apply([label("a", "5", "right"), label("a", "6", "wrong", number=2)])
    assert sorted(row.response for row in rows) == ["again 5", "first 5", "it is 6"]


def test_a_gold_label_decides_all_and_no_answer_is_wrong(archive: Archive) -> None:
    assert decided(archive, label("b", None, "7", "gold")) == {"it is 7": True, "it is 8": False}
    assert decided(archive, label("c", "1", "wrong")) == {"I do not know": False}


@pytest.mark.parametrize(("outcome", "preference"), [("A", 1.0), ("B", 0.0), ("tie", 0.5)])
def test_preferences_become_pairs(archive: Archive, outcome: str, preference: float) -> None:
    asked = Label("preference", "o", ("one", "two"), None, outcome, "test", 1.0, "", 1, id=4)
    rows, pairs = archive.apply([asked])
    assert rows == [] and pairs == [LabelledPair(OPEN, "one", "two", preference, "label 4")]


def test_shares_are_of_all_samples_of_the_prompt(archive: Archive) -> None:
    labels = [
        label("a", "5", "right"),
        label("b", "8", "wrong"),
        label("a", None, "5", "gold"),
        label("x", "1", "right"),
    ]
    assert archive.shares(labels) == ([0.75, 0.5], [1.0, 0.0])


def test_shares_are_those_that_the_question_was_chosen_by(archive: Archive) -> None:
    archive.add([Rollout("a", f"now {answer}", answer=answer) for answer in ("5", "6", "7", "7")], 2)
    first, second = label("a", "5", "wrong"), replace(label("a", "7", "right", number=2), round=2)
    assert archive.shares([second, first]) == ([0.75, 2 / 3], [0.0, 1.0])  # 5 of round 1; in round 2, 7 of 6, 7, 7


def test_the_file_holds_all_of_it(archive: Archive, tmp_path: Path) -> None:
    files.write_jsonl(tmp_path / "samples.jsonl", archive.rows())
    again = Archive([*EXACT, OPEN])
    again.load(tmp_path / "samples.jsonl")
    assert again.rows() == archive.rows()
    again.load(tmp_path / "samples.jsonl")  # as a round does that was bought and then prepared
    assert again.rows() == archive.rows()
    assert again.sampled("a") == [{"first 5": ("5", 1), "again 5": ("5", 2), "it is 6": ("6", 1)}]
    assert again.sampled("c") == [{}] and again.sampled("unknown") == []
    labels = [label("a", "5", "right"), label("b", "8", "wrong", number=2)]
    assert again.apply(labels) == archive.apply(labels) and again.shares(labels) == archive.shares(labels)
