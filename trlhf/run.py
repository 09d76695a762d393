"""The run directory: artifacts, metrics, completion markers, the lock, and what a second start may continue."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from trlhf import files
from trlhf.errors import UserError
from trlhf.fingerprint import differences, fingerprint

if TYPE_CHECKING:
    from trlhf.config import Config

STAGES = ("sft", "reward", "rl", "eval")
MARKER = "done"
LOCK = ".lock"
ROOT = Path("runs")
logger = logging.getLogger("trlhf")

# What a stage leaves behind before its first artifact or checkpoint: nothing that cost much.
SLIGHT = {"config.yaml", "metrics.jsonl"}


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind: its folder and the content of its ``summary.json``."""

    dir: Path
    summary: dict[str, Any]


class StageDirectory:
    """The folder of one stage inside a run directory."""

    def __init__(self, path: Path, run: Path) -> None:
        self.path = path
        self._run = run

    @property
    def done(self) -> bool:
        """Whether the stage is complete."""
        return (self.path / MARKER).exists()

    def complete(self, metrics: Mapping[str, Any]) -> None:
        """Write ``metrics.json`` and then, last of all, the completion marker."""
        files.write_json(self.path / "metrics.json", metrics)
        files.write_bytes(self.path / MARKER, f"{datetime.now().isoformat(timespec='seconds')}\n".encode())

    def metrics(self) -> dict[str, Any]:
        """Return the final metrics of a complete stage."""
        found: dict[str, Any] = files.read_json(self.path / "metrics.json")
        return found

    def log(self, step: int, **metrics: Any) -> None:
        """Append one line to ``metrics.jsonl``."""
        files.append_json(self.path / "metrics.jsonl", {"step": step, **metrics})

    def rewind(self, step: int) -> None:
        """Cut the lines of ``metrics.jsonl`` after a step (and a torn last line), before going on from there."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            files.write_jsonl(path, [row for row in files.read_jsonl(path) if row["step"] <= step])

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
        """Return the path of an artifact.

        Args:
            name: file or folder inside this stage's folder.
            made_by: the override that makes it, such as ``stage=sft``.

        Raises:
            UserError: it is missing.
        """
        path = self.path / name
        files.recover(path)
        if not path.exists():
            raise UserError(
                f"{path} is missing; make it first with: python -m trlhf {made_by} run.dir={self._run} "
                "(and your other overrides), or set run.dir to a run that has it"
            )
        return path


class RunDirectory:
    """The folder of one run; :func:`open_run` also takes its lock, which ends with the process or ``close``."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.continued = False  # whether an earlier process had begun it
        self._lock: IO[str] | None = None

    def stage(self, name: str) -> StageDirectory:
        """Return the folder of one stage (which may not exist yet)."""
        if name not in STAGES:
            raise ValueError(f"stage {name!r} is none of {', '.join(STAGES)}")
        return StageDirectory(self.path / name, self.path)

    @property
    def ledger(self) -> Path:
        """Where the labels are."""
        return self.path / "ledger.sqlite"

    def summary(self) -> dict[str, Any]:
        """Return the content of ``summary.json`` so far."""
        path = self.path / "summary.json"
        return dict(files.read_json(path)) if path.exists() else {}

    def update_summary(self, news: Mapping[str, Any]) -> dict[str, Any]:
        """Merge values into ``summary.json``, group by group, and return the whole."""
        merged = _merge(self.summary(), files.jsonable(news))
        files.write_json(self.path / "summary.json", merged)
        return merged

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
        handle.truncate(0)
        handle.write(f"{os.getpid()}\n")
        handle.flush()
        self._lock = handle

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def open_run(config: Config, root: Path = ROOT) -> RunDirectory:
    """Choose, lock and mark the folder of a run.

    ``run.dir`` names it; without one, the newest folder under ``root`` that the same configuration has begun and not
    finished is continued, else a new dated folder is made.

    Raises:
        UserError: another process is writing there; or a stage in it was made with other values.
    """
    if config.run.dir is not None:
        run = RunDirectory(Path(config.run.dir).expanduser())
        run.lock()
    else:
        run = _unfinished(config, root) or _dated(root)
    try:
        _admit(run, config)
    except BaseException:
        run.close()
        raise
    return run


def planned(config: Config) -> tuple[str, ...]:
    """Return the stages that a configuration runs, in order."""
    return STAGES if config.stage == "all" else (config.stage,)


def _admit(run: RunDirectory, config: Config) -> None:
    """Refuse a folder whose stages were made with other values; else note this configuration in it."""
    import yaml

    from trlhf.config import plain

    values = plain(config)
    changes = [problem for name in STAGES for problem in _changed(run.stage(name), name, values)]
    if changes:
        raise UserError(
            f"run.dir={run.path} holds results of other values:\n"
            + "\n".join(f"  - {change}" for change in changes)
            + "\ngive the old values, or another run.dir for the new ones"
        )
    run.continued = (run.path / "run.json").exists()
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode()
    for name in planned(config):
        if not run.stage(name).done:
            files.write_bytes(run.path / name / "config.yaml", text)
    files.write_bytes(run.path / "config.yaml", text)
    files.write_json(run.path / "run.json", {"fingerprint": fingerprint(config), "stages": planned(config)})
    if run.continued:
        finished = ", ".join(name for name in planned(config) if run.stage(name).done) or "nothing yet"
        logger.info("continuing %s (finished: %s); another run.dir starts afresh", run.path, finished)
    else:
        logger.info("results go to %s", run.path)


def _changed(stage: StageDirectory, name: str, values: Mapping[str, Any]) -> list[str]:
    """Return what differs from the values that a stage was made with; forget a stage that had only just begun."""
    import yaml

    path = stage.path / "config.yaml"
    if not path.exists():
        return []
    try:
        changes = differences(name, yaml.safe_load(path.read_text(encoding="utf-8")), values)
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete the folder {stage.path}") from error
    if changes and not stage.done and {item.name for item in stage.path.iterdir()} <= SLIGHT:
        shutil.rmtree(stage.path)
        return []
    return [f"stage {name} ({'complete' if stage.done else 'begun'}): {change}" for change in changes]


def _unfinished(config: Config, root: Path) -> RunDirectory | None:
    """Return, locked, the newest folder that this configuration has begun and no living process is writing."""
    wanted = fingerprint(config)
    for path in sorted(root.glob("*/run.json"), key=lambda item: item.parent.name, reverse=True):
        run = RunDirectory(path.parent)
        try:
            note = files.read_json(path)
            if note["fingerprint"] != wanted or all(run.stage(name).done for name in note["stages"]):
                continue
            run.lock()
        except UserError:  # torn, or another process is at it
            continue
        return run
    return None


def _dated(root: Path) -> RunDirectory:
    """Make, lock and return a new folder named by the time."""
    name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in range(1, 1000):
        path = root / (name if number == 1 else f"{name}-{number:03d}")
        with files.writing(path):
            root.mkdir(parents=True, exist_ok=True)
            try:
                path.mkdir()
            except FileExistsError:
                continue
        run = RunDirectory(path)
        run.lock()
        return run
    raise UserError(f"{root / name}: a thousand runs have begun in this second; give run.dir=…")


def _merge(old: dict[str, Any], news: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in news.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
