"""SIGTERM: at once where nothing is under way, after the step where a loop can save, and never in somebody's way."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import trlhf
from trlhf import preemption
from trlhf.__main__ import main
from trlhf.preemption import Preempted


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """What a handler that the caller had set before is told."""
    told: list[int] = []
    old = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    yield told
    signal.signal(signal.SIGTERM, old)


def test_it_stops_at_once_where_no_loop_asks(heard: list[int]) -> None:
    done = []
    with pytest.raises(Preempted, match="stopped by SIGTERM; the same command goes on"), preemption.watch():
        done.append("before")
        sigterm()
        done.append("after")
    assert done == ["before"] and not preemption.requested()
    sigterm()
    assert heard == [signal.SIGTERM], "the caller's handler is back"


def test_errors_are_handled_without_swallowing_it(heard: list[int]) -> None:
    with pytest.raises(Preempted), preemption.watch():
        try:
            sigterm()
        except Exception:
            pytest.fail("it was taken for an error")


def test_a_loop_ends_its_step(heard: list[int]) -> None:
    steps = []
    told = "stopped by SIGTERM at step 2 of the rl stage; the same command goes on from there"
    with pytest.raises(Preempted, match=told), preemption.watch(), preemption.patient():
        for step in range(1, 5):
            if step == 2:
                sigterm()
            steps.append(step)
            if preemption.requested():
                raise Preempted.at("rl", step)
    assert steps == [1, 2] and heard == []


def test_what_comes_after_the_last_step_stops_on_leaving_the_loop(heard: list[int]) -> None:
    done = []
    with pytest.raises(Preempted), preemption.watch():
        with preemption.patient():
            sigterm()
            done.append("inside")
        done.append("outside")
    assert done == ["inside"]


def test_after_the_loop_it_stops_at_once_again(heard: list[int]) -> None:
    done = []
    with pytest.raises(Preempted), preemption.watch():
        with preemption.patient():
            pass
        sigterm()
        done.append("after")
    assert done == []


def test_the_error_of_a_loop_is_not_hidden_by_it(heard: list[int]) -> None:
    with pytest.raises(ZeroDivisionError), preemption.watch(), preemption.patient():
        sigterm()
        raise ZeroDivisionError


def test_a_second_one_stops_at_once(heard: list[int]) -> None:
    done = []
    with pytest.raises(Preempted), preemption.watch(), preemption.patient():
        sigterm()
        done.append("first")
        sigterm()
        done.append("second")
    assert done == ["first"]


def test_without_a_watch_a_loop_just_runs(heard: list[int]) -> None:
    with preemption.patient():
        sigterm()
        assert not preemption.requested()
    assert heard == [signal.SIGTERM]


def test_a_run_in_another_thread_leaves_signals_alone(heard: list[int]) -> None:
    handler, seen = signal.getsignal(signal.SIGTERM), list[Any]()

    def run() -> None:
        with preemption.watch():
            seen.append(signal.getsignal(signal.SIGTERM))
            seen.append(preemption.requested())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [handler, False]


@pytest.fixture
def comes_while_data_load(monkeypatch: pytest.MonkeyPatch, heard: list[int]) -> None:
    monkeypatch.setattr("trlhf.tasks.load_task", lambda _config: sigterm())


def test_the_command_line_ends_with_143_and_one_line(
    comes_while_data_load: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["trlhf", f"run.dir={tmp_path / 'run'}"])
    with pytest.raises(SystemExit) as stopped:
        main()
    told = "stopped by SIGTERM; the same command goes on from what is on disk"
    assert stopped.value.code == 143 and capsys.readouterr().err == f"trlhf: {told}\n"
    assert told in (tmp_path / "run" / "trlhf.log").read_text()


def test_the_library_raises_and_gives_the_run_back(
    comes_while_data_load: None, tmp_path: Path, heard: list[int]
) -> None:
    for _ in range(2):  # the second time the folder is free again
        with pytest.raises(trlhf.Preempted):
            trlhf.run([f"run.dir={tmp_path / 'run'}"])
    sigterm()
    assert heard == [signal.SIGTERM]
