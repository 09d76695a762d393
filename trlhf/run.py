"""The run directory: artifacts, metrics, completion markers, time, and the lock."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from trlhf import files
from trlhf.errors import UserError
from trlhf.tracking import METRICS, Tracking

if TYPE_CHECKING:
    from trlhf.config import Config

STAGES = ("sft", "reward", "rl", "eval")  # of stage=all
CHECK = "check"  # stage=check; goes before the others with data.decontaminate=true
FOLDERS = (CHECK, *STAGES)
MARKER = "done"
BEGUN = "begun"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind: its folder and the content of its ``summary.json``."""

    dir: Path
    summary: dict[str, Any]


class StageDirectory:
    """The folder of one stage inside a run directory."""

    def __init__(self, path: Path, run: Path, tracking: Tracking | None = None) -> None:
        self.path = path
        self._run = run
        self._tracking = tracking

    @property
    def done(self) -> bool:
        """Whether the stage is complete."""
        return (self.path / MARKER).exists()

    def complete(self, metrics: Mapping[str, Any]) -> None:
        """Write ``metrics.json`` and then the completion marker; only now the checkpoints go."""
        if self._tracking is not None and (self.path / METRICS).exists():
            self._tracking.finish()
        files.write_json(self.path / "metrics.json", metrics)
        files.write_bytes(self.path / MARKER, f"{datetime.now().isoformat(timespec='seconds')}\n".encode())
        self.tidy()

    def tidy(self) -> None:
        """Delete the checkpoints of a complete stage, also where a kill left some of them."""
        if self.done:
            shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)

    @property
    def made(self) -> str | None:
        """When the stage was completed, as its marker says; None before that."""
        return (self.path / MARKER).read_text(encoding="utf-8").strip() if self.done else None

    def reopen(self) -> None:
        """Take the completion back, before the stage is done once more."""
        (self.path / MARKER).unlink(missing_ok=True)

    def metrics(self) -> dict[str, Any]:
        """Return the final metrics of a complete stage."""
        found: dict[str, Any] = files.read_json(self.path / "metrics.json")
        return found

    def log(self, step: int, **metrics: Any) -> None:
        """Append one line to ``metrics.jsonl``."""
        line = files.jsonable({"step": step, **metrics})
        files.append_json(self.path / METRICS, line)
        if self._tracking is not None:
            self._tracking.line(self.path.name, line)

    def rewind(self, step: int) -> None:
        """Cut the lines of ``metrics.jsonl`` after a step (and a torn last line), before going on from there."""
        path = self.path / METRICS
        if path.exists():
            files.write_jsonl(path, [row for row in files.read_jsonl(path) if row["step"] <= step])
        if self._tracking is not None:
            self._tracking.close()  # the next line shows what is left, and itself

    def write_json(self, name: str, value: object) -> Path:
        """Write one JSON file atomically."""
        files.write_json(self.path / name, value)
        return self.path / name

    def write_jsonl(self, name: str, rows: Iterable[object]) -> Path:
        """Write one JSON-lines file atomically."""
        files.write_jsonl(self.path / name, rows)
        return self.path / name

    def new_directory(self, name: str) -> AbstractContextManager[Path]:
        """Yield an empty folder that takes the place of ``name`` when the block succeeds."""
        return files.new_directory(self.path / name)

    def require(self, name: str, made_by: str) -> Path:
        """Return the path of an artifact of a complete stage.

        Args:
            name: file or folder inside this stage's folder.
            made_by: the override that makes it, such as ``stage=sft``.

        Raises:
            UserError: it is missing, or the stage that makes it did not end well.
        """
        path = self.path / name
        files.recover(path)
        if not path.exists():
            raise UserError(
                f"{path} is missing; make it first with: python -m trlhf {made_by} run.dir={self._run} "
                "(and your other overrides), or set run.dir to a run that has it"
            )
        if not self.done:
            raise UserError(
                f"{self.path} is not complete, so {path.name} in it cannot be trusted; finish it first with: "
                f"python -m trlhf {made_by} run.dir={self._run} (and your other overrides)"
            )
        return path


