"""FSDP 2 in two processes (gloo, on the CPU): the updates of one process, shares of weights, save and resume."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import shards
import torch
from safetensors.torch import load_file
from trials import LAYOUTS, farthest, sharp_model

# peft asks transformers by a name that transformers has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
Results = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def ranks(tiny_model_dir: Path, folder: Path) -> tuple[Results, Results]:
    """What each of two processes found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ran = subprocess.run(
        [*command, shards.__file__, str(tiny_model_dir), str(folder)],
        env=os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    first, second = (torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    return first, second


@pytest.fixture(scope="module")
def alone(tiny_model_dir: Path) -> Results:
    return dict(shards.updates(tiny_model_dir, shards.nothing))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", shards.TAKEN)
def test_divided_models_learn_what_whole_ones_do(
    ranks: tuple[Results, Results], alone: Results, case: str, layout: str
) -> None:
    first, second, expected = (run[f"{case} ({layout})"] for run in (ranks[0]["updates"], ranks[1]["updates"], alone))
    assert farthest(first["weights"], expected["weights"]) < 1e-5
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    assert first["metrics"] == second["metrics"]
    for found, wanted in zip(first["metrics"], expected["metrics"], strict=True):
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5)


def test_a_process_holds_half_of_weights_and_moments(ranks: tuple[Results, Results]) -> None:
    held = [[run["divided"][name] for name in ("held", "moments", "after")] for run in ranks]
    assert all(share == pytest.approx(0.5, abs=0.05) for run in held for share in run)
    assert [sum(both) for both in zip(*held, strict=True)] == pytest.approx([1.0] * 3)


def test_whole_weights_say_what_gathered_layers_say(ranks: tuple[Results, Results]) -> None:
    for run in ranks:
        inside, layer_by_layer, by_hand = run["divided"]["logprobs"]
        torch.testing.assert_close(inside, layer_by_layer, rtol=0, atol=1e-6)
        torch.testing.assert_close(inside, by_hand, rtol=0, atol=1e-5)
    torch.testing.assert_close(ranks[0]["divided"]["logprobs"], ranks[1]["divided"]["logprobs"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", shards.RESUMED)
def test_two_processes_resume_to_the_bit(ranks: tuple[Results, Results], name: str) -> None:
    for run in ranks:
        assert all(torch.equal(value, run["resumed"][name][key]) for key, value in run["saved"][name].items())


@pytest.mark.parametrize("name", shards.RESUMED)
def test_whole_models_resume_from_shares(
    ranks: tuple[Results, Results], tiny_model_dir: Path, folder: Path, name: str
) -> None:
    assert farthest(ranks[0]["resumed on copies"][name], ranks[0]["saved"][name]) < 1e-5
    assert farthest(shards.resume(tiny_model_dir, folder, shards.nothing)[name], ranks[0]["saved"][name]) < 1e-5


def test_divided_models_resume_from_a_whole_checkpoint(ranks: tuple[Results, Results]) -> None:
    assert ranks[0]["from whole"].keys() and all(
        farthest(run["from whole"][name], run["saved"][name]) < 1e-5 for run in ranks for name in run["from whole"]
    )


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.usefixtures("ranks")
def test_one_process_saves_what_accelerate_divided(tiny_model_dir: Path, folder: Path, lora: bool) -> None:
    saved = load_file(folder / f"saved {lora}" / "sft" / "model" / "model.safetensors")
    expected = dict(sharp_model(tiny_model_dir).named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in saved.items()) and len(saved) >= len(expected) - 1
    if lora:  # fresh: B is 0, and merging it changes nothing
        adapter = load_file(folder / "saved True" / "sft" / "adapter" / "adapter_model.safetensors")
        assert {value.shape for name, value in adapter.items() if "q_proj.lora_A" in name} == {torch.Size([4, 32])}
