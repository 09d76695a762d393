"""Send a signal to a run when something stands on its disk: seen from outside, by nothing but the run's folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from provenance import ROOT
from same_end import Rows, ledger_rows

STAGES = ("sft", "reward", "rl", "eval")
OFTEN = {"metrics.jsonl", "samples.jsonl", "metrics.json"}  # files that mark no place of their own
CLOCK_SLACK = 0.02  # seconds that the times of files may lie behind the clock
POLL = 0.002  # seconds between two looks


class Disk:
    """What a process has written into its run's folder since it was started; what others left does not count.

    Args:
        run: the folder.
        since: when the process was started.
    """

    def __init__(self, run: Path, since: float) -> None:
        self.run, self.since = run, since - CLOCK_SLACK

    def states(self) -> set[str]:
        """Return a word for everything that marks how far the process is.

        A stage's ``begun`` and ``done``, its files by name, ``rl step 3`` for the last line of its log,
        ``writing rl/checkpoint-4`` for a folder that is not whole, ``asking rl/round_01_questions.jsonl`` when the
        ledger was written after these questions were settled.
        """
        return {state for stage in STAGES for state in self._states(stage)}

    def _states(self, stage: str) -> Iterator[str]:
        folder = self.run / stage
        if self._fresh(folder / "done"):
            yield f"{stage}/done"
            return
        if not self._fresh(folder / "begun"):
            return
        yield f"{stage}/begun"
        if stage in ("sft", "rl") and self._fresh(folder / "metrics.jsonl"):
            yield f"{stage} step {count_lines(folder / 'metrics.jsonl')}"
        for path in folder.glob("*.json*"):
            if path.name not in OFTEN and not path.name.startswith(".") and self._fresh(path):
                yield f"{stage}/{path.name}"
                if "questions" in path.name and _written(self.run / "ledger.sqlite-wal") > _written(path):
                    yield f"asking {stage}/{path.name}"
        for path in folder.glob("checkpoints/checkpoint-*") if stage == "sft" else ():
            if self._fresh(path) and not (path / "whole.json").exists():
                yield f"writing {stage}/{path.name}"
        for path in (*folder.glob(".*.new"), *folder.glob("checkpoints/.*.new")):
            if self._fresh(path):
                yield f"writing {stage}/{path.name[1:-4]}"

    def _fresh(self, path: Path) -> bool:
        return _written(path) >= self.since


Trigger = Callable[[set[str]], bool]  # the states of a disk → whether the moment has come


@dataclass(frozen=True)
class Strike:
    """A process, and the signal that it got.

    Attributes:
        sent: None where the process ended before its moment came.
        seconds: from its start to the signal.
        delay: of the signal after its moment was seen.
        states: of the disk, after its end.
        disk: the same for people: steps, checkpoints, complete stages, labels.
        ledger: the rows of the ledger.
        status: of the process.
        seconds_to_end: from the signal to its end.
        output: its last lines.
    """

    sent: signal.Signals | None
    seconds: float
    delay: float
    states: set[str]
    disk: dict[str, Any]
    ledger: Rows
    status: int
    seconds_to_end: float
    output: list[str]


def start(run: Path, overrides: Sequence[str], processes: int = 1) -> subprocess.Popen[bytes]:
    """Start a run of this working tree's library, offline, on one thread each; its output is added to ``RUN.txt``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    arguments = [sys.executable, *(launcher if processes > 1 else ()), "-m", "trlhf", *overrides, f"run.dir={run}"]
    with _output(run).open("ab") as text:
        return subprocess.Popen(arguments, env=environment, stdout=text, stderr=subprocess.STDOUT)


def strike(
    run: Path,
    overrides: Sequence[str],
    trigger: Trigger,
    delay: Callable[[], float] = lambda: 0.0,
    sent: signal.Signals = signal.SIGKILL,
    processes: int = 1,
) -> Strike:
    """Start a run, wait until its moment stands on disk and then ``delay()`` seconds more, and send it a signal.

    Several processes get it from their launcher.
    """
    disk, begun = Disk(run, time.time()), time.monotonic()
    process = start(run, overrides, processes)
    while process.poll() is None and not trigger(disk.states()):
        time.sleep(POLL)
    wait = delay() if process.poll() is None else 0.0
    time.sleep(wait)
    alive, at = process.poll() is None, time.monotonic()
    if alive:
        process.send_signal(sent)
    status = process.wait()
    rows = ledger_rows(run / "ledger.sqlite")
    lines = _output(run).read_text(encoding="utf-8", errors="replace").splitlines()[-4 if processes == 1 else -99 :]
    end = time.monotonic()
    return Strike(
        sent if alive else None, at - begun, wait, disk.states(), describe(run, rows), rows, status, end - at, lines
    )


def describe(run: Path, rows: Rows) -> dict[str, Any]:
    """Return what stands on disk: steps, checkpoints, what was half written, complete stages, labels."""
    checkpoints = []
    for path in sorted(run.glob("*/checkpoints/*-[0-9]*"), key=lambda path: path.stat().st_mtime):
        torn = path.name.startswith(".") or (path.parts[-3] == "sft" and not (path / "whole.json").exists())
        checkpoints.append(f"{path.parts[-3]}/{path.name}{' (not whole)' if torn else ''}")
    return {
        "steps": {stage: count_lines(run / stage / "metrics.jsonl") for stage in ("sft", "rl")},
        "checkpoints": checkpoints,
        "half_written": sorted(
            path.relative_to(run).as_posix() for path in run.rglob(".*") if path.name.endswith((".new", ".old", ".tmp"))
        ),
        "complete": [stage for stage in STAGES if (run / stage / "done").exists()],
        "questions": len(rows["questions"]),
        "answers": len(rows["answers"]),
    }


def count_lines(path: Path) -> int:
    """Return how many whole lines a file has; 0 without it."""
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


def _output(run: Path) -> Path:
    return run.with_name(f"{run.name}.txt")


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
