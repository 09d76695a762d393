"""Which hardware file is taken, what it sets, what the user typed beside it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trlhf import hardware
from trlhf.attention import choose_attention
from trlhf.compose import compose
from trlhf.config import Config, ModelConfig, build_config
from trlhf.errors import ConfigError
from trlhf.hardware import Card, choose, visible_cards
from trlhf.models import load_causal_lm
from trlhf.sft.train import uses_liger

A100, RTX = Card("NVIDIA A100-SXM4-80GB", 80.0), Card("NVIDIA GeForce RTX 4090", 23.99)
LISTING = """0, GPU-11aa, NVIDIA GeForce RTX 4090, 24564
1, GPU-22bb, NVIDIA A100-SXM4-80GB, 81920
"""
BIG = ("experiment=cerebrum-7b", "dry_run=true")
HARDWARE = ("cpu", "gpu-24gb", "gpu-80gb", "multi-gpu")


def one(*overrides: str) -> Config:
    (config,) = compose(overrides).configs
    return config


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    (problem,) = caught.value.problems
    return problem


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the machine have these cards, and torch this build."""

    def pretend(*cards: Card, build: str = "cuda") -> None:
        monkeypatch.setattr(hardware, "cards", lambda: cards)
        monkeypatch.setattr(hardware, "torch_build", lambda: build)

    return pretend


@pytest.mark.parametrize(
    ("name", "dtype", "quantization", "attention", "kernels", "device", "microbatch", "rollouts"),
    [
        ("cpu", "bfloat16", "none", "sdpa", "torch", "cpu", 1, 8),
        ("gpu-24gb", "bfloat16", "nf4", "auto", "auto", "cuda", 4, 32),
        ("gpu-80gb", "bfloat16", "none", "auto", "auto", "cuda", 8, 128),
        ("multi-gpu", "bfloat16", "none", "auto", "auto", "cuda", 8, 128),
    ],
)
def test_the_recipe_composes_on_each(
    name: str, dtype: str, quantization: str, attention: str, kernels: str, device: str, microbatch: int, rollouts: int
) -> None:
    config = one(*BIG, f"hardware={name}")
    model = config.model
    assert (model.dtype, model.quantization, model.attention, model.lora.enabled) == (
        dtype,
        quantization,
        attention,
        True,
    )
    assert (config.hardware.name, config.hardware.device, config.hardware.automatic) == (name, device, False)
    assert config.sft.kernels == kernels and config.model.gradient_checkpointing
    sizes = (config.sft.microbatch_size, config.reward.microbatch_size, config.rl.microbatch_size)
    assert sizes == (microbatch,) * 3 and config.rl.rollout_batch_size == rollouts


@pytest.mark.parametrize("name", HARDWARE)
def test_what_the_user_types_wins(name: str) -> None:
    typed = ("model.dtype=float32", "model.quantization=none", "model.gradient_checkpointing=false")
    typed += ("rl.microbatch_size=16", "sft.microbatch_size=16", "rl.rollout_batch_size=64", "sft.kernels=torch")
    config = one(*typed, *BIG, f"hardware={name}", "model.attention=eager")
    assert (config.model.dtype, config.model.quantization, config.model.attention) == ("float32", "none", "eager")
    assert not config.model.gradient_checkpointing
    assert (config.rl.microbatch_size, config.sft.microbatch_size, config.rl.rollout_batch_size) == (16, 16, 64)
    assert config.sft.kernels == "torch"


def test_the_embedded_model_is_the_same_everywhere(machine: Any) -> None:
    machine()
    plain = one()
    assert plain.model == ModelConfig() and plain.sft == Config().sft and plain.rl == Config().rl
    assert (plain.hardware.name, plain.hardware.device, plain.hardware.automatic) == ("cpu", "cpu", True)
    for name in HARDWARE[1:]:
        config = one(f"hardware={name}")
        assert (config.model.dtype, config.model.quantization, config.model.lora.enabled) == ("float32", "none", False)
        assert (config.rl, config.reward, config.evaluation) == (plain.rl, plain.reward, plain.evaluation)
        assert choose_attention(config.model.attention, config.model.dtype, "cuda", (9, 0), lambda _: True) == "sdpa"


