"""Contamination: every near duplicate at exactly its level, against brute force; n-grams against plain sets."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import trlhf
from trlhf.compose import compose
from trlhf.config import build_config, plain
from trlhf.contamination.check import run_check, without_offending
from trlhf.contamination.compare import compare
from trlhf.contamination.grams import Buckets, Table, characters, grams
from trlhf.contamination.near import LEVELS, PIECE, allowed, candidates, near_duplicates
from trlhf.contamination.ngrams import ngram_overlaps
from trlhf.contamination.published import data_sets, split_of
from trlhf.contamination.texts import EvaluationItem, TrainingRow, evaluation_items, normalise, training_rows
from trlhf.errors import ConfigError, UserError
from trlhf.files import read_jsonl
from trlhf.fingerprint import differences
from trlhf.rows import Row, read_rows
from trlhf.run import STAGES, RunDirectory, planned
from trlhf.tasks import Task, load_task
from trlhf.types import Demonstration, Prompt

WORDS = [
    "the",
    "a",
    "boat",
    "carries",
    "seven",
    "red",
    "apples",
    "to",
    "market",
    "before",
    "noon",
    "when",
    "rain",
    "falls",
]


def sentence(rng: random.Random, length: int) -> str:
    """Return a text of exactly that many characters."""
    text = rng.choice(WORDS)
    while len(text) < length:
        text += " " + rng.choice(WORDS)
    return text[: length - 1] + "."


def edited(rng: random.Random, text: str, edits: int) -> str:
    """Return a text after some random insertions, deletions and substitutions."""
    for _ in range(edits):
        i, letter = rng.randrange(len(text)), rng.choice("abcdefgh ")
        text = rng.choice([text[:i] + letter + text[i:], text[:i] + text[i + 1 :], text[:i] + letter + text[i + 1 :]])
    return text


def textbook_distance(one: str, other: str) -> int:
    """Wagner and Fischer 1974, row by row."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        above, row = row, [i]
        for j, b in enumerate(other, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def brute_force(train: Sequence[str], test: Sequence[str]) -> dict[tuple[str, str], int]:
    """Compare every pair; only lengths that differ too much are left out."""
    found = {}
    for one in train:
        for other in test:
            longer = max(len(one), len(other))
            if 100 * abs(len(one) - len(other)) <= 3 * longer:
                distance = textbook_distance(one, other)
                if 100 * distance <= 3 * longer:
                    found[one, other] = distance
    return found


def row(text: str, place: str = "train:1") -> TrainingRow:
    return TrainingRow("sft", place, (text,), (), text)


def item(text: str, place: str = "test:1", answer: str = "") -> EvaluationItem:
    return EvaluationItem("test", place, text, answer, f"{text} {answer}" if answer else "")


# ---- near duplicates ----


def test_a_brute_force_comparison_finds_the_same() -> None:
    rng = random.Random(0)
    test = [sentence(rng, length) for length in (20, 32, 33, 34, 50, 64, 65, 66, 67, 99, 100, 101, 133, 150) * 2]
    train = [edited(rng, text, rng.randrange(6)) for text in test for _ in range(8)]
    train += [text[: rng.randrange(1, len(text))] + "?" for text in test] + test[:3] + ["", "x"]
    found = [(match.train, match.test, match.distance) for match in near_duplicates(train, test)]
    expected = brute_force(list(dict.fromkeys(text for text in train if text)), test)
    assert len(found) == len(set(found))
    assert {(one, other): distance for one, other, distance in found} == expected
    assert {d for d in expected.values()} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("edits", "level"), [(0, 100), (1, 99), (2, 99), (3, 98), (4, 98), (5, 97), (6, 97), (7, None), (8, None)]
)
def test_a_planted_copy_is_found_at_exactly_its_level(edits: int, level: int | None) -> None:
    rng = random.Random(edits)
    text = sentence(rng, 200)
    copy = list(text)
    for i in rng.sample(range(len(copy)), edits):
        copy[i] = "#"  # stands nowhere else, so that no shorter way leads from one to the other
    train = [sentence(rng, rng.randrange(150, 250)) for _ in range(50)] + ["".join(copy)]
    found = list(near_duplicates(train, [text]))
    assert [match.level for match in found] == ([level] if level else [])
    assert [match.distance for match in found] == ([edits] if level else [])


