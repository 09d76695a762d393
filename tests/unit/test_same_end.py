"""The comparison of two runs sees every difference but times."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from same_end import differences, kept_labels, ledger_rows

from trlhf.labelers.exact import ExactVerifier
from trlhf.ledger import Ledger
from trlhf.run import RunDirectory
from trlhf.types import Prompt, Question

POOL = [Prompt(f"p{n}", ({"role": "user", "content": f"{n} plus 3?"},)) for n in range(4)]
GOLD = {prompt.id: str(n + 3) for n, prompt in enumerate(POOL)}


def ask(run: Path, count: int) -> None:
    with Ledger(run / "ledger.sqlite", 4) as ledger:
        questions = [Question("verdict", prompt, ("It is 3.",), "3", "why", 1) for prompt in POOL[:count]]
        ledger.ask(questions, ExactVerifier(GOLD))


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs that went the same way, at other times and in other folders."""
    for name, seconds in (("one", 1.0), ("two", 2.0)):
        run = RunDirectory(tmp_path / name)
        stage = run.stage("rl")
        stage.log(1, loss=0.25, seconds=seconds, tokens_per_second=100 / seconds)
        stage.write_json("config.yaml", {"seed": 0, "run": {"dir": str(run.path)}})
        (stage.path / "card.md").write_text(f"of {run.path}/sft")
        modules = ["k_proj", "q_proj"] if name == "one" else ["q_proj", "k_proj"]
        stage.write_json("adapter_config.json", {"target_modules": modules, "r": 4})
        (stage.path / "model.safetensors").write_bytes(b"weights")
        ask(run.path, 3)
        stage.complete({"loss": 0.25, "made": {"sft": seconds}})
        run.update_summary({"seconds": {"rl": seconds}, "seed": 0})
        run.lock()
        run.close()
    return tmp_path / "one", tmp_path / "two"


def found(runs: tuple[Path, Path]) -> dict[str, str]:
    return {name: difference for name, difference in differences(*runs).items() if difference}


def test_times_and_folders_make_no_difference(runs: tuple[Path, Path]) -> None:
    assert found(runs) == {}
    names = {
        "adapter_config.json",
        "card.md",
        "config.yaml",
        "done",
        "metrics.json",
        "metrics.jsonl",
        "model.safetensors",
    }
    assert set(differences(*runs)) == {"ledger.sqlite", "summary.json", *(f"rl/{name}" for name in names)}


def write(path: Path, text: str) -> None:
    path.write_text(text)


def change(path: Path, old: str, new: str) -> None:
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))


CHANGES: dict[str, Callable[[Path], None]] = {
    "rl/model.safetensors": lambda run: write(run / "rl/model.safetensors", "weighty"),
    "rl/metrics.jsonl": lambda run: change(run / "rl/metrics.jsonl", "0.25", "0.2500000000000001"),
    "rl/metrics.json": lambda run: change(run / "rl/metrics.json", "0.25", "null"),
    "summary.json": lambda run: change(run / "summary.json", '"seed": 0', '"seed": 0.0'),
    "rl/config.yaml": lambda run: change(run / "rl/config.yaml", '"seed": 0', '"seed": 1'),
    "rl/card.md": lambda run: change(run / "rl/card.md", "/sft", "/rl"),
    "rl/adapter_config.json": lambda run: change(run / "rl/adapter_config.json", "k_proj", "v_proj"),
    "rl/done": lambda run: (run / "rl/done").unlink(),
    "rl/.x.tmp": lambda run: write(run / "rl/.x.tmp", "left"),
    "ledger.sqlite": lambda run: ask(run, 4),
}


@pytest.mark.parametrize("name", CHANGES)
def test_everything_else_does(runs: tuple[Path, Path], name: str) -> None:
    CHANGES[name](runs[1])
    assert list(found(runs)) == [name]


def test_one_line_more_is_seen(runs: tuple[Path, Path]) -> None:
    RunDirectory(runs[1]).stage("rl").log(2)
    assert list(found(runs)) == ["rl/metrics.jsonl"]


def test_a_label_given_again_is_seen_by_its_time(runs: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = (ledger_rows(run / "ledger.sqlite") for run in runs)
    assert kept_labels(one, one) == (0, 0) and kept_labels(one, two) == (3, 3)
    ask(runs[0], 4)
    assert kept_labels(one, ledger_rows(runs[0] / "ledger.sqlite")) == (0, 0)
    del one["answers"][next(iter(one["answers"]))]
    assert kept_labels(ledger_rows(runs[0] / "ledger.sqlite"), one)[0] == 2
    assert ledger_rows(tmp_path / "none.sqlite") == {"questions": {}, "answers": {}}


def test_what_a_killed_process_left_in_the_log_of_the_ledger_is_read(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite", 4) as ledger:
        ledger.ask([Question("verdict", POOL[0], ("It is 3.",), "3", "why", 1)], ExactVerifier(GOLD))
        for name in ("ledger.sqlite", "ledger.sqlite-wal"):
            shutil.copy(tmp_path / name, tmp_path / f"killed-{name}")
    (tmp_path / "killed-ledger.sqlite-wal").rename(tmp_path / "killed.sqlite-wal")
    (tmp_path / "killed-ledger.sqlite").rename(tmp_path / "killed.sqlite")
    assert len(ledger_rows(tmp_path / "killed.sqlite")["answers"]) == 1
