"""Gradient checkpointing: less is kept, layers compute twice, and every gradient is the same number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trials import (
    ALGORITHMS,
    LAYOUTS,
    LORA,
    Named,
    Trial,
    demonstrations,
    fit_reward,
    labels,
    sampled_groups,
    sft_steps,
    some_anchors,
)
from trials import sharp_model as load

from trlhf.config import LoraConfig, ModelConfig
from trlhf.logprobs import pad_sequences, response_logprobs
from trlhf.recompute import recomputing

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's


def equal(found: Named, expected: Named) -> bool:
    """Say whether gradients are the same but for rounding: what is recomputed goes through the layers with padding."""
    same = (torch.allclose(found[name], expected[name], atol=1e-6, rtol=1e-4) for name in expected)
    return found.keys() == expected.keys() and all(same)


def computed(model: Any) -> list[int]:
    """Return a list that grows with every computation of the first layer's feed-forward part."""
    calls: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_updates_of_rl_are_the_same(tiny_model_dir: Path, algorithm: str, layout: str) -> None:
    gradients, weights, calls = [], [], []
    for on in (False, True):
        model = ModelConfig(lora=LORA if layout == "adapters" else LoraConfig(), gradient_checkpointing=on)
        trial = Trial(tiny_model_dir, ALGORITHMS[algorithm], layout, model)
        calls.append(computed(trial.policy.model))
        trial.update(sampled_groups(2), some_anchors(3))
        gradients.append(trial.gradients())
        weights.append(trial.weights())
        assert not any(module.training for module in trial.policy.model.model.modules())
    assert gradients[0] and equal(gradients[1], gradients[0]) and equal(weights[1], weights[0])
    assert len(calls[1]) > len(calls[0])  # the backward passes computed again


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_fit_of_the_reward_model_is_the_same(tiny_model_dir: Path, kind: str) -> None:
    fits = [
        fit_reward(
            tiny_model_dir, labels(), backbone=ModelConfig(lora=LORA, gradient_checkpointing=on), finetune=kind
        ).gradients
        for on in (False, True)
    ]
    assert fits[0] and all(equal(found, expected) for found, expected in zip(fits[1], fits[0], strict=True))


@pytest.mark.parametrize("lora", [False, True])
def test_sft_is_the_same(tiny_model_dir: Path, tmp_path: Path, lora: bool) -> None:
    steps = []
    for on in (False, True):
        model = {"gradient_checkpointing": on, "lora": {"enabled": lora, "r": 4}}
        steps.append(sft_steps(tiny_model_dir, tmp_path / str(on), demonstrations(), model=model))
    assert steps[0] and all(equal(found, expected) for found, expected in zip(steps[1], steps[0], strict=True))


def test_layers_keep_their_inputs_only(tiny_model_dir: Path) -> None:
    batch = pad_sequences([[1, 9, 8], [1, 7]], [[5, 6, 2], [4, 2]], 3)
    kept = []
    for on in (False, True):
        model = load(tiny_model_dir, ModelConfig(gradient_checkpointing=on))
        own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
        sizes: dict[int, int] = {}
        alive = []

        def note(value: torch.Tensor, own: set[int] = own, sizes: dict[int, int] = sizes) -> torch.Tensor:
            storage = value.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
                alive.append(value)  # so that no address is used twice  # noqa: B023
            return value

        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            response_logprobs(model, batch)
        kept.append(sum(sizes.values()))
    assert kept[1] < kept[0] / 3


def test_nothing_is_recomputed_without_gradients_and_modes_come_back(tiny_model_dir: Path) -> None:
    model: Any = load(tiny_model_dir, ModelConfig(gradient_checkpointing=True))
    with torch.no_grad(), recomputing(model):
        assert not any(module.training for module in model.modules())
    with pytest.raises(RuntimeError, match="inside"), recomputing(model):
        assert [layer.training for layer in model.model.layers] == [True, True]
        assert not any(module.training for layer in model.model.layers for module in layer.children())
        raise RuntimeError("inside")
    assert not any(module.training for module in model.modules())


def test_the_critic_recomputes_under_its_own_adapter(tiny_model_dir: Path) -> None:
    """Its backward pass comes after the policy's adapter was on: under that one it would compute something else."""
    model = ModelConfig(lora=LORA, gradient_checkpointing=True)
    trial = Trial(tiny_model_dir, replace(ALGORITHMS["gae"], anchor_coef=0.0), "adapters", model)
    trial.update(sampled_groups(2), warmup=True)
    plain = Trial(
        tiny_model_dir,
        replace(ALGORITHMS["gae"], anchor_coef=0.0),
        "adapters",
        replace(model, gradient_checkpointing=False),
    )
    plain.update(sampled_groups(2), warmup=True)
    assert equal(trial.gradients(), plain.gradients()) and any("value" in name for name in trial.gradients())