def test_one_is_chosen_where_nobody_chooses(machine: Any) -> None:
    machine(RTX)
    config = one(*BIG)
    assert (config.hardware.name, config.hardware.automatic, config.model.quantization) == ("gpu-24gb", True, "nf4")
    assert hardware.say(config) == (
        "hardware: gpu-24gb, chosen automatically (NVIDIA GeForce RTX 4090, 24.0 GiB); hardware=NAME chooses another"
    )
    assert compose(BIG).overrides[-2:] == ("hardware=gpu-24gb", "++hardware.automatic=true")
    assert hardware.memory_of(config) == RTX.memory * 2**30
    assert one(*BIG, "hardware=auto").hardware.name == "gpu-24gb"
    given = one(*BIG, "hardware=gpu-80gb")
    assert hardware.say(given) == "hardware: gpu-80gb, as given" and hardware.memory_of(given) == 79 * 2**30
    on_cpu = one(*BIG, "hardware.device=cpu")
    assert (on_cpu.hardware.name, on_cpu.model.quantization) == ("cpu", "none")
    assert "chosen automatically (hardware.device=cpu)" in hardware.say(on_cpu)


def test_a_sweep_over_hardware_is_left_alone(machine: Any) -> None:
    machine(RTX)
    found = compose([*BIG, "hardware=cpu,gpu-80gb"], multirun=True)
    assert [config.hardware.name for config in found.configs] == ["cpu", "gpu-80gb"]
    assert not any(config.hardware.automatic for config in found.configs)


def test_an_experiment_may_choose(machine: Any, tmp_path: Path) -> None:
    machine(RTX)
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /hardware: gpu-80gb\nexperiment: mine\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    (config,) = compose(["experiment=mine"], config_dir=str(tmp_path)).configs
    assert (config.hardware.name, config.hardware.automatic) == ("gpu-80gb", False)


@pytest.mark.parametrize(
    ("cards", "build", "name", "reason"),
    [
        ((), "cuda", "cpu", "no NVIDIA card was found"),
        ((RTX,), "cpu", "cpu", "NVIDIA GeForce RTX 4090, 24.0 GiB, but this torch is built without CUDA"),
        ((RTX,), "cuda", "gpu-24gb", "NVIDIA GeForce RTX 4090, 24.0 GiB"),
        ((RTX, RTX), "cuda", "gpu-24gb", "NVIDIA GeForce RTX 4090, 24.0 GiB, the smallest of 2"),
        ((A100,), "cuda", "gpu-80gb", "NVIDIA A100-SXM4-80GB, 80.0 GiB"),
        ((A100, A100), "cuda", "multi-gpu", "NVIDIA A100-SXM4-80GB, 80.0 GiB, the smallest of 2"),
        ((A100, RTX), "cuda", "gpu-24gb", "NVIDIA GeForce RTX 4090, 24.0 GiB, the smallest of 2"),
        ((Card("T4", 15.0),), "cuda", "gpu-24gb", "T4, 15.0 GiB; less than it is made for: see dry_run=true"),
        (None, "cuda", "auto", "nvidia-smi does not say how much memory is to be had; choose one with hardware=NAME"),
        ((), "hip", "auto", "torch is built for ROCm, whose cards are not looked at"),
    ],
)
def test_the_choice(cards: tuple[Card, ...] | None, build: str, name: str, reason: str) -> None:
    found = choose(cards, build)
    assert (found.name, found.reason) == (name, reason)


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["NVIDIA GeForce RTX 4090", "NVIDIA A100-SXM4-80GB"]),
        ("1", ["NVIDIA A100-SXM4-80GB"]),
        ("1,0", ["NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090"]),
        ("GPU-22", ["NVIDIA A100-SXM4-80GB"]),
        ("0,7,1", ["NVIDIA GeForce RTX 4090"]),
        ("-1", []),
        ("", []),
    ],
)
def test_only_visible_cards_count(visible: str | None, names: list[str]) -> None:
    found = visible_cards(LISTING, visible)
    assert found is not None and [card.name for card in found] == names
    assert all(card.memory in (24564 / 1024, 80.0) for card in found)


def test_memory_that_is_not_a_cards_own_is_not_compared() -> None:
    assert visible_cards(LISTING, "MIG-33cc") is None
    assert visible_cards("0, GPU-11aa, NVIDIA GB10, [N/A]\n", None) is None


