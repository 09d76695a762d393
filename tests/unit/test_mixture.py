"""Mixtures: weights, caps, filters, near duplicates, and that every row is accounted for."""

from __future__ import annotations

import json
import logging
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trlhf.compose import compose
from trlhf.config import Config, FilterConfig, build_config, plain
from trlhf.data_report import SourceReport, print_report, write_report
from trlhf.duplicates import NearDuplicates, jaccard, shingles
from trlhf.errors import ConfigError, UserError
from trlhf.fingerprint import differences
from trlhf.sft.filters import ChatFilter
from trlhf.sft.mixture import mixed_demonstrations
from trlhf.tasks import load_task
from trlhf.types import Message, RowReport

Write = Callable[..., str]
EXACT = {"labeler": {"name": "exact"}, "targeting": {"preference_share": 0}, "stage": "sft"}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(name: str, *rows: dict[str, Any]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(tmp_path / name)

    return _write


def said(*contents: str) -> dict[str, Any]:
    """Return a chat whose turns are these."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


def numbered(name: str, count: int) -> list[dict[str, Any]]:
    return [said(f"{name} {i}?", f"{name} answer {i}") for i in range(count)]


def configured(mixture: dict[str, Any], seed: int = 0, **data: Any) -> Config:
    filters = data.pop("filters", {})
    values = {"name": "file", "mixture": mixture, "filters": filters, "sft_prompts": 0, **data}
    return build_config({**EXACT, "seed": seed, "data": values})


def questions(found: Any) -> list[str]:
    return [demonstration.messages[-2]["content"] for demonstration in found]


def reported(reports: Any) -> dict[str, tuple[int, int, int]]:
    return {report.name: (report.read, report.kept, report.demonstrations) for report in reports}


def test_weights_and_caps(write: Write) -> None:
    mixture = {
        "a": {"path": write("a.jsonl", *numbered("a", 10)), "weight": 2},
        "b": {"path": write("b.jsonl", *numbered("b", 10)), "weight": 0.5},
        "c": {"path": write("c.jsonl", *numbered("c", 10)), "cap": 3},
        "d": {"path": write("d.jsonl", *numbered("d", 4)), "weight": 1.5, "cap": 8},
    }
    found, reports = mixed_demonstrations(configured(mixture))
    times = Counter(questions(found))
    assert {times[f"a {i}?"] for i in range(10)} == {2}
    assert sum(times[f"b {i}?"] for i in range(10)) == 5 and max(times[f"b {i}?"] for i in range(10)) == 1
    assert sum(times[f"c {i}?"] for i in range(10)) == 3
    assert sorted(times[f"d {i}?"] for i in range(4)) == [1, 1, 2, 2]
    assert reported(reports) == {"a": (10, 10, 20), "b": (10, 5, 5), "c": (10, 3, 3), "d": (4, 4, 6)}
    dropped = {
        report.source[-7]: {reason: len(places) for reason, places in report.dropped.items()} for report in reports
    }
    assert dropped == {
        "a": {},
        "b": {"weight=0.5; drawn at random": 5},
        "c": {"more than cap=3; drawn at random": 7},
        "d": {},
    }
    for report in reports:
        assert report.read == report.kept + sum(map(len, report.dropped.values())), "every row is accounted for"
    assert mixed_demonstrations(configured(mixture)) == (found, reports)
    assert questions(mixed_demonstrations(configured(mixture, seed=1))[0]) != questions(found)


def test_a_cap_draws_every_row_alike(write: Write) -> None:
    path = write("a.jsonl", *numbered("a", 5))
    counts: Counter[str] = Counter()
    for seed in range(400):
        counts.update(questions(mixed_demonstrations(configured({"a": {"path": path, "cap": 2}}, seed))[0]))
    assert len(counts) == 5 and all(abs(count - 160) < 50 for count in counts.values())  # 5 standard deviations


def test_a_large_file_with_a_cap_never_stands_in_memory(tmp_path: Path) -> None:
    """20 MB of chats, of which ten are kept: what is held at any moment is a twentieth of the file."""
    path, text = tmp_path / "large.jsonl", "one two three " * 280
    with path.open("w") as file:
        for i in range(5000):
            file.write(json.dumps(said(f"a {i}?", text)) + "\n")
    config = configured({"a": {"path": str(path), "cap": 10}}, filters={"drop_matching": ["^a .*7"]})
    tracemalloc.start()
    try:
        found, (report,) = mixed_demonstrations(config)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (report.read, report.kept, len(found)) == (5000, 10, 10)
    assert peak < path.stat().st_size / 20, peak


def test_malformed_rows_are_counted_and_a_useless_source_is_refused(write: Write) -> None:
    good, bad = said("a", "b"), {"text": "no chat"}
    mixture = {"a": {"path": write("a.jsonl", good, bad, said("only a question"))}}
    found, (report,) = mixed_demonstrations(configured(mixture))
    assert questions(found) == ["a"]
    assert {reason[:20]: places for reason, places in report.dropped.items()} == {
        "missing 'messages' (": ["a.jsonl:2"],
        "no response to learn": ["a.jsonl:3"],
    }
    mixture["b"] = {"path": write("b.jsonl", bad, bad)}
    with pytest.raises(UserError, match=r"b\.jsonl line 1: missing 'messages'.*found 'text'.*None of the 2 rows of"):
        mixed_demonstrations(configured(mixture))


def test_worked_solutions_stay_as_they_are_unless_asked(write: Write) -> None:
    path = write("a.jsonl", {"query": "2+3?", "response": "2+3 = <<2+3=5>>5\n#### 5"})
    for native, text in ((False, "2+3 = <<2+3=5>>5\n#### 5"), (True, "Plan: add. 2+3 = 5. The answer is 5.")):
        (found,), _ = mixed_demonstrations(configured({"a": {"path": path, "native": native}}))
        assert found.messages[-1]["content"] == text and found.kind == "a"


# ---- filters ----

LONG = said("Please count for me?", "one two three four five six seven eight nine ten " * 9)
ENGLISH = said("What is the weather like in the mountains today?", "It is sunny, and there is hardly any wind.")
GERMAN = said("Wie ist heute das Wetter in den Bergen?", "Es ist sonnig, und es weht kaum ein Wind.")
TWO = said("Name a fruit.", "Plum.", "And another one?", "Pear.")
RUDE = said("Are you a robot?", "As an AI language model, I cannot say.")


@pytest.mark.parametrize(
    ("filters", "kept", "reason"),
    [
        ({"min_turns": 2}, ["And another one?"], "fewer responses than data.filters.min_turns=2"),
        ({"languages": ["de"]}, ["Wie ist heute das Wetter in den Bergen?"], "its language is en, not in data.filters"),
        ({"drop_matching": ["(?i)as an ai"]}, 4, "data.filters.drop_matching: '(?i)as an ai' is found"),
        ({"keep_matching": ["sunny", "^Pl"]}, 3, "data.filters.keep_matching: none of the patterns is found"),
        ({"min_tokens": 200}, ["Please count for me?"], "shorter than data.filters.min_tokens=200"),
        ({"max_tokens": 200}, 4, "longer than data.filters.max_tokens=200"),
    ],
)
def test_filters(write: Write, tiny_model_dir: Path, filters: dict[str, Any], kept: Any, reason: str) -> None:
    rows = (LONG, ENGLISH, GERMAN, TWO, RUDE)
    config = configured({"a": {"path": write("a.jsonl", *rows)}}, filters=filters)
    values = plain(config) | {"model": {"name": str(tiny_model_dir)}, "template": {"system": "S"}}
    config = build_config(values | {"sft": {"multi_turn": "whole"}})
    counts = [len(_tokens(config, row["messages"])) for row in rows]
    assert counts[0] > 200 > max(counts[1:]) if "tokens" in next(iter(filters)) else True
    found, (report,) = mixed_demonstrations(config)
    assert questions(found) == kept if isinstance(kept, list) else len(found) == kept
    assert any(known.startswith(reason) for known in report.dropped), report.dropped
    assert report.read == 5 == report.kept + sum(map(len, report.dropped.values()))


def _tokens(config: Config, messages: list[Message]) -> list[int]:
    from trlhf.models import encode_chat
    from trlhf.sft.templates import base_tokenizer

    return encode_chat(base_tokenizer(config), messages)


def test_filters_apply_to_a_single_data_set_too(write: Write) -> None:
    path = write("a.jsonl", TWO, RUDE)
    config = configured({}, sft=path, filters={"min_turns": 2})
    task = load_task(config)
    assert questions(task.demonstrations) == ["Name a fruit.", "And another one?"]
    assert task.reports[0].dropped == {"fewer responses than data.filters.min_turns=2": ["a.jsonl:2"]}
    unfiltered = load_task(configured({}, sft=path))
    assert len(unfiltered.demonstrations) == 3 and not isinstance(unfiltered.reports[0], SourceReport)


def test_nothing_left_is_an_error(write: Write) -> None:
    path = write("a.jsonl", TWO, RUDE)
    with pytest.raises(UserError, match=r"data\.filters=min_turns=3: not one chat passes; loosen them\n.*0 of 2 rows"):
        mixed_demonstrations(configured({"a": {"path": path}}, filters={"min_turns": 3}))


def test_an_unknown_language_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"does not know 'eng'; did you mean en\? it knows ace, af,"):
        ChatFilter(FilterConfig(languages=["eng"]), len)


def test_the_total_is_capped_and_counted(write: Write) -> None:
    mixture = {"a": {"path": write("a.jsonl", *numbered("a", 10)), "weight": 2}}
    task = load_task(configured(mixture, sft_prompts=8))
    assert len(task.demonstrations) == 8
    total = task.reports[-1]
    assert (total.read, total.kept) == (20, 8)
    assert sum(map(len, total.dropped.values())) >= 12 - 8  # rows that are in twice may be left out once


# ---- near duplicates ----


def changed(words: list[str], count: int) -> str:
    """Return a text with its last words replaced."""
    return " ".join([*words[: len(words) - count], *(f"other{i}" for i in range(count))])


def test_jaccard_by_hand() -> None:
    assert shingles("a b c d e f") == {"a b c d e", "b c d e f"}
    assert shingles("A  b\nC") == {"a b c"}
    assert jaccard(shingles("a b c d e f"), shingles("b c d e f g")) == pytest.approx(1 / 3)
    assert jaccard(shingles("x"), shingles("x")) == 1.0


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_near_duplicates_are_found_and_nothing_else(threshold: float) -> None:
    """Against every pair, compared exactly: nothing under the threshold is a duplicate, all well above it are."""
    groups = [[f"word{group}x{i}" for i in range(60)] for group in range(12)]
    texts = [changed(group, count) for group in groups for count in (0, 1, 5, 15, 40)]
    seen = NearDuplicates(threshold)
    kept: list[str] = []
    for number, text in enumerate(texts):
        similar = [jaccard(shingles(text), shingles(other)) for other in kept]
        found = seen.find(text, str(number))
        if found is not None:
            assert max(similar) >= threshold
            assert jaccard(shingles(text), shingles(texts[int(found)])) >= threshold
        else:
            assert max(similar, default=0) < min(1.0, threshold + 0.1)
            kept.append(text)
    assert len(kept) == {0.5: 24, 0.8: 36, 1.0: 60}[threshold]


def test_duplicates_go_across_data_sets_and_the_system_line_does_not_count(write: Write) -> None:
    words = [f"word{i}" for i in range(40)]
    story, retold = said("Tell a story.", " ".join(words)), said("Tell a story.", changed(words, 2))
    system = {"role": "system", "content": " ".join(f"rule{i}" for i in range(80))}
    others = [{"messages": [system, *said(f"{i}?", f"Number {i} it is.")["messages"]]} for i in range(3)]
    mixture = {"a": {"path": write("a.jsonl", story, *others)}, "b": {"path": write("b.jsonl", retold, story, TWO)}}
    found, (first, second) = mixed_demonstrations(configured(mixture, filters={"near_duplicates": 0.8}))
    assert not first.dropped
    assert second.dropped == {
        "a near duplicate of an earlier chat (data.filters.near_duplicates=0.8)": ["b.jsonl:1", "b.jsonl:2"]
    }
    assert len(found) == 4 + 2  # the two turns of the last


# ---- the report ----


def test_the_report_is_written_and_printed(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    mixture = {
        "chats": {"path": write("a.jsonl", *numbered("a", 6), {"text": ""}), "cap": 2, "weight": 3},
        "more": {"path": write("b.jsonl", TWO)},
    }
    _, reports = mixed_demonstrations(configured(mixture))
    write_report(tmp_path, reports)
    write_report(tmp_path, [RowReport("pool prompts", read=3, kept=2, dropped={"too long": ["p:3"]})])
    written = json.loads((tmp_path / "data.json").read_text())
    names = [f"chats: {tmp_path}/a.jsonl", f"more: {tmp_path}/b.jsonl", "pool prompts"]
    assert list(written) == names
    assert written["pool prompts"] == {"read": 3, "kept": 2, "left_out": {"too long": {"count": 1, "places": ["p:3"]}}}
    first = written[names[0]]
    assert (first["read"], first["kept"], first["weight"], first["demonstrations"]) == (7, 2, 3.0, 6)
    assert {reason[:10]: value["count"] for reason, value in first["left_out"].items()} == {
        "missing 'm": 1,
        "more than ": 4,
    }
    print_report(reports)
    shown = " ".join(capsys.readouterr().out.split())
    assert "chats" in shown and "4: more than cap=2; drawn at random" in shown and "sum" in shown
    print_report([RowReport("x")])
    assert capsys.readouterr().out == ""


# ---- the configuration ----


def problems(data: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build_config({**EXACT, "data": {"name": "file", **data}})
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mixture": {"a": {"weight": 2}}}, "data.mixture.a.path is missing; give a file, a folder or a hub name"),
        (
            {"mixture": {"orca": {"path": "o/orca"}, "orka": {"weight": 2}}},
            "data.mixture.orka.path is missing; give a file, a folder or a hub name, or did you mean data.mixture.orc",
        ),
        ({"mixture": {"a": {"path": "no.jsonl"}}}, "data.mixture.a.path=no.jsonl does not exist (seen from "),
        (
            {"mixture": {"a": {"path": "o/a", "wieght": 2}}},
            "data.mixture.a.wieght=2: there is no such key (a leading + does not make one); "
            "did you mean data.mixture.a.weight?",
        ),
        ({"mixture": {"a": {"path": "o/a", "weight": 0}}}, "data.mixture.a.weight=0 must be greater than 0"),
        (
            {"mixture": {"a": "o/a", "b": {"path": "o/b"}}},
            "data.mixture.a=o/a must be a group of values; set the values in it",
        ),
        ({"mixture": {"a": {"path": "o/a"}}, "sft": "o/b"}, "data.sft=o/b and data.mixture both say what to imitate"),
        (
            {"sft": "o/b", "filters": {"min_tokens": 9, "max_tokens": 3}},
            "data.filters.min_tokens=9 is more than data.",
        ),
        ({"sft": "o/b", "filters": {"drop_matching": ["(x"]}}, "data.filters.drop_matching: '(x' is not a regular exp"),
        ({"sft": "o/b", "mirror": "nowhere"}, "data.mirror=nowhere is no folder (seen from "),
        ({"name": "micro", "filters": {"min_turns": 2}}, "data.filters.min_turns is read only with data=file"),
    ],
)
def test_one_contradiction(data: dict[str, Any], message: str) -> None:
    (found,) = problems(data)
    assert found.startswith(message)


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trlhf.checks_mixture.find_spec", lambda _: None)
    found = problems({"sft": "o/b", "filters": {"languages": ["en"], "near_duplicates": 0.9}})
    assert [text.partition(" needs the package ")[2].split(",")[0] for text in found] == ["py3langid", "datasketch"]


def test_a_mixture_from_the_command_line() -> None:
    given = ["data=file", "stage=sft", "data.mixture.a.path=o/a", "data.mixture.a.weight=2", "data.mixture.b.path=o/b"]
    (config,) = compose(given).configs
    assert {name: (source.path, source.weight) for name, source in config.data.mixture.items()} == {
        "a": ("o/a", 2.0),
        "b": ("o/b", 1.0),
    }
    assert build_config(plain(config)) == config
    (without,) = compose([*given, "data.mixture.b=null"]).configs
    assert list(without.data.mixture) == ["a"]
    changes = differences("sft", ["sft"], plain(config), plain(without))
    assert any(change.startswith("data.mixture.b.path was 'o/b', now None") for change in changes)


def test_the_log_says_what_was_left_out(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    _, (report,) = mixed_demonstrations(configured({"a": {"path": write("a.jsonl", TWO, {"text": "x"})}}))
    with caplog.at_level(logging.INFO):
        logging.getLogger("trlhf").warning(report.describe())
    assert "1 of 2 rows used\n  left out 1: missing 'messages'" in caplog.text
