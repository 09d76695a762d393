"""Trackers: what stands in the stages' ``metrics.jsonl``, shown by TensorBoard or Trackio. No torch until one is used.

``metrics.jsonl`` is the truth. A tracker is opened with the first line that a process logs, and then gets the lines of
all stages afresh; so after a restart no step appears twice, rewound steps are gone, and a tracker that is switched on
late has the earlier steps too. TensorBoard's ``purge_step`` would reach none of the earlier steps, and Trackio's
``resume`` keeps the rewound ones beside the new.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from trlhf import files

log = logging.getLogger("trlhf")
PACKAGES = ("tensorboard", "trackio")  # values of run.tracker, and the names of what it imports
PROJECT = "trlhf"
METRICS = "metrics.jsonl"
Row = Mapping[str, Any]


class Tracker(Protocol):
    """Where lines go."""

    def write(self, stage: str, rows: Sequence[Row]) -> None:
        """Show lines of a stage: ``step`` and metrics."""
        ...

    def close(self) -> None:
        """Leave everything on disk."""
        ...


def is_missing(kind: str) -> bool:
    """Say whether the package of a tracker is not installed."""
    return kind in PACKAGES and importlib.util.find_spec(kind) is None


def scalars(stage: str, row: Row) -> dict[str, float]:
    """Return ``stage/name`` → value for every finite number of a line but its step; a nested group adds its name."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= scalars(f"{stage}/{name}", value)
        elif name != "step" and type(value) in (int, float) and math.isfinite(value):
            found[f"{stage}/{name}"] = float(value)
    return found


class Tracking:
    """The tracker of a run; what fails in it is a warning, once, for nothing depends on it.

    Args:
        kind: value of ``run.tracker``, but not ``none``.
        run: folder of the run.
        stages: names of the stages, in order.
    """

    def __init__(self, kind: str, run: Path, stages: Iterable[str]) -> None:
        self._kind, self._run, self._stages = kind, run, tuple(stages)
        self._open: Tracker | None = None
        self._broken = False

    def line(self, stage: str, row: Row) -> None:
        """Show a line that was just appended to a stage's ``metrics.jsonl``."""
        opened = self._open
        if opened is None:
            self.mirror()
        else:
            self._guarded(lambda: opened.write(stage, [row]))

    def mirror(self) -> None:
        """Replace what the tracker shows of this run by what the files hold."""
        self.close()
        self._guarded(self._begin)

    def finish(self) -> None:
        """Close at the end of a stage, with its last lines also where a process was killed before they were shown."""
        if self._open is None:
            self.mirror()
        self.close()

    def close(self) -> None:
        """Finish what is open; the next line opens it again."""
        opened, self._open = self._open, None
        if opened is not None:
            self._guarded(opened.close)

    def _begin(self) -> None:
        state = random.getstate()
        self._open = TensorboardTracker(self._run) if self._kind == "tensorboard" else TrackioTracker(self._run)
        random.setstate(state)  # Trackio's imports draw from it, and a run must not depend on who looks at it
        for stage in self._stages:
            if rows := files.read_jsonl(self._run / stage / METRICS):
                self._open.write(stage, rows)

    def _guarded(self, call: Callable[[], object]) -> None:
        if self._broken:
            return
        try:
            call()
        except Exception as error:  # a locked database, a full disk, a newer version of the package
            self._broken, self._open = True, None
            log.warning(
                "run.tracker=%s: shows nothing more of this run until it is started again (%s: %s); metrics.jsonl in "
                "each stage's folder has everything",
                self._kind, type(error).__name__, error,
            )  # fmt: skip


class TensorboardTracker:
    """Event files in ``RUN/tensorboard/STAGE``; look at them with ``tensorboard --logdir RUN/tensorboard``."""

    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = run / "tensorboard"
        self._make: Callable[..., Any] = SummaryWriter
        self._writers: dict[str, Any] = {}
        for old in self._folder.glob("*/events.out.tfevents.*"):
            old.unlink()

    def write(self, stage: str, rows: Sequence[Row]) -> None:
        """Add one point a metric and line."""
        if stage not in self._writers:
            self._writers[stage] = self._make(str(self._folder / stage), flush_secs=10)
        for row in rows:
            for name, value in scalars(stage, row).items():
                self._writers[stage].add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Write out what is buffered."""
        for writer in self._writers.values():
            writer.close()


class TrackioTracker:
    """Rows of a local Trackio database (``TRACKIO_DIR``); look at them with ``trackio show --project trlhf``.

    They are written through Trackio's storage, not through ``trackio.init``, which asks huggingface.co for the name of
    the account whenever a token lies around, and goes online where ``TRACKIO_SPACE_ID`` or ``TRACKIO_SERVER_URL`` say.
    """

    def __init__(self, run: Path) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        self._storage: Any = SQLiteStorage
        self._storage._dataset_import_attempted = True  # else a TRACKIO_BUCKET_ID would be downloaded first
        folder = run.resolve()
        inside = folder.is_relative_to(Path.cwd())
        self._name = str(folder.relative_to(Path.cwd()) if inside else folder)
        self._id = hashlib.sha256(str(folder).encode()).hexdigest()[:32]
        self._storage.delete_run(PROJECT, self._name, run_id=self._id)
        if self._storage.get_log_count(PROJECT, self._name, run_id=self._id):
            raise OSError("its database did not let go of the run's old lines")

    def write(self, stage: str, rows: Sequence[Row]) -> None:
        """Add one row a line."""
        self._storage.bulk_log(
            PROJECT,
            self._name,
            [scalars(stage, row) for row in rows],
            steps=[row["step"] for row in rows],
            config={"folder": self._name},
            run_id=self._id,
        )

    def close(self) -> None:
        """Do nothing: every row is on disk."""