@pytest.mark.parametrize(
    ("text", "build"),
    [
        ("__version__ = '2.13.0+cu128'\ncuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n", "cuda"),
        ("cuda = '12.8'\nhip = None\n", "cuda"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.2'\n", "hip"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\n", "cpu"),
    ],
)
def test_the_build_of_torch_is_read_from_its_file(
    text: str, build: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text(text)
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(hardware, "find_spec", lambda _: spec)
    assert hardware.torch_build() == build


def test_the_build_is_torchs_own_word() -> None:
    import torch

    expected = "cuda" if torch.version.cuda else "hip" if torch.version.hip else "cpu"
    assert hardware.torch_build() == expected


@pytest.mark.parametrize(
    ("dtype", "device", "capability", "there", "expected"),
    [
        ("bfloat16", "cuda", (9, 0), {"flash_attention_3", "flash_attention_2"}, "flash_attention_3"),
        ("bfloat16", "cuda", (9, 0), {"flash_attention_2"}, "flash_attention_2"),
        ("bfloat16", "cuda", (8, 6), {"flash_attention_3", "flash_attention_2"}, "flash_attention_2"),
        ("bfloat16", "cuda", (8, 6), set(), "sdpa"),
        ("bfloat16", "cuda", (7, 5), {"flash_attention_2"}, "sdpa"),
        ("float32", "cuda", (9, 0), {"flash_attention_3", "flash_attention_2"}, "sdpa"),
        ("bfloat16", "cpu", (9, 0), {"flash_attention_3", "flash_attention_2"}, "sdpa"),
        ("bfloat16", "cuda", None, {"flash_attention_2"}, "sdpa"),
    ],
)
def test_auto_takes_flash_attention_where_it_runs(
    dtype: str, device: str, capability: tuple[int, int] | None, there: set[str], expected: str
) -> None:
    assert choose_attention("auto", dtype, device, capability, there.__contains__) == expected
    assert choose_attention("eager", dtype, device, capability, there.__contains__) == "eager"


def test_auto_on_a_cpu_is_sdpa_and_prompts_are_shared(tiny_model_dir: Path) -> None:
    from trlhf.logprobs import can_share_prompts

    assert can_share_prompts(load_causal_lm(tiny_model_dir, ModelConfig(attention="auto")))


def test_liger_only_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from trlhf.sft import train

    for there in (None, object()):
        monkeypatch.setattr(train, "find_spec", lambda name, there=there: there if name == "liger_kernel" else None)
        assert uses_liger("auto", on_gpu=True) == (there is not None)
        assert not uses_liger("auto", on_gpu=False) and not uses_liger("torch", on_gpu=True)
        assert uses_liger("liger", on_gpu=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["hardware=gpu"],
            "hardware=gpu must be one of auto, cpu, gpu-24gb, gpu-80gb, multi-gpu; choose by the",
        ),
        (
            ["hardware.name=gpu-24gb"],
            "hardware.name=gpu-24gb goes with hardware.device=cuda, not auto; write",
        ),
        (["hardware=cpu", "hardware.device=cuda"], "hardware.name=cpu goes with hardware.device=cpu, not cuda; write "),
        (
            ["hardware=gpu-24gb", "hardware.device=cpu"],
            "hardware.name=gpu-24gb goes with hardware.device=cuda, not cpu",
        ),
        (["hardware=cpu", "model.attention=flash_attention_3"], "model.attention=flash_attention_3 needs a GPU, but "),
        (
            ["hardware=cpu", "sft.kernels=liger"],
            "sft.kernels=liger needs a GPU, but hardware.device=cpu; use sft.kernels=",
        ),
        (
            ["hardware=gpu-80gb", "model.attention=flash_attention_2", "dry_run=true"],
            "model.attention=flash_attention_2 computes in bfloat16, but with model.dtype=float32 weights are float32 ",
        ),
        (
            ["hardware=gpu-80gb", "model.attention=flash_attention_2", "model.dtype=bfloat16", "dry_run=true"],
            "model.attention=flash_attention_2 computes in bfloat16, but with model.lora.enabled=false weights are",
        ),
    ],
)
def test_contradictions(overrides: list[str], message: str) -> None:
    assert refused(*overrides).startswith(message)


@pytest.mark.parametrize(
    ("group", "key", "value", "package"),
    [
        (
            "sft",
            "kernels",
            "liger",
            "liger_kernel, which is not installed; pip install liger-kernel, or use",
        ),
        (
            "model",
            "attention",
            "flash_attention_2",
            "flash_attn, which is not installed; pip install flash-attn, or",
        ),
        (
            "model",
            "quantization",
            "nf4",
            "bitsandbytes, which is not installed; pip install 'trlhf[quantized]', or",
        ),
        (
            "rl",
            "rollout_engine",
            "vllm",
            "vllm, which is not installed; pip install 'trlhf[vllm]', or use rl.rollout_engine=transformers",
        ),
    ],
)
def test_a_missing_package_is_named_and_a_dry_run_needs_none(
    group: str, key: str, value: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trlhf import attention, hardware_checks

    monkeypatch.setattr(hardware_checks, "find_spec", lambda _: None)
    monkeypatch.setattr(attention, "find_spec", lambda _: None)
    values: dict[str, Any] = {"model": {"dtype": "bfloat16", "lora": {"enabled": True}}, "reward": {"finetune": "lora"}}
    values |= {"hardware": {"name": "gpu-24gb", "device": "cuda"}}
    values[group] = {**values.get(group, {}), key: value}
    with pytest.raises(ConfigError) as caught:
        build_config(values)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{group}.{key}={value} needs the package {package}")
    assert build_config({**values, "dry_run": True}).dry_run
