"""Whole runs in two processes, very small: the end of one process's run, and stopped ones go on with fewer or more."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from kill import QUICK
from provenance import ROOT
from same_end import ledger_rows, unlike
from strike import Strike, start, strike

NOISE = 1e-4  # sums in another order, through a whole run
MORE_NOISE = 1e-3  # fresh adapters: a KL near 0 is the difference of nearly equal numbers
COMMON = (*QUICK, "hardware.threads=1", "hardware.device=cpu")
# 45 rows in steps of 8; DPO; a reward model that trains its backbone; one stream of random numbers.
FULL = (*COMMON, "data.sft_prompts=45", "rl=dpo", "reward.finetune=full", "reward.epochs=1")
# Adapters on one base, a value model, and random numbers by batch, of which there are several.
ADAPTERS = (
    *(*COMMON, "model.lora.enabled=true", "reward.finetune=lora", "reward.epochs=1", "rl.advantage=gae"),
    *("rl.value_warmup_steps=1", "rl.draws=batch", "rl.rollout_batch_size=8", "evaluation.batch_size=5"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """Start a run and wait for its end."""
    folder = tmp_path_factory.mktemp("runs")

    def finished(name: str, overrides: Sequence[str], processes: int = 1) -> Path:
        run = folder / name
        process = start(run, overrides, processes)
        assert process.wait(timeout=900) == 0, run.with_name(f"{name}.txt").read_text()[-4000:]
        return run

    yield finished


def lines(run: Path, stage: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_end_as_one_does(runs: Callable[..., Path]) -> None:
    one, two = runs("one", FULL), runs("two", FULL, processes=2)
    compared = unlike(one, two, NOISE)
    assert {name: difference for name, difference in compared.items() if difference} == {}
    assert {"ledger.sqlite", "summary.json", "rl/metrics.jsonl", "eval/samples_rl.jsonl"} <= compared.keys()
    assert [line["step"] for line in lines(two, "sft")] == list(range(1, 7)) and len(lines(two, "rl")) == 8
    assert any(line["grad_norm"] > 0 for line in lines(two, "rl") if "grad_norm" in line)
    printed = two.with_name("two.txt").read_text()
    assert len(re.findall(r"^.*stage rl$", printed, re.M)) == 1 and printed.count("Accuracy at temperature 0") == 1


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Strike]]:
    """A run that two processes begin, one goes on with, and two end."""
    run = tmp_path_factory.mktemp("stopped") / "run"

    def at(pattern: str) -> Callable[[set[str]], bool]:
        return lambda states: any(re.fullmatch(pattern, state) for state in states)

    strikes = [
        strike(run, ADAPTERS, at("sft step [3-5]"), sent=signal.SIGTERM, processes=2),
        strike(run, ADAPTERS, at("rl step [3-6]"), sent=signal.SIGTERM),
    ]
    assert start(run, ADAPTERS, processes=2).wait(timeout=900) == 0, run.with_name("run.txt").read_text()[-4000:]
    return run, strikes


def test_sigterm_saves_once_and_both_processes_leave(stopped: tuple[Path, list[Strike]]) -> None:
    _, (first, _) = stopped
    told = [line for line in first.output if line.startswith("trlhf: ")]
    (step,) = re.findall(r"stopped by SIGTERM at step (\d) of the sft stage", "\n".join(first.output))
    assert len(told) == 1 and f"sft/checkpoint-{step}" in first.disk["checkpoints"]
    assert not any("not whole" in name for name in first.disk["checkpoints"])


def test_a_checkpoint_loads_on_fewer_and_on_more_processes(
    stopped: tuple[Path, list[Strike]], runs: Callable[..., Path]
) -> None:
    run, strikes = stopped
    text = run.with_name("run.txt").read_text()
    assert strikes[1].status == 143 and "sft: going on from step" in text
    compared = unlike(run, runs("adapters", ADAPTERS), MORE_NOISE)
    assert {name: difference for name, difference in compared.items() if difference} == {}
    rows = ledger_rows(run / "ledger.sqlite")
    assert len(rows["questions"]) == len(rows["answers"]) == 20


# ---- FSDP 2, by the user's accelerate file ----

DIVIDED = (*COMMON, "rl.advantage=gae", "rl.value_warmup_steps=1")
ACCELERATE_FILE = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP}
machine_rank: 0
num_machines: 1
num_processes: 2
mixed_precision: 'no'
use_cpu: false
"""


def test_a_run_on_divided_models_ends_as_one_on_whole_ones(runs: Callable[..., Path], tmp_path: Path) -> None:
    file, run = tmp_path / "accelerate.yaml", tmp_path / "divided"
    file.write_text(ACCELERATE_FILE)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    done = subprocess.run(
        [*command, "--main_process_port", "0", "-m", "trlhf", *DIVIDED, f"run.dir={run}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = (run / "trlhf.log").read_text()
    assert "in sft every process holds the whole model; rl divides them" in said
    assert said.count("weights are divided among 2 processes") == 4  # policy, reference, critic, reward model
    compared = unlike(runs("whole", DIVIDED), run, NOISE)
    assert {name: difference for name, difference in compared.items() if difference} == {}


# ---- sweeps ----

ONE_STAGE = (*COMMON, "stage=sft", "data.sft_prompts=16")


def sweep(folder: Path, launcher: Sequence[str], *overrides: str) -> str:
    """Do a sweep over two seeds, and return what was printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "trlhf", "--multirun", "seed=0,1", *ONE_STAGE, *overrides]
    done = subprocess.run(
        [*command, f"hydra.sweep.dir={folder}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert all((folder / job / "sft" / "done").exists() for job in "01")
    assert [json.loads((folder / job / "summary.json").read_text())["seed"] for job in "01"] == [0, 1]
    return done.stdout


def test_two_processes_do_the_jobs_of_a_sweep_one_after_the_other(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    printed = sweep(tmp_path / "sweep", launcher)
    assert printed.count("16 of 16 rows used") == printed.count("sft steps: 2 of 2") == 2


def test_the_tasks_of_a_job_are_processes_of_one_run(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="hydra-submitit-launcher is not installed")
    sweep(tmp_path / "sweep", (), "hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2")
    outputs = sorted((tmp_path / "sweep" / ".submitit").glob("*/*_log.out"))
    assert len(outputs) == 4  # two jobs of two tasks
    assert sum("sft steps: 2 of 2" in path.read_text() for path in outputs) == 2