def test_edits_at_the_worst_places_hide_nothing() -> None:
    """One edit in every other piece, and in all pieces but the last that can still be unharmed."""
    rng = random.Random(1)
    for length in (33, 48, 65, 96, 160, 400, 1000):
        text = sentence(rng, length)
        most = allowed(length)
        for start in range(length // PIECE - most + 1):
            broken = list(text)
            for piece in range(start, start + most):
                broken[piece * PIECE + rng.randrange(PIECE)] = "#"
            assert list(candidates(["".join(broken)], [text])) == [(0, 0)], (length, start)


@pytest.mark.parametrize("length", [33, 65, 97])
def test_a_longer_copy_may_hold_one_edit_more(length: int) -> None:
    """3% of what the insertions make of a text is one character more than 3% of the text."""
    text = sentence(random.Random(7), length)
    edits = allowed(100 * length // 97)
    assert edits == allowed(length) + 1
    for first in range(PIECE):
        copy = list(text)
        for piece in range(edits):
            copy[first + piece * PIECE] += "#"
        assert [match.distance for match in near_duplicates(["".join(copy)], [text])] == [edits], first


def test_there_are_always_more_pieces_than_edits() -> None:
    for length in range(1, 20_000):
        edits = allowed(100 * length // LEVELS[-1])
        assert edits == 0 or length // PIECE >= edits + 1


def test_what_many_texts_begin_with_hides_nothing() -> None:
    """The rarest pieces are looked up, and common ones are where a text has no others."""
    rng = random.Random(2)
    head = sentence(rng, 120)
    test = [head + sentence(rng, 40) for _ in range(6)]
    train = [head + sentence(rng, 40) for _ in range(6)] + [edited(rng, text, 4) for text in test]
    found = {(match.train, match.test): match.distance for match in near_duplicates(train, test)}
    assert found == brute_force(train, test) and len(found) >= 6


def test_short_texts_match_only_when_equal() -> None:
    assert [(m.train, m.level) for m in near_duplicates(["what is 2 + 3?", "what is 2 + 4?"], ["what is 2 + 3?"])] == [
        ("what is 2 + 3?", 100)
    ]
    assert not list(near_duplicates(["", "a"], ["", "b"]))
    assert not list(near_duplicates([], ["a" * 50])) and not list(near_duplicates(["a" * 50], []))


def test_every_sign_of_unicode_can_be_compared() -> None:
    text = "Ж 漢字 😀 \ud800 " * 20
    assert [match.distance for match in near_duplicates([text + "x"], [text])] == [1]


# ---- the pieces below ----


def test_grams_do_not_cross_from_one_text_into_the_next() -> None:
    found = grams([characters("abcd"), characters("bc"), characters("x"), characters("dabc")], 2, first=5)
    assert found.owners.tolist() == [5, 5, 5, 6, 8, 8, 8]
    assert found.positions.tolist() == [0, 1, 2, 0, 0, 1, 2]
    names = ["ab", "bc", "cd", "bc", "da", "ab", "bc"]
    same = {(a, b) for a in range(7) for b in range(7) if found.hashes[a] == found.hashes[b]}
    assert same == {(a, b) for a in range(7) for b in range(7) if names[a] == names[b]}
    hits, numbers = Table(found.hashes[:2]).hits(found)
    assert hits.positions.tolist() == [0, 1, 0, 1, 2] and len(set(numbers.tolist())) == 2


def test_buckets_pair_every_query_with_every_entry_in_bounded_portions() -> None:
    import numpy as np

    buckets = Buckets(np.array([2, 0, 2, 2]), 3)
    queries = np.array([0, 1, 2, 2, 0])
    portions = list(buckets.pairs(queries, most=3))
    pairs = [pair for k, entry in portions for pair in zip(k.tolist(), entry.tolist(), strict=True)]
    assert pairs == [(0, 1), (2, 0), (2, 2), (2, 3), (3, 0), (3, 2), (3, 3), (4, 1)]
    assert [len(k) for k, _ in portions] == [1, 3, 3, 1]


# ---- n-grams ----


def test_ngrams_agree_with_plain_sets() -> None:
    rng = random.Random(3)
    train = [" ".join(rng.choices(WORDS[:5], k=rng.randrange(1, 60))) for _ in range(40)]
    test = [" ".join(rng.choices(WORDS[:5], k=rng.randrange(1, 30))) for _ in range(30)] + ["one, TWO; three"]

    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.replace(",", " ").replace(";", " ").split()
        return {tuple(words[i : i + 4]) for i in range(len(words) - 3)}

    overlaps = ngram_overlaps(train, test, 4, 0.3)
    everything = set[tuple[str, ...]]().union(*map(runs, train))
    assert overlaps.grams.tolist() == [len(runs(text)) for text in test]
    assert overlaps.found.tolist() == [len(runs(text) & everything) for text in test]
    shares = {
        (i, j): len(runs(one) & runs(other)) / len(runs(other))
        for i, one in enumerate(train)
        for j, other in enumerate(test)
        if runs(other)
    }
    assert overlaps.pairs == {pair: share for pair, share in shares.items() if share >= 0.3}
    assert 0 < len(overlaps.pairs) < len(shares) / 2


def test_a_question_inside_a_longer_turn_is_found_by_its_ngrams() -> None:
    question = normalise("Natalia sold clips to 48 of her friends in April, and then she sold half as many in May.")
    train = [row(f"please solve this carefully: {question} think step by step and answer", "a:1"), row("hello " * 30)]
    findings = compare(train, [item(question), item("too short", "test:2")], 13, 0.7)
    (offence,) = findings.offences()
    assert (offence.row, offence.level, offence.overlap, offence.compared) == ("a:1", None, 1.0, "question")
    counts = findings.counts()["sets"]["test"]
    assert counts["ngrams"] == {"items_any": 1, "items": 1, "rows": 1, "items_too_short": 1}
    assert not compare(train, [item(question)], 0, 0.7).offences()


# ---- what is compared ----


def test_case_width_and_spacing_do_not_matter() -> None:
    assert normalise("  What\u00a0IS\n\n\uff12 + 3?") == "what is 2 + 3?"
    assert normalise("What is 2 + 3!") != normalise("What is 2 + 3?")


def test_every_turn_of_a_row_is_compared_and_the_system_line_is_not() -> None:
    chat: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "Second?"},
        {"role": "assistant", "content": "4*7 = <<4*7=28>>28\n#### 28"},
    ]
    unrolled = [Demonstration(tuple(chat[:end]), f"chats.jsonl:3 turn {n}") for n, end in ((1, 3), (2, 5))]
    pool = Prompt("pool.jsonl:1", tuple(chat[1:2]))
    two, one = training_rows(Task(unrolled, [pool], [], {}))
    worked = "plan: multiply. 4*7 = 28. the answer is 28."
    assert (two.place, two.questions) == ("chats.jsonl:3", ("first?", "second?"))
    assert two.wholes == ("first? one.", f"second? {worked}", f"first? one. second? {worked}")
    assert "brief" not in two.document and (one.part, one.questions, one.wholes) == ("pool", ("first?",), ())


def test_evaluation_rows_of_every_shape_become_items() -> None:
    rows = [
        Row("a:1", {"question": "Which?", "passage": "A text.", "options": ["(A) x", "(B) y"], "label": "A"}),
        Row("a:2", {"question": "Which?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answer": 1}),
        Row("a:3", {"question": "How many?", "answer": "Two.\n#### 2"}),
        Row("a:4", {"text": "nothing"}),
    ]
    items, report = evaluation_items(rows, "suite")
    assert [one.question for one in items] == ["a text. which? (a) x (b) y", "which? x y", "how many?"]
    assert [one.answer for one in items] == ["", "", "plan: work it out in one step. two. the answer is 2."]
    assert items[2].whole == f"how many? {items[2].answer}" and not items[0].whole
    assert list(report.dropped.values()) == [["a:4"]]
    with pytest.raises(UserError, match=r"check.against: suite has no row with a question \(a:4: missing 'messages'"):
        evaluation_items(rows[3:], "suite")


XY = {"text": ["x", "y"], "label": ["A", "B"]}
QUERY = "Sky.Q: Which? Answer Choices: (A)x\nA: Among A through D, the answer is"
PUBLISHED: list[tuple[dict[str, Any], str, str]] = [
    ({"query": QUERY, "choices": [], "gold": [0]}, "sky. which? answer choices: (a)x", ""),
    ({"question": "Which?", "choices": XY, "answerKey": "B"}, "which? x y", ""),
    ({"question_stem": "Which", "choices": XY, "answerKey": "B"}, "which x y", ""),
    ({"question": "is it so", "passage": "A text.", "label": 1}, "a text. is it so", ""),
    ({"ctx": "He runs", "endings": ["off.", "home."], "label": "1"}, "he runs", "home."),
    ({"ctx": "He runs", "endings": ["off.", "home."], "label": ""}, "he runs", ""),
    ({"goal": "Dry it", "sol1": "by air", "sol2": "by fire", "label": 0}, "dry it", "by air"),
    ({"sentence": "It fits _ well.", "option1": "it", "option2": "me", "answer": "1"}, "it fits _ well.", ""),
    ({"problem": "Halve 1.", "solution": "A half."}, "halve 1.", "a half."),
    ({"prompt": "def f():", "canonical_solution": "  return 1", "task_id": "x"}, "def f():", "return 1"),
    ({"input": "not True is", "target": "False"}, "not true is", "false"),
    ({"prompt": ["Write.", "Shorter."], "category": "writing"}, "write.", ""),
    ({"question": "Why?", "best_answer": "So.", "correct_answers": ["So."]}, "why?", ""),
    ({"question": "Which?", "choices": ["x", "y"], "answer": 1, "subject": "law"}, "which? x y", ""),
]


@pytest.mark.parametrize(("row", "question", "answer"), PUBLISHED)
def test_rows_of_published_evaluation_sets_become_items(row: dict[str, Any], question: str, answer: str) -> None:
    (found,), _ = evaluation_items([Row("a:1", row)], "suite")
    assert (found.question, found.answer) == (question, answer)


def test_a_suite_names_all_data_behind_it_and_the_split_that_is_asked() -> None:
    assert len(data_sets("agieval")) == 8 and "hails/agieval-sat-en" in data_sets("agieval")
    assert len(data_sets("bbh")) == 27 and "SaylorTwift/bbh:word_sorting" in data_sets("bbh")
    assert {"allenai/ai2_arc:ARC-Easy", "aps/super_glue:boolq", "baber/piqa"} < set(data_sets("gpt4all"))
    assert data_sets("truthfulqa") == ["truthfulqa/truthful_qa:multiple_choice"]
    assert data_sets("owner/name") == [] == data_sets("mt-bench")
    assert split_of("baber/piqa") == "validation" and split_of("cais/mmlu:all") == "test"


def test_configurations_and_splits_are_those_that_lm_eval_asks() -> None:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    from trlhf.evaluation.harness import TASKS
    from trlhf.evaluation.suites import SUITES

    for suite in ("open-llm-v1", "gpt4all", "agieval", "truthfulqa", "bbh"):
        for task in SUITES[suite].tasks:
            index = TaskManager(include_path=[TASKS / task.folder], include_defaults=False).task_index
            found = load_yaml(index[task.members[0]].yaml_path, resolve_func=False)
            named = [source for source in data_sets(suite) if source.partition(":")[0] == task.data]
            configurations = {source.partition(":")[2] for source in named}
            assert task.name == "mmlu" or str(found.get("dataset_name") or "") in configurations, task
            assert split_of(task.data) == ("test" if found.get("test_split") else found["validation_split"]), task


def test_the_closest_item_of_each_set_is_listed_once_a_row() -> None:
    rng = random.Random(4)
    text = sentence(rng, 200)
    near, nearer = "#####" + text[5:], "#" + text[1:]
    items = [item(near, "test:1"), item(nearer, "test:2"), EvaluationItem("other", "x:1", near, "", "")]
    offences = compare([row(text, "a:1"), row(nearer, "a:2")], items, 0, 0.7).offences()
    assert [(one.row, one.source, one.item, one.level) for one in offences] == [
        *(("a:1", "other", "x:1", 97), ("a:1", "test", "test:2", 99)),
        *(("a:2", "other", "x:1", 98), ("a:2", "test", "test:2", 100)),
    ]


# ---- the stage ----


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def planted(tmp_path: Path) -> dict[str, str]:
    """Own data; rows 1 to 4 of the demonstrations stand in the test set at the four levels, row 5 just below."""
    rng = random.Random(5)
    questions = [sentence(rng, 200) for _ in range(12)]
    copies = ["#" * edits + question[edits:] for edits, question in zip((0, 2, 4, 6, 8), questions, strict=False)]
    clean = [sentence(rng, 200) for _ in range(7)]
    answer = {"answer": "2 + 3 = <<2+3=5>>5\n#### 5"}
    return {
        "sft": write(tmp_path / "sft.jsonl", [{"question": text, **answer} for text in copies + clean]),
        "pool": write(tmp_path / "pool.jsonl", [{"question": text, **answer} for text in [questions[9], *clean]]),
        "test": write(tmp_path / "test.jsonl", [{"question": text, **answer} for text in questions]),
    }


def overrides(planted: dict[str, str], run: Path, *more: str) -> list[str]:
    return ["data=file", *(f"data.{part}={path}" for part, path in planted.items()), f"run.dir={run}", *more]


def test_the_stage_lists_what_was_planted_and_nothing_else(
    planted: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    done = trlhf.run(overrides(planted, run, "stage=check"))
    listed = [json.loads(line) for line in (run / "check" / "offending.jsonl").read_text().splitlines()]
    assert [(one["part"], one["row"], one["item"], one["level"]) for one in listed] == [
        *(("sft", f"sft.jsonl:{n}", f"test.jsonl:{n}", 101 - n) for n in (1, 2, 3, 4)),
        ("sft", "sft.jsonl:5", "test.jsonl:5", None),  # 96%, but most of its n-grams
        ("pool", "pool.jsonl:1", "test.jsonl:10", 100),
    ]
    metrics = json.loads((run / "check" / "metrics.json").read_text())
    assert metrics["offending"] == {"sft": 5, "pool": 1} and metrics["training"] == {"sft": 12, "pool": 8}
    assert {level: count["items"] for level, count in metrics["sets"]["test"]["levels"].items()} == {
        **{"100": 2, "99": 1, "98": 1, "97": 1}
    }
    assert done.summary["contamination"] == metrics and (run / "check" / "done").exists()
    assert not (run / "sft").exists()
    shown = capsys.readouterr().out
    assert "Evaluation items that stand in the training data" in shown and "5 of 12 sft, 1 of 8 pool" in shown


def test_no_torch_is_loaded(planted: dict[str, str], tmp_path: Path) -> None:
    code = (
        f"import sys, trlhf; trlhf.run({overrides(planted, tmp_path / 'run', 'stage=check')!r}); "
        "sys.exit(str({'torch', 'transformers', 'datasets'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "" and (tmp_path / "run" / "check" / "done").exists()


def test_against_names_other_sets(planted: dict[str, str], tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", [{"prompt": read_rows(planted["pool"])[1].data["question"]}])
    more = ("stage=check", f"check.against=[{other}]", "data.test=null", "check.ngram=0")
    sets = trlhf.run(overrides(planted, tmp_path / "run", *more)).summary["contamination"]["sets"]
    assert list(sets) == [other] and sets[other]["levels"]["100"] == {"items": 1, "rows": 2}  # in the pool and in sft


def test_the_embedded_world_shares_no_question_with_its_test(tmp_path: Path) -> None:
    found = trlhf.run(["stage=check", f"run.dir={tmp_path / 'run'}"]).summary["contamination"]["sets"]["test"]
    assert found["items"] == 400 and found["levels"]["100"] == {"items": 0, "rows": 0}


def test_what_is_listed_is_left_out_and_counted(planted: dict[str, str], tmp_path: Path) -> None:
    config = compose(overrides(planted, tmp_path / "run", "data.decontaminate=true")).configs[0]
    task, stage = load_task(config), RunDirectory(tmp_path / "run").stage("check")
    with pytest.raises(UserError, match=r"check/offending\.jsonl is missing; make it first with: .* stage=check"):
        without_offending(task, stage)
    run_check(config, task, stage)
    left = without_offending(task, stage)
    assert [one.source for one in left.demonstrations] == [f"sft.jsonl:{n}" for n in range(6, 13)]
    assert [prompt.id for prompt in left.pool] == [f"pool.jsonl:{n}" for n in range(2, 9)] and left.test == task.test
    sft, pool = left.reports
    assert (sft.read, sft.kept, pool.read, pool.kept) == (12, 7, 8, 7)
    assert sft.dropped["99% similar to an item of test (data.decontaminate)"] == ["sft.jsonl:2"]
    assert sft.dropped["by its n-grams close to an item of test (data.decontaminate)"] == ["sft.jsonl:5"]
    only = replace(task, demonstrations=task.demonstrations[:5])
    with pytest.raises(
        UserError, match=r"leaves no row for sft: all 5 are too close to an evaluation item \(listed in"
    ):
        without_offending(only, stage)


def test_the_check_goes_before_the_stages_that_learn() -> None:
    stages = {"all": ("check", *STAGES), "sft": ("check", "sft"), "rl": ("check", "rl"), "eval": ("eval",)}
    for stage, expected in stages.items():
        assert planned(build_config({"stage": stage, "data": {"decontaminate": True}})) == expected
    assert planned(build_config({})) == STAGES and planned(build_config({"stage": "check"})) == ("check",)


def test_other_sets_make_another_check_but_leave_the_stages_alone() -> None:
    old = build_config({})
    new = build_config({"check": {"ngram": 8}})
    assert differences("check", ["check", "sft"], plain(old), plain(new)) == ["check.ngram was 13, now 8"]
    assert not differences("check", ["sft"], plain(old), plain(new))
    assert not differences("sft", ["check"], plain(build_config({"sft": {"epochs": 1.0}})), plain(new))
    fewer = build_config({"data": {"sft_prompts": 9}})  # a card must not tell of other data than were learned from
    assert differences("check", ["sft"], plain(old), plain(fewer)) == ["data.sft_prompts was 600, now 9"]
    assert differences("sft", ["check"], plain(old), plain(fewer)) == ["data.sft_prompts was 600, now 9"]
    assert not differences("rl", ["check"], plain(old), plain(fewer))
    assert not differences("eval", ["check"], plain(old), plain(fewer))
    cleaned = build_config({"data": {"decontaminate": True}})
    for stage in ("sft", "reward", "rl"):
        assert differences(stage, [stage], plain(old), plain(cleaned)) == ["data.decontaminate was False, now True"]


def test_a_suite_is_compared_by_its_name(planted: dict[str, str], tmp_path: Path) -> None:
    """From one mirror: BoolQ has the text of a training row as its passage, in the split that is asked."""
    taken = json.loads(Path(planted["sft"]).read_text().splitlines()[7])["question"]
    for name in (source.partition(":")[0] for source in data_sets("gpt4all")):
        folder = tmp_path / "mirror" / name
        folder.mkdir(parents=True, exist_ok=True)
        split = split_of(name)
        passage = taken if name == "aps/super_glue" else "Another text, of which nobody has learned anything at all."
        write(folder / f"{split}.jsonl", [{"question": "So?", "passage": passage}])
        files = f"  data_files:\n  - split: {split}\n    path: {split}.jsonl\n"
        sets = [source.partition(":")[2] or "default" for source in data_sets("gpt4all") if source.startswith(name)]
        configs = "".join(f"- config_name: {one}\n{files}" for one in sets)
        (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    asked = ["stage=check", f"data.mirror={tmp_path / 'mirror'}", "check.against=[gpt4all]"]
    found = trlhf.run(overrides(planted, tmp_path / "run", *asked)).summary["contamination"]["sets"]
    assert list(found) == ["gpt4all"] and (found["gpt4all"]["items"], found["gpt4all"]["rows"]) == (7, 2)
    listed = read_jsonl(tmp_path / "run/check/offending.jsonl")
    assert [(one["part"], one["row"]) for one in listed] == [("sft", "sft.jsonl:8"), ("pool", "pool.jsonl:4")]
    assert {one["item"] for one in listed} == {"aps/super_glue:boolq, super_glue validation row 1"}


def test_contradictions_are_named(planted: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        trlhf.run(["data=file", "stage=check", "check.against=[test,nowhere.jsonl]"])
    told = str(error.value)
    assert "data.sft, data.pool and data.labels are missing, but stage=check compares the training data" in told
    assert "data.test is missing, but stage=check compares the training data with it; give data.test=FILE" in told
    assert "check.against=[test,nowhere.jsonl]: nowhere.jsonl does not exist" in told
    with pytest.raises(ConfigError, match=r"check\.against=\[agivall\]: .*did you mean agieval"):
        trlhf.run(["data=file", f"data.sft={planted['sft']}", "stage=check", "check.against=[agivall]"])
    with pytest.raises(ConfigError, match=r"data\.test is missing, but data.decontaminate=true compares"):
        trlhf.run(["data=file", f"data.sft={planted['sft']}", "stage=sft", "data.decontaminate=true"])


# ---- real text ----


def test_gsm8k_has_what_brute_force_finds_and_no_more(shared_data: Callable[[str], Path]) -> None:
    """Questions alone and with their solutions; and, so that there is something to find, training rows after edits."""
    from rapidfuzz.distance import Levenshtein

    rng = random.Random(6)
    files = [shared_data(f"gsm8k/{split}.jsonl") for split in ("train", "test")]
    for view in ("question", "whole"):
        train, test = (
            list(dict.fromkeys(getattr(one, view) for one in evaluation_items(read_rows(path), "")[0]))
            for path in files
        )
        by_length: dict[int, list[str]] = {}
        for text in train:
            by_length.setdefault(len(text), []).append(text)

        def closest(other: str, by_length: dict[int, list[str]] = by_length) -> dict[tuple[str, str], int]:
            found = {}
            for length, texts in by_length.items():
                most = 3 * max(length, len(other)) // 100
                for one in texts if abs(length - len(other)) <= most else ():
                    if (distance := Levenshtein.distance(one, other, score_cutoff=most)) <= most:
                        found[one, other] = distance
            return found

        real = {(match.train, match.test): match.distance for match in near_duplicates(train, test)}
        assert real == {pair: distance for other in test for pair, distance in closest(other).items()}
        copies = [edited(rng, text, rng.randrange(len(text) // 20)) for text in rng.sample(train, 300)]
        planted = {(match.train, match.test): match.distance for match in near_duplicates(train, copies)}
        assert planted == {pair: distance for other in copies for pair, distance in closest(other).items()}
        assert 100 < len(planted) < 250 and 3 * len(real) < len(planted)