class RunDirectory:
    """The folder of one run; ``trlhf.admission.open_run`` takes its lock, which ends with the process or ``close``."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.continued = False  # whether an earlier process had begun it
        self.dated = False  # whether this process made it, and chose its name
        self._lock: IO[str] | None = None
        self._tracking: Tracking | None = None

    def track(self, kind: str) -> None:
        """Let a tracker (a value of ``run.tracker``) show what the stages log."""
        self._tracking = Tracking(kind, self.path, FOLDERS) if kind != "none" else None

    def stage(self, name: str) -> StageDirectory:
        """Return the folder of one stage (which may not exist yet)."""
        if name not in FOLDERS:
            raise ValueError(f"stage {name!r} is none of {', '.join(FOLDERS)}")
        return StageDirectory(self.path / name, self.path, self._tracking)

    @property
    def ledger(self) -> Path:
        """Where the labels are."""
        return self.path / "ledger.sqlite"

    def summary(self) -> dict[str, Any]:
        """Return the content of ``summary.json`` so far."""
        path = self.path / "summary.json"
        try:
            return dict(files.read_json(path)) if path.exists() else {}
        except (UserError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: cannot be read; delete this file alone, the stages fill it again (delete also "
                f"{self.path / 'eval'} to have the accuracies measured again)"
            ) from error

    def update_summary(self, news: Mapping[str, Any]) -> dict[str, Any]:
        """Merge values into ``summary.json``, group by group, and return the whole."""
        merged = _merge(self.summary(), files.jsonable(news))
        files.write_json(self.path / "summary.json", merged)
        return merged

    def interrupted(self, name: str) -> bool:
        """Say whether a stage's `clock` was left other than at its end, be it after the stage was complete."""
        return (self.path / name / BEGUN).exists()

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Add the seconds that the block takes to the summary, and first those of processes that were killed in it.

        A killed one worked at least until it last wrote something into the stage's folder. The marker, which holds the
        seconds spent before it was written, goes when the block succeeds, and last of all.
        """
        begun, start = self.path / name / BEGUN, time.monotonic()
        before = float(self.summary().get("seconds", {}).get(name, 0.0))
        if self.interrupted(name):
            written = (path.stat().st_mtime for path in begun.parent.rglob("*") if path.is_file())
            before = float(begun.read_text() or before) + max(written) - begun.stat().st_mtime
        files.write_bytes(begun, repr(before).encode())

        def stop() -> float:
            spent = round(before + time.monotonic() - start, 2)
            self.update_summary({"seconds": {name: spent}})
            return spent

        try:
            yield
        except BaseException:
            with suppress(UserError, OSError):  # the block's own error is what the user has to read
                files.write_bytes(begun, repr(stop()).encode())
            raise
        stop()
        begun.unlink(missing_ok=True)

    def lock(self) -> None:
        """Keep other processes out.

        Raises:
            UserError: a living process is writing here.
        """
        with files.writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / LOCK).open("a+")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.seek(0)
            owner = handle.read().strip() or "unknown"
            handle.close()
            raise UserError(
                f"run.dir={self.path}: another process (pid {owner}) is writing this run; "
                "wait for it, stop it, or give another run.dir"
            ) from error
        files.sweep(self.path)
        handle.truncate(0)
        handle.write(f"{os.getpid()}\n")
        handle.flush()
        self._lock = handle

    def close(self) -> None:
        """Close the tracker and give the lock back."""
        if self._tracking is not None:
            self._tracking.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()
        if self.dated and isinstance(error, UserError) and not self._worked():
            shutil.rmtree(self.path, ignore_errors=True)  # nobody named it; nothing in it can be continued

    def _worked(self) -> bool:
        """Say whether a stage has begun, or a label was bought."""
        found = (item.name for name in FOLDERS for item in (self.path / name).glob("*"))
        return self.ledger.exists() or any(name != "config.yaml" for name in found)


def planned(config: Config) -> tuple[str, ...]:
    """Return the stages that a configuration runs, in order; none for ``stage=card``, which only tells of them."""
    if config.stage == "card":
        return ()
    stages = STAGES if config.stage == "all" else (config.stage,)
    first = config.data.decontaminate and not {"sft", "reward", "rl"}.isdisjoint(stages)
    return (CHECK, *stages) if first else stages


def _merge(old: dict[str, Any], news: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in news.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
