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
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from trlhf.config import HardwareConfig, LoraConfig, ModelConfig, build_config
from trlhf.errors import UserError
from trlhf.logprobs import SequenceBatch, pad_sequences, response_logprobs
from trlhf.models import (
    MICRO_BASE,
    choose_device,
    encode_prompt,
    encode_response,
    load_causal_lm,
    load_policy,
    load_tokenizer,
    model_path,
    save_policy,
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


def adapted(path: Path) -> tuple[PreTrainedModel, Any]:
    """Load a policy whose adapters do something: their second factor starts at zero."""
    policy, reference = load_policy(path, LORA, "cpu")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return policy, reference


def test_fresh_adapters_depend_on_the_seed_alone(tiny_model_dir: Path) -> None:
    def adapters(drawn_before: int, seed: int) -> list[torch.Tensor]:
        torch.manual_seed(drawn_before)
        state = torch.get_rng_state()
        policy, _ = load_policy(tiny_model_dir, LORA, "cpu", seed)
        assert torch.equal(torch.get_rng_state(), state), "nothing else may draw otherwise because of the adapters"
        return [parameter.detach() for name, parameter in policy.named_parameters() if "lora_A" in name]

    first, again, other = adapters(1, 0), adapters(2, 0), adapters(1, 5)
    assert first and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.fixture(scope="module")
def batch() -> SequenceBatch:
    return pad_sequences([[1, 9, 8], [1, 7]], [[5, 6, 2], [4, 2]], 3)


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


def test_adapters_are_saved_merged_and_the_policy_stays_as_it_was(tiny_model_dir: Path, tmp_path: Path) -> None:
    policy, _ = adapted(tiny_model_dir)
    tokenizer = load_tokenizer(tiny_model_dir)
    ids = torch.tensor([encode_prompt(tokenizer, CHAT)])
    with torch.no_grad():
        before = policy(ids).logits
        weights = {name: parameter.clone() for name, parameter in policy.named_parameters()}
        save_policy(policy, tokenizer, tmp_path / "saved")
        after = policy(ids).logits
        plain, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
        saved = plain(ids).logits
        base = load_causal_lm(tiny_model_dir, ModelConfig())(ids).logits
    assert not any(notes[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), notes
    assert (saved - base).abs().max() > 1e-3, "the adapters changed nothing, so this test could not fail"
    torch.testing.assert_close(saved, before, atol=1e-5, rtol=0)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter, weights[name], atol=1e-6, rtol=0)
    assert [p.requires_grad for p in policy.parameters()] == ["lora_" in name for name in weights]


@pytest.mark.parametrize("lora", [False, True])
def test_a_saved_folder_needs_nothing_of_ours(tiny_model_dir: Path, tmp_path: Path, lora: bool) -> None:
    policy = adapted(tiny_model_dir)[0] if lora else load_causal_lm(tiny_model_dir, ModelConfig())
    save_policy(policy, load_tokenizer(tiny_model_dir), tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("adapter*")) and not list((tmp_path / "saved").glob("*.bin"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.chat_template == load_template("cerebrum")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    greedy = model.generation_config
    assert (greedy.do_sample, greedy.eos_token_id, greedy.pad_token_id) == (False, 2, 3)
    ids = torch.tensor([encode_prompt(tokenizer, CHAT)])
    first, second = (model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4) for _ in range(2))
    assert torch.equal(first, second)


def test_the_reference_under_adapters_is_the_sft_model(tiny_model_dir: Path, batch: SequenceBatch) -> None:
    policy, reference = adapted(tiny_model_dir)
    sft = load_causal_lm(tiny_model_dir, ModelConfig())
    with torch.no_grad():
        expected, own = response_logprobs(sft, batch), response_logprobs(policy, batch)
        with reference.active(policy) as model:
            found = response_logprobs(model, batch)
        again = response_logprobs(policy, batch)
    torch.testing.assert_close(found[batch.response_mask], expected[batch.response_mask], atol=1e-6, rtol=0)
    assert (own - expected).abs().max() > 1e-3
    assert torch.equal(own, again)


def test_the_reference_in_full_fine_tuning_is_a_frozen_copy(tiny_model_dir: Path, batch: SequenceBatch) -> None:
    policy, reference = load_policy(tiny_model_dir, ModelConfig(), "cpu")
    with torch.no_grad():
        expected = response_logprobs(policy, batch)
        for parameter in policy.parameters():
            parameter.mul_(1.1)
        with reference.active(policy) as model:
            assert model is not policy and not any(p.requires_grad for p in model.parameters())
            assert torch.equal(response_logprobs(model, batch), expected)
    assert all(p.requires_grad for p in policy.parameters())


def test_gradients_reach_adapters_only(tiny_model_dir: Path, batch: SequenceBatch) -> None:
    policy, _ = adapted(tiny_model_dir)
    loss: Any = (response_logprobs(policy, batch) * batch.response_mask).sum()
    loss.backward()
    graded = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    modules = {name.split(".")[-4] for name in graded}
    assert graded and all("lora_" in name for name in graded)
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_weights_that_rl_trains_are_float32_whatever_the_model_is_stored_in(tiny_model_dir: Path) -> None:
    from trlhf.rl.critic import Critic

    stored = ModelConfig(dtype="bfloat16")
    policy, reference = load_policy(tiny_model_dir, stored, "cpu")
    with reference.active(policy) as model:
        roles = [policy, model, Critic(tiny_model_dir, stored, "cpu")]
    assert all({p.dtype for p in role.parameters()} == {torch.float32} for role in roles)
    policy, _ = load_policy(tiny_model_dir, replace(LORA, dtype="bfloat16"), "cpu")
    types = {(p.requires_grad, p.dtype) for p in policy.parameters()}
    assert types == {(True, torch.float32), (False, torch.bfloat16)}
