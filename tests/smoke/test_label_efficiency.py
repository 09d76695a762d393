"""The benchmark of label efficiency, very small: a grid runs, is summed up and drawn, and no cell runs twice."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import label_efficiency
import pytest
from label_arms import COMMON, QUICK, SCHEDULE, Cell, first_labels
from label_cells import Grid, run_cell

from trlhf.errors import UserError
from trlhf.files import read_json, write_json
from trlhf.ledger import Ledger

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
SVG = "{http://www.w3.org/2000/svg}"
ARMS, BUDGETS, SEEDS = ("full", "uniform_ppo"), (8, 16), (0, 1)


def start(folder: Path, *more: str) -> int:
    return label_efficiency.main(["--quick", "--draws", "200", "--folder", str(folder), *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grid")
    assert start(path) == 0
    return path


@pytest.fixture
def results(folder: Path) -> dict[str, Any]:
    return dict(read_json(folder / "label_efficiency.json"))


@pytest.fixture
def no_cell_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Cell]]:
    asked: list[Cell] = []
    monkeypatch.setattr(label_efficiency, "run_cell", lambda _, cell: asked.append(cell))
    yield asked


def test_every_cell_is_measured(results: dict[str, Any]) -> None:
    cells = {(cell["arm"], cell["budget"], cell["seed"]): cell for cell in results["cells"]}
    assert set(cells) == {("sft", 0, s) for s in SEEDS} | {(a, b, s) for a in ARMS for b in BUDGETS for s in SEEDS}
    assert results["failed"] == {} and results["finished"] == results["wanted"] == 10
    for (_, budget, _), cell in cells.items():
        assert 0 <= cell["accuracy"] <= 1 and len(cell["correct"]) == 9 and cell["response_tokens"] > 0
        assert cell["labels"].get("first", 0) <= cell["labels"]["spent"] <= budget


def test_arms_of_a_seed_and_budget_share_their_first_labels(folder: Path) -> None:
    first = []
    for path in (folder / "sources/seed-1-16", *(folder / "runs" / f"{arm}-16-1" for arm in ARMS)):
        with Ledger(path / "ledger.sqlite", 16) as ledger:
            first.append(ledger.labels(round=0))
    assert first[0] == first[1] == first[2] and 1 <= len(first[0]) <= first_labels(16)


def test_the_summary_compares_the_arms(results: dict[str, Any]) -> None:
    assert results["primary"]["first"] == "full" and results["primary"]["second"] == "uniform_ppo"
    assert results["primary"]["seeds"] == list(SEEDS) and set(results["primary"]["accuracy"]) == {"8", "16"}
    assert [point["budget"] for point in results["curves"]["full"]["points"]] == list(BUDGETS)
    assert results["arms"]["full"]["words"] == "full tRLHF" and results["schedule"] == list(SCHEDULE)
    assert {"commit", "command", "hardware", "grid"} <= results.keys()


def test_the_picture_is_drawn(folder: Path) -> None:
    picture = ElementTree.parse(folder / "label_efficiency.svg").getroot()
    words = [element.text for element in picture.iter(f"{SVG}text")]
    assert {"labels (logarithmic)", "accuracy, greedy", "full tRLHF", "8", "16"} <= set(words)
    assert len(list(picture.iter(f"{SVG}polyline"))) == len(ARMS)


def test_only_small_files_of_a_cell_stay(folder: Path) -> None:
    run = folder / "runs" / "full-8-0"
    assert (run / "ledger.sqlite").exists() and (run / "rl" / "metrics.jsonl").exists()
    assert list(run.rglob("model.safetensors")) == []
    assert sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) < 2**20


def test_a_second_start_recomputes_nothing(folder: Path, results: dict[str, Any], no_cell_runs: list[Cell]) -> None:
    assert start(folder) == 0
    assert no_cell_runs == []
    assert read_json(folder / "label_efficiency.json")["cells"] == results["cells"]


def test_a_summary_alone_runs_nothing(folder: Path, tmp_path: Path, no_cell_runs: list[Cell]) -> None:
    assert start(folder, "--summarise", "--seeds", "0", "1", "2", "--output", str(tmp_path / "again.json")) == 0
    assert no_cell_runs == []
    again = read_json(tmp_path / "again.json")
    assert (again["finished"], again["wanted"]) == (10, 15) and (tmp_path / "again.svg").exists()


def test_a_grid_goes_on_from_a_results_file(
    folder: Path, results: dict[str, Any], tmp_path: Path, no_cell_runs: list[Cell], capsys: pytest.CaptureFixture[str]
) -> None:
    kept = str(folder / "label_efficiency.json")
    assert start(tmp_path, "--begin-with", kept) == 0
    again = read_json(tmp_path / "label_efficiency.json")
    assert no_cell_runs == [] and again["cells"] == results["cells"] and again["curves"] == results["curves"]
    name = "cells/full-8-0.json"
    assert read_json(tmp_path / name) == read_json(folder / name)
    assert start(tmp_path / "other", "--begin-with", kept, "--", "rl.learning_rate=1e-3") == 2
    assert "sft-0-0 was made with other overrides; leave --begin-with out" in capsys.readouterr().err


def test_other_overrides_are_not_mixed_in(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(folder, "--", "rl.learning_rate=1e-3") == 2
    assert "was made with other overrides; give another --folder" in capsys.readouterr().err


def test_a_failed_cell_is_reported_and_the_others_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(grid: Grid, cell: Cell) -> dict[str, Any]:
        if cell.seed == 1:
            raise UserError("the disk is full")
        record = dict(read_json(folder / "cells" / f"{cell.name}.json"))
        write_json(grid.file(cell), record)
        return record

    monkeypatch.setattr(label_efficiency, "run_cell", run)
    monkeypatch.setattr(label_efficiency, "make_sft", lambda *_: None)
    monkeypatch.setattr(label_efficiency, "make_reward", lambda *_: None)
    assert start(tmp_path, "--arms", "full", "--budgets", "8", "16") == 1
    found = read_json(tmp_path / "label_efficiency.json")
    assert found["failed"] == {f"full-{budget}-1": "UserError: the disk is full" for budget in BUDGETS}
    assert found["finished"] == 2 and "failed: full-8-1: UserError: the disk is full" in capsys.readouterr().out


def test_what_rests_on_a_failed_stage_is_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_cell_runs: list[Cell], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise UserError("no memory")

    monkeypatch.setattr(label_efficiency, "make_sft", fail)
    assert start(tmp_path, "--seeds", "0") == 2  # no cell to sum up
    assert no_cell_runs == []
    said = capsys.readouterr()
    assert "full-8-0: not tried: first labels of seed 0, budget 8 failed" in said.out
    assert "no finished cell" in said.err


def test_a_killed_worker_is_no_failed_cell(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def die(*_: object) -> None:
        raise BrokenExecutor

    monkeypatch.setattr(label_efficiency, "run_cell", die)
    assert start(folder, "--arms", "uniform_dpo") == 2
    assert "a worker process was killed (out of memory?); start again" in capsys.readouterr().err


def test_gold_answers_and_no_labels_are_what_they_say(folder: Path) -> None:
    grid = Grid(folder, (*COMMON, *SCHEDULE, *QUICK))
    gold = run_cell(grid, Cell("gold", -1, 0))
    assert gold["labels"]["gold"] == gold["labels"]["spent"] - gold["labels"]["first"] > 30
    for arm in ("majority", "random_reward"):
        assert run_cell(grid, Cell(arm, 0, 0))["labels"]["spent"] == 0
