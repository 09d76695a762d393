"""What the folder of a run says about the model in it."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trlhf import files
from trlhf.config import Config
from trlhf.data_report import FILE as DATA_REPORT
from trlhf.errors import UserError
from trlhf.run import FOLDERS, RunDirectory
from trlhf.schema import build

LEARNED = ("rl", "sft")  # stages that leave a model; the first one that is complete is what the card is about


@dataclass(frozen=True)
class Facts:
    """Everything that a card tells; nothing in it depends on when or how fast a run went.

    Attributes:
        stage: ``rl`` or ``sft``: whose model it is.
        config: that this stage was run with, its data and evaluation as the other stages had them.
        stages: stage → content of its ``metrics.json``, of the complete ones.
        summary: content of ``summary.json``.
        labels: (kind, outcome) → how many were bought.
        data: content of ``data.json``: what became of the rows of each data set.
        example: a held-out prompt with the model's own response to it; None before ``stage=eval``.
    """

    stage: str
    config: Config
    stages: Mapping[str, Mapping[str, Any]]
    summary: Mapping[str, Any]
    labels: Mapping[tuple[str, str], int]
    example: Mapping[str, Any] | None
    data: Mapping[str, Any]

    @property
    def commits(self) -> list[str]:
        """The commits of the library that the stages up to this model ran with, each once."""
        noted = self.summary.get("commits", {})
        return list(dict.fromkeys(noted[name] for name in ("sft", "reward", "rl") if noted.get(name)))

    @property
    def measured(self) -> Mapping[str, Any]:
        """What ``stage=eval`` says of this model; empty where it was not evaluated."""
        found: Mapping[str, Any] = self.stages.get("eval", {}).get("models", {})
        measured: Mapping[str, Any] = found.get(self.stage, {})
        return measured

    @property
    def suites(self) -> dict[tuple[str, str], Mapping[str, Any]]:
        """Return (suite, task) → what ``stage=eval`` measured of this model; without what got no value."""
        found: Mapping[str, Any] = self.stages.get("eval", {}).get("suites", {})
        tasks = {(suite, task): models for suite, rows in found.items() for task, models in rows.items()}
        mine = {name: models.get(self.stage) for name, models in tasks.items()}
        return {name: one for name, one in mine.items() if one is not None and one["value"] is not None}

    @property
    def native(self) -> bool:
        """Whether all demonstrations are native chains of thought, as far as the library knows."""
        data = self.config.data
        return data.name != "file" or (bool(data.mixture) and all(one.native for one in data.mixture.values()))


def read_facts(run: RunDirectory) -> Facts:
    """Read them.

    Raises:
        UserError: no stage that leaves a model is complete, or a file cannot be read.
    """
    stage = next((name for name in LEARNED if run.stage(name).done), None)
    if stage is None:
        run.stage("sft").require("model", made_by="stage=all")
        raise UserError(f"{run.path / 'sft'} is not complete")
    complete = {name: run.stage(name).metrics() for name in FOLDERS if run.stage(name).done}
    if complete.get("eval", {}).get("made", {}).get(stage) != run.stage(stage).made:
        complete.pop("eval", None)  # of an earlier model
    return Facts(
        stage=stage,
        config=_config(run, stage, "eval" if "eval" in complete else stage),
        stages=complete,
        summary=run.summary(),
        labels=_labels(run.ledger),
        example=_example(run.stage("eval").path / f"samples_{stage}.jsonl") if "eval" in complete else None,
        data=files.read_json(run.path / DATA_REPORT) if (run.path / DATA_REPORT).exists() else {},
    )


def _config(run: RunDirectory, stage: str, measured: str) -> Config:
    """Return the configuration of the stage, with what other stages alone look at taken from them."""
    values = _values(run.stage(stage).path)
    if run.stage("sft").done:  # what the others are free to leave at its default
        sft = _values(run.stage("sft").path)
        values["sft"] = sft["sft"]
        values["data"] |= {key: sft["data"][key] for key in ("sft", "sft_prompts", "mixture", "filters")}
    if run.stage("reward").done:
        values["reward"] = _values(run.stage("reward").path)["reward"]
    if measured != stage:
        later = _values(run.stage(measured).path)
        values["evaluation"] = later["evaluation"]
        values["data"] |= {key: later["data"][key] for key in ("test", "test_prompts")}
    return build(Config, values)[0]  # its paths need not exist any more, so contradictions are not looked for


def _values(folder: Path) -> dict[str, Any]:
    import yaml

    path = folder / "config.yaml"
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete {folder} and run its stage again") from error


def _labels(path: Path) -> Counter[tuple[str, str]]:
    """Count the answers in a ledger by kind and outcome, and leave nothing beside the file."""
    if not path.exists():
        return Counter()
    query = "SELECT kind, outcome FROM answers JOIN questions ON questions.key = answers.question_key"
    whole = not path.with_name(f"{path.name}-wal").exists()  # else a killed process left answers outside the file
    mode = "immutable=1" if whole else "mode=ro"
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?{mode}", uri=True)) as connection:
            return Counter((str(kind), str(outcome)) for kind, outcome in connection.execute(query))
    except sqlite3.Error as error:
        raise UserError(f"{path}: the ledger cannot be read ({error})") from error


def _example(path: Path) -> Mapping[str, Any] | None:
    """Return the first right response that ended by itself, else the first response."""
    rows = files.read_jsonl(path)
    good = (row for row in rows if row.get("correct") and row.get("finished"))
    return next(good, rows[0] if rows else None)
