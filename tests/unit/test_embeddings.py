"""Tokens that a template adds: room for them, how they begin, that they are learned and that responses end in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from trlhf.config import Config, ModelConfig, build_config
from trlhf.embeddings import make_room, rows_by_layer
from trlhf.models import MICRO_BASE, load_causal_lm, load_tokenizer
from trlhf.run import RunDirectory, StageDirectory
from trlhf.sft.templates import apply_template, base_tokenizer
from trlhf.sft.train import train_sft
from trlhf.types import Demonstration

# peft asks transformers by a name that transformers has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CHATML = {"name": "chatml", "added_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<|im_end|>"}
CHAT: Any = [{"role": "user", "content": "What is 2 plus 3?"}, {"role": "assistant", "content": "5."}]
SAME = [Demonstration(tuple(CHAT), f"a:{i}") for i in range(4)]


@pytest.fixture(params=["tied", "untied"])
def base(request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model, and one whose head is not its embedding, as in Mistral-7B."""
    if request.param == "tied":
        return tiny_model_dir
    values = json.loads((tiny_model_dir / "config.json").read_text())
    torch.manual_seed(1)
    MistralForCausalLM(MistralConfig(**{**values, "tie_word_embeddings": False})).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def configured(base: Path, **groups: Any) -> Config:
    sft = {"batch_size": 4, "microbatch_size": 4, "learning_rate": 1e-2, "save_steps": 1000, **groups.pop("sft", {})}
    model = {"name": str(base), "max_length": 320, **groups.pop("model", {})}
    values = {"model": model, "sft": sft, "template": CHATML, "hardware": {"device": "cpu"}, **groups}
    return build_config(values)


def adapters(lora: bool) -> dict[str, Any]:
    return {"model": {"lora": {"enabled": True}}, "reward": {"finetune": "lora"}} if lora else {}


def test_new_rows_are_the_mean_of_the_old_ones(base: Path) -> None:
    config = configured(base)
    tokenizer = base_tokenizer(config)
    model = load_causal_lm(base, config.model)
    old = [layer.weight.detach().clone() for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    rows = make_room(model, tokenizer)
    assert rows == [len(old[0]), len(old[0]) + 1] == tokenizer.convert_tokens_to_ids(CHATML["added_tokens"])
    assert model.config.vocab_size == len(tokenizer)
    for layer, before in zip((model.get_input_embeddings(), model.get_output_embeddings()), old, strict=True):
        assert torch.equal(layer.weight[: len(before)], before)
        assert torch.allclose(layer.weight[rows], before.mean(0).expand(2, -1), atol=1e-7)
    ids = torch.tensor([[1, 40, 41]])
    new = model(ids).logits.softmax(-1)[0, -1]
    assert new[rows[0]] < 1.5 / len(new)  # no more probable than the average token, or thereabouts
    assert make_room(model, tokenizer) == []


def test_a_model_with_spare_rows_stays_as_it_is(tiny_model_dir: Path) -> None:
    model = load_causal_lm(tiny_model_dir, ModelConfig())
    model.resize_token_embeddings(320, mean_resizing=False)
    tokenizer = apply_template(load_tokenizer(tiny_model_dir), configured(tiny_model_dir).template)
    assert make_room(model, tokenizer) == [] and model.config.vocab_size == 320


def test_adapters_train_the_new_rows_of_both_layers(base: Path) -> None:
    config = configured(base)
    model = load_causal_lm(base, config.model)
    rows = make_room(model, base_tokenizer(config))
    layers = rows_by_layer(model, rows)
    assert layers == {"model.embed_tokens": rows, "lm_head": rows}
    assert rows_by_layer(model, []) == {}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_model_learns_to_end_with_the_new_token(tmp_path: Path, lora: bool) -> None:
    """It is learned by heart, saved, loaded by plain transformers, and generates up to the new EOS."""
    config = configured(MICRO_BASE, sft={"epochs": 40.0}, **adapters(lora))
    stage = RunDirectory(tmp_path).stage("sft")
    assert train_sft(SAME, config, stage)["loss"] < 0.1
    tokenizer = AutoTokenizer.from_pretrained(stage.path / "model")
    model = AutoModelForCausalLM.from_pretrained(stage.path / "model")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == model.config.eos_token_id == end
    ids = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=20)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "5.<|im_end|>"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_what_is_saved_has_the_new_rows_as_they_were_learned(base: Path, tmp_path: Path, lora: bool) -> None:
    config = configured(base, sft={"epochs": 4.0}, **adapters(lora))
    stage = RunDirectory(tmp_path / "run").stage("sft")
    train_sft(SAME, config, stage)
    before, after = load_file(base / "model.safetensors"), load_file(stage.path / "model" / "model.safetensors")
    assert set(after) == set(before)
    _, notes = AutoModelForCausalLM.from_pretrained(stage.path / "model", output_loading_info=True)
    assert not any(notes[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), notes
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & set(before):
        old, new = before[name], after[name]
        assert torch.equal(new[: len(old)], old) is lora  # adapters leave the old rows as they are
        assert new.shape[0] == len(old) + 2 and not torch.equal(new[-1], new[-2]), "they began equal"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_killed_run_goes_on_with_its_new_rows(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    """The rows that a checkpoint holds are those that the run goes on from."""
    config = configured(tiny_model_dir, sft={"epochs": 4.0, "save_steps": 2}, **adapters(lora))
    log = StageDirectory.log

    def killed(self: StageDirectory, step: int, **metrics: Any) -> None:
        log(self, step, **metrics)
        if step == 3:
            raise KeyboardInterrupt

    train_sft(SAME, config, RunDirectory(tmp_path / "whole").stage("sft"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StageDirectory, "log", killed)
        train_sft(SAME, config, RunDirectory(tmp_path / "cut").stage("sft"))
    train_sft(SAME, config, RunDirectory(tmp_path / "cut").stage("sft"))
    whole, cut = (load_file(tmp_path / name / "sft/model/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
