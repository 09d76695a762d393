"""Loading and saving: refusals in words, tokens that agree everywhere, adapters that plain transformers never sees."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from trlhf.config import HardwareConfig, LoraConfig, ModelConfig, build_config
from trlhf.errors import UserError
from trlhf.models import (
    MICRO_BASE,
    choose_device,
    encode_prompt,
    encode_response,
    load_causal_lm,
    load_tokenizer,
    model_path,
)
from trlhf.sft.templates import load_template
from trlhf.types import Message

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
LORA = ModelConfig(lora=LoraConfig(enabled=True, r=4, alpha=8))
CHAT: list[Message] = [{"role": "user", "content": "what is 2 plus 3?"}]


def copy_with(source: Path, target: Path, **values: str | None) -> Path:
    """Copy a model folder and change its tokenizer's special tokens; None takes one away."""
    shutil.copytree(source, target)
    path = target / "tokenizer_config.json"
    kept = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in kept.items() if value is not None}))
    return target


def test_the_embedded_base_is_a_folder_of_the_package() -> None:
    assert model_path("micro") == str(MICRO_BASE) and (MICRO_BASE / "config.json").is_file()
    assert model_path("mistralai/Mistral-7B-v0.1") == "mistralai/Mistral-7B-v0.1"


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = build_config({})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(config) == "cpu"
    with pytest.raises(UserError, match=r"hardware.device=cuda: torch finds no CUDA device; set hardware.device=cpu"):
        choose_device(replace(config, hardware=HardwareConfig("cuda")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(config) == "cuda"
    assert choose_device(replace(config, hardware=HardwareConfig("cpu"))) == "cpu"


def test_padding_with_eos_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    path = copy_with(tiny_model_dir, tmp_path / "m", pad_token="</s>")
    with pytest.raises(UserError, match=r"its pad token is its EOS token \('</s>'\).* set pad_token to another token"):
        load_tokenizer(path)
    nameless = copy_with(tiny_model_dir, tmp_path / "n", pad_token=None)
    with pytest.raises(UserError, match="its pad token is its EOS token"):
        load_tokenizer(nameless, pad_token="</s>")


def test_a_tokenizer_without_pad_token_takes_the_one_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    path = copy_with(tiny_model_dir, tmp_path / "m", pad_token=None)
    with pytest.raises(UserError, match=r"it names no pad token; set model.pad_token, for instance '<unk>'"):
        load_tokenizer(path)
    with pytest.raises(UserError, match=r"model.pad_token='<nothing>': the tokenizer .* has no such token"):
        load_tokenizer(path, pad_token="<nothing>")
    assert load_tokenizer(path, pad_token="<unk>").pad_token_id == 0
    assert load_tokenizer(tiny_model_dir, pad_token="<unk>").pad_token_id == 3  # its own wins


def test_a_tokenizer_without_eos_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    path = copy_with(tiny_model_dir, tmp_path / "m", eos_token=None)
    with pytest.raises(UserError, match="it has no EOS token, so no response could end"):
        load_tokenizer(path)


def test_a_folder_that_is_not_there_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer .*/none: cannot be loaded \(.+\); give a folder or hub name"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(UserError, match=r"model .*/none: cannot be read \(.+\); if an earlier stage wrote it, delete"):
        load_causal_lm(tmp_path / "none", ModelConfig())


@pytest.mark.parametrize("damage", ["torn", "text", "missing"])
def test_unreadable_weights_are_a_users_error(tiny_model_dir: Path, tmp_path: Path, damage: str) -> None:
    path = copy_with(tiny_model_dir, tmp_path / "m")
    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    if damage != "missing":
        weights.write_bytes(whole[: len(whole) // 2] if damage == "torn" else b"these are no weights")
    with pytest.raises(UserError, match=r"model .*/m: cannot be read \(.+\); if an earlier stage wrote it, delete"):
        load_causal_lm(path, ModelConfig())


def sentencepiece_like(scheme: str) -> PreTrainedTokenizerFast:
    """A tokenizer that marks the start of words with ▁; ``mistral`` is how Mistral-7B-v0.1 puts one before any text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    as_metaspace = "always" if scheme == "mistral" else scheme
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=as_metaspace)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=as_metaspace)
    marks = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=marks, show_progress=False)
    texts = [load_template("cerebrum"), "User: what is 2 plus 3?\nAI: Plan: add. 2 + 3 = 5.\nThe answer is 5."]
    tokenizer.train_from_iterator(texts * 20, trainer)
    if scheme == "mistral":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    fast.chat_template = load_template("cerebrum")
    return fast


@pytest.mark.parametrize("kind", ["byte-level", "mistral", "first", "always", "never", "micro"])
@pytest.mark.parametrize("text", ["The answer is 5.", "Plan: add.\n2 + 3 = 5.\nThe answer is 5.", "  5 ", "is: 2"])
def test_prompt_and_response_are_the_whole_chat(tiny_model_dir: Path, kind: str, text: str) -> None:
    if kind in ("mistral", "first", "always", "never"):
        tokenizer: Any = sentencepiece_like(kind)
        assert any(token.startswith("▁") for token in tokenizer.get_vocab())
    else:
        tokenizer = load_tokenizer(MICRO_BASE if kind == "micro" else tiny_model_dir)
    tokenizer.chat_template = load_template("cerebrum")
    whole = tokenizer.apply_chat_template(
        [*CHAT, {"role": "assistant", "content": text}], tokenize=True, return_dict=False
    )
    prompt, response = encode_prompt(tokenizer, CHAT), encode_response(tokenizer, text)
    assert prompt + response == list(whole)
    assert response[-1] == tokenizer.eos_token_id and prompt[0] == tokenizer.bos_token_id
    assert tokenizer.decode(response[:-1]).strip() == text.strip()
