"""benchmarks/throughput.py from its command line, tiny: scaling and limits, and the way that a GPU would go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from provenance import ROOT


def measured(folder: Path, *arguments: str) -> dict[str, Any]:
    output = folder / "results.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/throughput.py", "--quick", "--repeats", "1", "--folder", str(folder),
         "--output", str(output), *arguments],
        cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(output.read_text())
    return found["cells"]


def test_how_ours_grows_and_how_near_the_limit_it_is(tmp_path: Path) -> None:
    cells = measured(tmp_path, "--only", "scaling", "limit", "--models", "micro")
    rows = cells["scaling, micro"]["rows"]
    assert {row["series"].split(":")[0] for row in rows} == {
        "tokens of a sequence", "sequences of a pass", "responses decoded together", "prompts of the pool",
        "labels of the ledger",
    }  # fmt: skip
    assert all(row["seconds"] > 0 and row["growth"] > 0 for row in rows)
    limit = cells["limit, micro"]
    assert limit["peak_gflops"] > 1 and limit["bandwidth_gb"] > 0.5
    assert all(0 < row["of_flops"] < 1.2 for row in limit["limits"])


@pytest.mark.skipif("not __import__('importlib.util').util.find_spec('bitsandbytes')", reason="bitsandbytes is missing")
def test_every_cell_of_a_gpu_runs_on_a_tiny_shape(tmp_path: Path) -> None:
    cells = measured(tmp_path, "hardware=gpu", "model=mistral-7b", "weights=random")
    assert list(cells) == [f"{name}, tiny" for name in (
        "sft, LoRA", "sft, QLoRA", "sft, full", "rollouts at 64", "PPO, LoRA", "PPO, NF4", "dpo, LoRA"
    )]  # fmt: skip
    for cell in cells.values():
        assert len(cell["arms"]) == 2 and all(arm["per_second"] > 0 for arm in cell["arms"].values())
