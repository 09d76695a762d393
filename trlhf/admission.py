"""Which folder a run goes on in, and whether what is there may be continued. No torch here."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlhf import files
from trlhf.errors import UserError
from trlhf.fingerprint import differences, fingerprint
from trlhf.run import BEGUN, FOLDERS, RunDirectory, StageDirectory, planned

if TYPE_CHECKING:
    from trlhf.config import Config

ROOT = Path("runs")
# What a stage leaves behind before its first artifact or checkpoint: nothing that cost much.
SLIGHT = {"config.yaml", "metrics.jsonl", BEGUN}
logger = logging.getLogger("trlhf")


def open_run(config: Config, root: Path = ROOT) -> RunDirectory:
    """Choose, lock and mark the folder of a run.

    ``run.dir`` names it; without one, the newest folder under ``root`` that the same configuration has begun and not
    finished is continued, else a new dated folder is made.

    Raises:
        UserError: another process is writing there; or a stage in it was made with other values.
    """
    if config.run.dir is None and not planned(config):
        raise UserError(f"run.dir is missing: stage={config.stage} tells of a run that is there; give run.dir=DIR")
    if config.run.dir is not None:
        run = RunDirectory(Path(config.run.dir).expanduser())
        run.lock()
    else:
        run = _unfinished(config, root) or _dated(root)
    try:
        _admit(run, config)
        run.track(config.run.tracker)
    except BaseException:
        run.close()
        raise
    return run


def _admit(run: RunDirectory, config: Config) -> None:
    """Refuse a folder whose stages were made with other values; else note this configuration in it."""
    import yaml

    from trlhf.config import plain

    values = plain(config)
    changes = [problem for name in FOLDERS for problem in _changed(run.stage(name), name, planned(config), values)]
    if changes:
        raise UserError(
            f"run.dir={run.path} holds results of other values:\n"
            + "\n".join(f"  - {change}" for change in changes)
            + "\ngive the old values, or another run.dir for the new ones; or delete the folders of these stages, "
            "which are then made again (labels are kept)"
        )
    if not planned(config):
        return
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


def _changed(stage: StageDirectory, name: str, running: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """Return what differs from the values that a stage was made with; forget a stage that had only just begun."""
    import yaml

    path = stage.path / "config.yaml"
    if not path.exists():
        return []
    try:
        changes = differences(name, running, yaml.safe_load(path.read_text(encoding="utf-8")), values)
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
            finished = all(run.stage(name).done and not run.interrupted(name) for name in note["stages"])
            if note["fingerprint"] != wanted or finished:
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
        run.dated = True
        return run
    raise UserError(f"{root / name}: a thousand runs have begun in this second; give run.dir=…")
