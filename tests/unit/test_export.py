"""An adapter on its own over the base, loaded as people load it, is the model that was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import GenerationConfig, PreTrainedModel

from trlhf.config import LoraConfig as LoraSettings
from trlhf.config import ModelConfig
from trlhf.export import save_adapter, stacked
from trlhf.merging import save_model
from trlhf.models import MICRO_BASE, load_causal_lm, load_tokenizer, lora_config
from trlhf.roles import Role, SharedBase

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
MODEL = ModelConfig(lora=LoraSettings(enabled=True, r=4, alpha=8))
IDS = torch.tensor([[1, 40, 41, 42, 43, 44]])


def stir(model: torch.nn.Module, seed: int) -> None:
    """Let adapters that change nothing change something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".lora_B." in name and value.requires_grad:
                value.normal_(0, 0.05, generator=generator)


@pytest.fixture
def sft(tmp_path: Path) -> Path:
    """What the SFT stage leaves: an adapter, and the model with it merged in."""
    torch.manual_seed(0)
    settings: LoraConfig = lora_config(MODEL)
    model = get_peft_model(load_causal_lm(MICRO_BASE, MODEL), settings)
    stir(model, 1)
    model.save_pretrained(tmp_path / "sft" / "adapter")
    (tmp_path / "sft" / "model").mkdir()
    base: PreTrainedModel = model.get_base_model()
    save_model(base, load_tokenizer(MICRO_BASE), tmp_path / "sft" / "model", "float32", "default")
    return tmp_path / "sft" / "model"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_the_sft_adapter_is_the_sft_model(sft: Path) -> None:
    alone = AutoPeftModelForCausalLM.from_pretrained(sft.parent / "adapter", dtype="float32").eval()
    assert torch.allclose(logits(alone), logits(load_causal_lm(sft, MODEL)), atol=1e-4)


def test_what_came_before_rl_is_in_it(sft: Path, tmp_path: Path) -> None:
    shared = SharedBase(load_causal_lm(sft, MODEL), MODEL)
    policy = shared.add("policy", seed=0)
    shared.add("value", seed=0)  # of no concern to the policy
    stir(shared.model, 2)
    (tmp_path / "out").mkdir()
    save_adapter(policy, sft, load_tokenizer(sft), tmp_path / "out")
    with policy.acting() as model:
        expected = logits(model)
    with shared.switched(None):
        before_rl = logits(shared.model)
    alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32").eval()
    assert torch.allclose(logits(alone), expected, atol=1e-4)
    assert not torch.allclose(before_rl, expected, atol=1e-1)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (8, 16, str(MICRO_BASE))
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.chat_template == load_tokenizer(sft).chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "out").do_sample is False
    assert not (tmp_path / "out" / "README.md").exists()


def test_over_the_bare_base_it_is_what_it_is(sft: Path, tmp_path: Path) -> None:
    """As over a quantised base: the policy starts as a copy of the SFT adapter."""
    shared = SharedBase(load_causal_lm(MICRO_BASE, MODEL), MODEL, start=sft.parent / "adapter")
    policy = shared.add("policy", seed=0)
    stir(shared.model, 3)
    (tmp_path / "out").mkdir()
    save_adapter(policy, sft, load_tokenizer(sft), tmp_path / "out")
    with policy.acting() as model:
        expected = logits(model)
    alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32").eval()
    assert torch.allclose(logits(alone), expected, atol=1e-5)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4


def test_two_changes_add_up() -> None:
    first = {"q.lora_A.weight": torch.randn(2, 5), "q.lora_B.weight": torch.randn(3, 2)}
    second = {"q.lora_A.weight": torch.randn(2, 5), "q.lora_B.weight": torch.randn(3, 2)}
    both = stacked(first, second)
    total = sum(one["q.lora_B.weight"] @ one["q.lora_A.weight"] for one in (first, second))
    assert torch.allclose(both["q.lora_B.weight"] @ both["q.lora_A.weight"], total, atol=1e-6)
    with pytest.raises(ValueError, match=r"only one of the two adapters has k\.lora_A"):
        stacked(first, {**second, "k.lora_A.weight": torch.randn(2, 5)})


def test_a_whole_model_has_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this policy is a model of its own; save_model saves it"):
        save_adapter(Role(load_causal_lm(MICRO_BASE, MODEL)), tmp_path, load_tokenizer(MICRO_BASE), tmp_path)
