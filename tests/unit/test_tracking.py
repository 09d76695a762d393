"""Trackers show what metrics.jsonl holds: each step once, whatever happened to the process, and never the network."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trlhf import tracking
from trlhf.admission import open_run
from trlhf.config import build_config
from trlhf.errors import ConfigError
from trlhf.run import RunDirectory, StageDirectory
from trlhf.tracking import PROJECT, Tracking, scalars

Points = dict[str, list[tuple[int, float]]]  # key → step and value, in the order of the steps
Shown = Callable[[], Points]
KINDS = ("tensorboard", "trackio")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def shown(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shown]:
    """Return what reads back everything that the tracker holds; at the end, nothing may have gone online."""
    online = list[object]()

    def refuse(*arguments: object, **_: object) -> None:
        online.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_BUCKET_ID", "HF_TOKEN"):  # a careless environment
        monkeypatch.setenv(name, "someone/somewhere")
    if kind == "tensorboard":
        yield lambda: in_tensorboard(tmp_path / "run")
    else:
        from trackio import sqlite_storage

        monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
        monkeypatch.setattr(sqlite_storage.SQLiteStorage, "_dataset_import_attempted", False)
        yield lambda: in_trackio(tmp_path / "trackio" / f"{PROJECT}.db")
    assert online == []


def in_tensorboard(run: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    points: Points = {}
    for folder in sorted((run / "tensorboard").iterdir()):
        # every file by itself, since the folder's reader hides earlier points of a step that comes again
        for file in sorted(folder.iterdir()):
            events = EventAccumulator(str(file), size_guidance={"scalars": 0})
            events.Reload()
            for key in events.Tags()["scalars"]:
                points.setdefault(key, []).extend((event.step, event.value) for event in events.Scalars(key))
    return {key: sorted(values) for key, values in points.items()}


def in_trackio(path: Path) -> Points:
    points: Points = {}
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT step, metrics FROM metrics WHERE run_name LIKE '%/run' ORDER BY id").fetchall()
    database.close()
    for step, text in rows:
        for key, value in json.loads(text).items():
            points.setdefault(key, []).append((step, value))
    return {key: sorted(values) for key, values in points.items()}


def begin(tmp_path: Path, kind: str) -> tuple[RunDirectory, StageDirectory]:
    """Return the run, as a new process opens it, and its rl stage."""
    run = RunDirectory(tmp_path / "run")
    run.track(kind)
    return run, run.stage("rl")


def test_every_finite_number_of_a_line_is_shown(kind: str, shown: Shown, tmp_path: Path) -> None:
    run, stage = begin(tmp_path, kind)
    stage.log(1, reward=0.5, round=1, kl=float("nan"), held_out_accuracy=None, note="text", parts={"loss": 2})
    stage.log(2, reward=np.float32(0.75), round=1, flag=True)
    run.stage("sft").log(1, loss=4.0)
    stage.complete({})
    run.close()
    assert shown() == {
        "rl/reward": [(1, 0.5), (2, 0.75)],
        "rl/round": [(1, 1), (2, 1)],
        "rl/parts/loss": [(1, 2)],
        "sft/loss": [(1, 4.0)],
    }


def test_a_rewound_run_shows_each_step_once(kind: str, shown: Shown, tmp_path: Path) -> None:
    run, stage = begin(tmp_path, kind)
    for step in (1, 2, 3):
        stage.log(step, reward=0.1 * step)
    run.close()
    run, stage = begin(tmp_path, kind)
    stage.rewind(1)
    for step in (2, 3, 4):
        stage.log(step, reward=float(step))
    stage.rewind(3)  # within one process too
    stage.log(4, reward=8.0)
    run.close()
    assert shown() == {"rl/reward": [(1, pytest.approx(0.1)), (2, 2.0), (3, 3.0), (4, 8.0)]}


def test_the_lines_of_a_killed_process_are_shown(kind: str, shown: Shown, tmp_path: Path) -> None:
    _, stage = begin(tmp_path, "none")  # its tracker had no time to write
    stage.log(1, reward=0.5)
    run, stage = begin(tmp_path, kind)
    stage.rewind(1)
    stage.complete({})  # nothing was left to be logged
    run.close()
    assert shown() == {"rl/reward": [(1, 0.5)]}


def test_a_tracker_that_is_switched_on_late_shows_the_stages_before(kind: str, shown: Shown, tmp_path: Path) -> None:
    run, stage = begin(tmp_path, "none")
    run.stage("sft").log(1, loss=4.0)
    stage.log(1, reward=0.5)
    run, stage = begin(tmp_path, kind)
    stage.log(2, reward=0.75)
    run.close()
    assert shown() == {"sft/loss": [(1, 4.0)], "rl/reward": [(1, 0.5), (2, 0.75)]}


def test_a_tracker_that_fails_is_one_warning_and_costs_no_line(
    kind: str, shown: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, stage = begin(tmp_path, kind)
    stage.log(1, reward=0.5)

    def locked(*_: object) -> None:
        raise sqlite3.OperationalError("database is locked")

    for name in ("TensorboardTracker", "TrackioTracker"):
        monkeypatch.setattr(getattr(tracking, name), "write", locked)
    monkeypatch.setattr(logging.getLogger("trlhf"), "propagate", True)
    stage.log(2, reward=0.75)
    stage.log(3, reward=0.75)
    stage.complete({})
    run.close()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [f"run.tracker={kind}"]
    assert "database is locked" in caplog.text and "metrics.jsonl" in caplog.text
    assert len((stage.path / "metrics.jsonl").read_text().splitlines()) == 3 and stage.done


def test_two_runs_do_not_touch_each_other_in_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trackio import sqlite_storage

    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "a"):  # the first is begun once more
        run = RunDirectory(Path("runs", name))
        run.track("trackio")
        run.stage("sft").rewind(0)
        run.stage("sft").log(1, loss=1.0)
        run.close()
    with sqlite3.connect(tmp_path / "trackio" / "trlhf.db") as database:
        rows = database.execute("SELECT run_name, step FROM metrics ORDER BY run_name").fetchall()
    database.close()
    assert rows == [("runs/a", 1), ("runs/b", 1)]


def test_a_missing_package_is_refused_before_anything(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in KINDS else find(name))
    with pytest.raises(ConfigError, match=rf"run\.tracker={kind} needs the package .* pip install 'trlhf\[tracking\]'"):
        build_config({"run": {"tracker": kind, "dir": str(tmp_path / "run")}})
    build_config({"run": {"tracker": "none"}})
    assert not (tmp_path / "run").exists()


def test_the_tracker_may_change_between_restarts(tmp_path: Path) -> None:
    values: dict[str, Any] = {"run": {"dir": str(tmp_path / "run")}, "stage": "sft"}
    with open_run(build_config(values)) as run:
        run.stage("sft").log(1, loss=4.0)
        run.stage("sft").write_json("something.json", {})
    values["run"]["tracker"] = "tensorboard"
    with open_run(build_config(values)) as run:
        run.stage("sft").log(2, loss=3.0)
    assert in_tensorboard(tmp_path / "run") == {"sft/loss": [(1, 4.0), (2, 3.0)]}


def test_no_tracker_is_loaded_unless_asked_for() -> None:
    code = (
        "import sys; from trlhf.run import RunDirectory; run = RunDirectory('nowhere'); run.track('none'); "
        "print([name for name in ('torch', 'tensorboard', 'trackio') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_tracker_draws_no_random_numbers(kind: str, tmp_path: Path) -> None:
    code = (
        "import random, numpy, torch; from trlhf.run import RunDirectory\n"
        "def state(): return random.getstate(), numpy.random.get_state()[2], torch.get_rng_state().tolist()\n"
        f"before = state(); run = RunDirectory('run'); run.track('{kind}')\n"
        "run.stage('sft').log(1, loss=1.0); run.close(); print(before == state(), threading.active_count())"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run(
        [sys.executable, "-c", f"import threading; {code}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.stdout.split() == ["True", "1"], done.stderr  # and it leaves no thread behind


def test_numbers_are_found_by_key() -> None:
    line = {"step": 3, "loss": 1, "on": True, "bad": float("inf"), "none": None, "list": [1.0], "of": {"kl": 0.5}}
    assert scalars("sft", line) == {"sft/loss": 1.0, "sft/of/kl": 0.5}


def test_an_unfinished_tracker_is_closed_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = list[str]()
    monkeypatch.setattr(tracking.TensorboardTracker, "close", lambda self: closed.append("yes"))
    with pytest.raises(ZeroDivisionError), RunDirectory(tmp_path / "run") as run:
        run.track("tensorboard")
        run.stage("sft").log(1, loss=1.0)
        raise ZeroDivisionError
    assert closed == ["yes"] and isinstance(run._tracking, Tracking)
