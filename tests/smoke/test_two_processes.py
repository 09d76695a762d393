"""Two processes (gloo, on the CPU) take the update that one process takes: gradients, weights, metrics, controller."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from trials import LAYOUTS, farthest

# peft asks transformers by a name that transformers has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
UPDATES = [f"{name} ({layout})" for name in ranks.CASES for layout in LAYOUTS]
REWARD = [f"reward {kind}{more}" for kind in ("full", "lora") for more in ("", ", a label over")]
SFT = ["sft packing=False", "sft packing=True", "sft lora"]
Results = dict[str, Any]


@pytest.fixture(scope="module")
def runs(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Results, Results]:
    """What one process found, and each of two. ``accelerate launch --cpu`` would silently run one process alone."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    ran = subprocess.run(
        [*command, ranks.__file__, str(tiny_model_dir), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    first, second = (torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    return ranks.results(tiny_model_dir, folder / "alone"), first, second


@pytest.mark.parametrize("case", [*UPDATES, *REWARD, *SFT])
def test_two_processes_take_the_step_of_one(runs: tuple[Results, Results, Results], case: str) -> None:
    alone, first, second = (run[case] for run in runs)
    assert runs[1]["world"] == runs[2]["world"] == 2
    for kind in ("gradients", "weights"):
        if kind in alone:
            for role in {name.split(".")[0] for name in alone[kind]}:  # the critic's gradients are much larger
                of_role = [{n: v for n, v in one[kind].items() if n.split(".")[0] == role} for one in (first, alone)]
                assert farthest(*of_role) < 1e-5, (kind, role)
            assert all(torch.equal(value, second[kind][name]) for name, value in first[kind].items())


@pytest.mark.parametrize("case", [*UPDATES, *REWARD])
def test_two_processes_log_what_one_logs(runs: tuple[Results, Results, Results], case: str) -> None:
    alone, first, second = (run[case]["metrics"] for run in runs)
    assert first == second
    assert first == pytest.approx(alone, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("case", [case for case in UPDATES if "dpo" not in case])
def test_both_processes_whiten_over_the_whole_batch(runs: tuple[Results, Results, Results], case: str) -> None:
    alone, first, second = (run[case]["advantages"] for run in runs)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(runs[1][case]["returns"], runs[0][case]["returns"], atol=1e-5, rtol=0)


def test_the_kl_controller_is_the_same_everywhere(runs: tuple[Results, Results, Results]) -> None:
    moved = [run["gae (copies)"]["metrics"]["next_kl_coef"] for run in runs]
    assert moved[0] == pytest.approx(moved[1], rel=1e-6) and moved[1] == moved[2] != 0.1
