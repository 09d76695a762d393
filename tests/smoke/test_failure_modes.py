"""The benchmark of failure modes, very small: rows run, are judged, and no run is done twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import failure_modes
import pytest
from failure_cells import Site, prepare, run_site

from trlhf.files import read_json

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
ROWS = ("leaked_labels", "garbage_outliers")
RUNS = {"clean/sft-0-0", "with_taste/full-256-0", "junk/full-64-0", "junk/uniform_ppo-64-0"}


def start(folder: Path, *more: str) -> int:
    return failure_modes.main(["--quick", "--folder", str(folder), "--rows", *ROWS, *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("modes")
    assert start(path) == 0
    return path


@pytest.fixture
def results(folder: Path) -> dict[str, Any]:
    return dict(read_json(folder / "failure_modes.json"))


def test_every_row_has_a_figure_a_mark_and_a_verdict(results: dict[str, Any]) -> None:
    assert set(results["rows"]) == set(ROWS) and set(results["runs"]) == RUNS and results["failed"] == {}
    for row in results["rows"].values():
        assert row["missing"] == [] and row["passed"] in (True, False) and row["figure"] and row["mark"]
    assert {"command", "commit", "hardware", "overrides", "seeds"} <= results.keys()


def test_training_reads_answers_through_the_ledger_alone(results: dict[str, Any]) -> None:
    calls = results["runs"]["with_taste/full-256-0"]["calls"]
    assert results["rows"]["leaked_labels"]["passed"] is True
    assert calls["labels"] == calls["labeler"] > calls["pool_answers_read"] > 0 == calls["test_answers_read"]


def test_labels_on_junk_are_counted(results: dict[str, Any]) -> None:
    for name in ("junk/full-64-0", "junk/uniform_ppo-64-0"):
        bought = results["runs"][name]["junk"]
        assert 0 < bought["junk"] <= bought["verdicts"] <= 64


def test_a_second_start_runs_nothing(
    folder: Path, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(failure_modes, "run_site", lambda *_: pytest.fail("ran a site that is finished"))
    assert start(folder) == 0 and "4 runs, 0 to do" in capsys.readouterr().out
    assert read_json(folder / "failure_modes.json")["rows"] == results["rows"]


def test_rows_whose_runs_are_missing_are_told(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "all.json"
    arguments = ["--quick", "--summarise", "--folder", str(folder), "--output", str(output)]
    assert failure_modes.main(arguments) == 0
    rows = read_json(output)["rows"]
    assert len(rows) == 10 and rows["label_noise"]["passed"] is None and rows["leaked_labels"]["passed"] is True
    assert "noise_10/full-256-0" in rows["label_noise"]["missing"]


def test_other_overrides_are_not_mixed_in(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(folder, "--", "rl.learning_rate=1e-3") == 2
    assert "was made with other overrides; give another --folder" in capsys.readouterr().err


def test_accuracy_is_measured_at_every_checkpoint(folder: Path) -> None:
    site = Site("all_at_once", "believed", 24, 0)
    prepare(folder, site, failure_modes.SMALL, "test")
    curve = run_site(folder, site, failure_modes.SMALL, "test")["curve"]
    assert [point["step"] for point in curve] == [2] and len(curve[0]["correct"]) == 9
    assert not list((folder / "worlds/all_at_once").rglob("state.pt")), "they are deleted afterwards"
