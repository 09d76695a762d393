"""Log lines, bars and tables through one console."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from trlhf import console
from trlhf.closing import print_closing_table

logger = logging.getLogger("trlhf")


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    kept = (list(logger.handlers), logger.propagate, logger.level)
    yield
    for handler in logger.handlers:
        handler.close()
    logger.handlers[:], logger.propagate = kept[0], kept[1]
    logger.setLevel(kept[2])


def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    screen = io.StringIO()
    monkeypatch.setattr(console, "CONSOLE", Console(file=screen, force_terminal=True, width=100))
    return screen


def test_without_a_terminal_each_record_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    console.setup_logging(tmp_path)
    console.setup_logging(tmp_path)  # twice: and still one line each
    logger.info("long [red]%s", "word " * 60)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0][9:] == "long [red]" + "word " * 60
    assert (tmp_path / "trlhf.log").read_text().count("long") == 1


def test_progress_without_a_terminal_is_a_few_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console.setup_logging()
    clock = iter(range(0, 1000, 6))  # six seconds a call
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    with console.progress("rollouts", total=4) as advance:
        for _ in range(4):
            advance(note="loss 1")
    said = [line[9:] for line in capsys.readouterr().out.splitlines()]
    assert said == ["rollouts: 2 of 4 (loss 1)", "rollouts: 4 of 4 in 30 s"]


def test_bars_and_log_lines_share_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    console.setup_logging()
    with console.progress("outer", total=2) as outer:
        with console.progress("inner", total=3) as inner:
            inner(3, note="loss 2")
            logger.info("in between")
        outer()
    assert console._bars is None
    text = screen.getvalue()
    assert "in between" in text and "outer" in text and "inner" in text


def test_a_bar_goes_away_when_its_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal(monkeypatch)
    with pytest.raises(ZeroDivisionError), console.progress("work", total=2):
        raise ZeroDivisionError
    assert console._bars is None


def test_libraries_speak_through_our_handlers_only_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "LIBRARIES", ("noisy",))
    monkeypatch.setitem(sys.modules, "noisy", sys)
    noisy = logging.getLogger("noisy")
    noisy.addHandler(logging.StreamHandler(sys.stdout))
    console.setup_logging()
    noisy.warning("deprecated")
    noisy.info("chatter")
    out = capsys.readouterr().out
    assert out.count("deprecated") == 1 and "chatter" not in out


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table("Accuracy", ["stage", "value"], [["sft", 0.5], ["rl", "0.9 [0.8, 1.0]"]])
    out = capsys.readouterr().out
    assert out.startswith("Accuracy") and "0.9 [0.8, 1.0]" in out and "sft" in out


def share(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "n": 345}


SUMMARY = {
    "accuracy": {"base": share(0.012, 0.005, 0.031), "sft": share(0.453, 0.401, 0.506), "rl": share(0.99, 0.974, 1)},
    "plans": {name: {"reasoning": share(0.98, 0, 1), "other": share(0.01, 0, 1)} for name in ("base", "sft", "rl")},
    "paired": {
        "base→sft": {"mcnemar": {"gained": 154, "lost": 2, "p": 1.23e-41}},
        "sft→rl": {"mcnemar": {"gained": 120, "lost": 12, "p": 1.2e-10}, "win_rate": share(0.62, 0.5, 1)},
    },
    "seconds": {"sft": 61.2, "reward": 20, "rl": 10234.2, "eval": 12},
}


@pytest.mark.parametrize("width", [80, 60])
def test_the_closing_table_shows_every_number_in_a_narrow_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "CONSOLE", Console(width=width))
    print_closing_table(SUMMARY, 0.95)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width and "…" not in shown
    for cell in ("45.3%", "40.1%", "50.6%", "154", "1.2e-41", "120", "12", "98%", "62%", "50%", "100%", "10234", "345"):
        assert cell in shown, cell
    if width == 80:
        rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
        assert rows[1] == ["95% interval", "0.5% to 3.1%", "40.1% to 50.6%", "97.4% to 100.0%"]
        assert ["newly right / newly wrong", "–", "154 / 2", "120 / 12"] in rows
        assert ["wins on open prompts", "–", "–", "62%"] in rows and ["time", "–", "61 s", "10234 s"] in rows


def test_the_closing_table_leaves_out_what_was_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    nothing = {"accuracy": {"base": None}, "plans": {"base": {"reasoning": None, "other": None}}, "paired": {}}
    print_closing_table(nothing, 0.95)
    shown = capsys.readouterr().out
    assert "│ accuracy │    – │" in shown and "interval" not in shown and "plans" not in shown and "time" not in shown


def test_a_table_stands_in_the_log_file_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console.setup_logging(tmp_path)
    console.print_table("accuracy", ["stage", "value"], [["sft", "55.7%"], ["rl", "83.7%"]], "greedy")
    written = (tmp_path / "trlhf.log").read_text(encoding="utf-8")
    assert [word for word in ("accuracy", "55.7%", "83.7%", "greedy") if word not in written] == []
    assert "\x1b" not in written and capsys.readouterr().out.count("83.7%") == 1
