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
