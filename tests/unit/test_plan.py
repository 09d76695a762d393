"""The plan of a run: sizes that are counted, not guessed, and nothing started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import trlhf
from trlhf import plan
from trlhf.compose import compose
from trlhf.config import Config, LoraConfig, ModelConfig
from trlhf.estimate.lengths import longest_possible
from trlhf.estimate.remedies import needed
from trlhf.estimate.shape import MISTRAL_7B, Shape, shape_of
from trlhf.hardware import GIB
from trlhf.models import load_causal_lm, model_path
from trlhf.roles import SharedBase


def one(*overrides: str) -> Config:
    (config,) = compose(overrides).configs
    return config


def test_mistral_7b_has_as_many_weights_as_its_card_says() -> None:
    assert MISTRAL_7B.parameters == 7_241_732_096
    assert shape_of(one("experiment=cerebrum-7b").model) == MISTRAL_7B


@pytest.mark.parametrize("folder", ["micro", "tiny"])
def test_weights_are_counted_as_the_model_has_them(folder: str, tiny_model_dir: Path) -> None:
    config = ModelConfig(name="micro" if folder == "micro" else str(tiny_model_dir))
    shape = shape_of(config)
    assert shape is not None
    assert shape.parameters == sum(p.numel() for p in load_causal_lm(model_path(config.name), config).parameters())


def test_adapters_are_counted_layer_by_layer() -> None:
    lora = ModelConfig(lora=LoraConfig(enabled=True, r=16))
    assert MISTRAL_7B.adapter_parameters(lora) == 41_943_040
    query = ModelConfig(lora=LoraConfig(enabled=True, r=8, target_modules=["q_proj"]))
    assert MISTRAL_7B.adapter_parameters(query) == 32 * 8 * (4096 + 4096)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
def test_adapters_are_counted_as_peft_makes_them(tiny_model_dir: Path) -> None:
    config = ModelConfig(name=str(tiny_model_dir), lora=LoraConfig(enabled=True, r=4))
    policy = SharedBase(load_causal_lm(tiny_model_dir, config), config).add("policy", 0).model
    shape = shape_of(config)
    assert shape is not None
    assert shape.adapter_parameters(config) == sum(p.numel() for p in policy.parameters() if p.requires_grad)


def test_the_shape_of_a_hub_model_that_nobody_knows_is_not_guessed(tmp_path: Path) -> None:
    assert shape_of(ModelConfig(name="someone/some-model")) is None
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 32}))
    assert shape_of(ModelConfig(name=str(tmp_path))) is None
    (tmp_path / "config.json").write_text("{")
    assert shape_of(ModelConfig(name=str(tmp_path))) is None


def test_a_dry_run_prints_its_plan_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def started(*_: object) -> None:
        raise AssertionError("a dry run opened a run directory")

    monkeypatch.setattr("trlhf.pipeline.open_run", started)
    result = trlhf.run(
        ["experiment=cerebrum-7b", "hardware=gpu-24gb", "data=gsm8k", "data.path=openai/gsm8k", "dry_run=true"]
    )
    assert result.summary == {} and list(tmp_path.iterdir()) == []
    printed = " ".join((capsys.readouterr().out).split())
    for part in (
        "plan (dry_run=true: nothing is started) experiment cerebrum-7b",
        "stages: sft, reward, rl, eval; seed 0",
        "model: mistralai/Mistral-7B-v0.1, bfloat16, NF4 base, LoRA r=16, attention auto, gradient checkpointing",
        "labels: 500 at most, 128 of them for the reward stage; labeler exact; labels by v_optimal, update targeted",
        "7.242 billion parameters",
        "hardware: gpu-24gb, as given",
        "Memory estimate in GiB",
        "it fits into 22.0 GiB",
        "what saves memory, most first:",
        "time, modelled: sft",
        "exact: weights, adapters, gradients, optimizer, KV cache",
    ):
        assert part in printed, printed


def test_the_plan_counts_no_label_that_comes_with_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, count in (("train", 60), ("test", 20)):
        rows = [{"question": f"{name} {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    marked = {"question": "another?", "6b": {"solution": "1\n#### 1", "is_correct": True}}
    (tmp_path / "example_model_solutions.jsonl").write_text(json.dumps(marked) + "\n")
    sizes = ("data.sft_prompts=30", "data.pool_prompts=30", "data.test_prompts=20", "stage=sft")
    plan.print_plan(one("data=gsm8k", f"data.path={tmp_path}", *sizes))
    printed = " ".join(capsys.readouterr().out.split())
    assert "labels: 64 at most, none of them for the reward stage, which takes those that come with the data" in printed
    assert "(1200 at most)" in printed and "(the data)" in printed


def test_a_plan_without_known_sizes_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    plan.print_plan(one("model.name=someone/some-model", "stage=sft", "dry_run=true"))
    printed = " ".join(capsys.readouterr().out.split())
    assert "memory: not estimated, the sizes of someone/some-model are not known here" in printed
    assert "stages: sft; seed 0" in printed


def test_a_run_says_what_it_needs_and_what_to_change(caplog: pytest.LogCaptureFixture) -> None:
    config = one("experiment=cerebrum-7b", "hardware=gpu-80gb", "stage=rl")
    job = plan.job_of(config, longest_possible(config))
    assert job is not None
    with caplog.at_level("INFO"):
        plan.announce_memory(config, job.lengths, None)
    assert caplog.messages == [
        f"memory: about {needed(job)[1] / GIB:.1f} GiB at most (stage rl, the longest possible sequences); "
        "dry_run=true shows what takes it"
    ]
    caplog.clear()
    plan.announce_memory(config, job.lengths, 8 * GIB)
    assert caplog.messages[-1].startswith("memory: only 8.0 GiB are free, so it may not fit; what saves most: rl.")
    assert "model.quantization=nf4" in caplog.messages[-1]
    caplog.clear()
    plan.announce_memory(one("model.name=someone/some-model"), job.lengths, 1.0)
    assert caplog.messages == []


def test_the_plan_of_a_model_that_is_not_at_hand_needs_no_torch() -> None:
    code = "import sys, trlhf; trlhf.run(['experiment=cerebrum-7b', 'dry_run=true']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_plan_of_data_at_hand_rests_on_their_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    plan.print_plan(one("data.sft_prompts=20", "data.pool_prompts=40", "data.test_prompts=10", "dry_run=true"))
    printed = " ".join(capsys.readouterr().out.split())
    assert "Memory estimate in MiB" in printed and "(the data)" in printed and "(the longest" not in printed


def test_a_plan_names_packages_that_are_missing_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trlhf import hardware_checks

    monkeypatch.setattr(hardware_checks, "find_spec", lambda _: None)
    plan.print_plan(one("experiment=cerebrum-7b", "hardware=gpu-24gb", "dry_run=true"))
    printed = " ".join(capsys.readouterr().out.split())
    assert "missing here: the package bitsandbytes, for model.quantization=nf4; pip install 'trlhf[quant" in printed


def test_ties_count_once() -> None:
    assert Shape(4, 1, 8, 2, 1, 10, tied=False).parameters - Shape(4, 1, 8, 2, 1, 10, tied=True).parameters == 40
