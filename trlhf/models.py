"""Tokenizers and causal language models: how they are loaded, and how a chat becomes tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trlhf.attention import choose_attention
from trlhf.errors import UserError
from trlhf.types import Message

if TYPE_CHECKING:
    from trlhf.config import Attention, Config, ModelConfig

MICRO_BASE = Path(__file__).parent / "micro" / "base"
_RESPONSE_STARTS: dict[str, tuple[str, str]] = {}  # by the text of the chat template


def model_path(name: str) -> str:
    """Return where a model is loaded from: the embedded base for ``micro``, else the hub name or folder itself."""
    return str(MICRO_BASE) if name == "micro" else name


def choose_device(config: Config) -> str:
    """Return the device that ``hardware.device`` names or, with ``auto``, the GPU where there is one.

    Raises:
        UserError: ``cuda`` is asked for and torch finds none.
    """
    if config.hardware.device == "cuda" and not torch.cuda.is_available():
        raise UserError("hardware.device=cuda: torch finds no CUDA device; set hardware.device=cpu or auto")
    return "cuda" if config.hardware.device != "cpu" and torch.cuda.is_available() else "cpu"


def load_tokenizer(
    path: str | Path, *, pad_token: str | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Load a tokenizer whose pad token exists and differs from EOS.

    Args:
        path: folder, .gguf file or hub name.
        pad_token: the existing token to pad with when the tokenizer names none (Mistral: ``<unk>``).
        revision: hub revision.

    Raises:
        UserError: nothing loadable there, no EOS, no pad token, or pad = EOS (which teaches a model never to stop).
    """
    place, inside = _place(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False, **inside)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"tokenizer {path}: cannot be loaded ({first_line(error)}); give a folder or hub name"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {path}: it has no EOS token, so no response could end; choose another model")
    if tokenizer.pad_token_id is None and pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise UserError(
                f"model.pad_token={pad_token!r}: the tokenizer {path} has no such token; name one of its own, "
                "for instance '<unk>'"
            )
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None:
        raise UserError(f"tokenizer {path}: it names no pad token; set model.pad_token, for instance '<unk>'")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"tokenizer {path}: its pad token is its EOS token ({tokenizer.eos_token!r}), so masking the padding would "
            "hide the end of every response; set pad_token to another token in its tokenizer_config.json, "
            "for instance '<unk>'"
        )
    return tokenizer


def load_causal_lm(
    path: str | Path, config: ModelConfig, device: str = "cpu", *, quantized: bool = False
) -> PreTrainedModel:
    """Load a causal language model from safetensors, dropout off, in ``config.dtype`` on ``device``.

    Args:
        path: folder, .gguf file (its weights are dequantised) or hub name.
        config: type, attention, gradient checkpointing and revision.
        device: where.
        quantized: quantise its linear layers as ``config.quantization`` says; they compute in ``config.dtype``.

    Raises:
        UserError: the folder or hub name holds no readable safetensors model.
    """
    revision = config.revision if str(path) == config.name else None
    quantization = {"quantization_config": _nf4(config), "device_map": {"": device}} if quantized else {}
    try:
        place, inside = _place(path)
        model = AutoModelForCausalLM.from_pretrained(
            place,
            revision=revision,
            dtype=getattr(torch, config.dtype),
            attn_implementation=attention_of(config, device),
            use_safetensors=True,
            trust_remote_code=False,
            **quantization,
            **inside,
        )
    except Exception as error:  # transformers, safetensors and the hub each raise kinds of their own
        raise UserError(
            f"model {path}: cannot be read ({first_line(error)}); if an earlier stage wrote it, delete that stage's "
            "folder and run the stage again"
        ) from error
    model = cast("Any", model).eval()
    for module in model.modules():  # else bitsandbytes repacks the weights for good where it first evaluates
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()  # its word for it; see trlhf.recompute for when it takes place
    return cast("PreTrainedModel", model if quantized else model.to(device))


def attention_of(config: ModelConfig, device: str) -> Attention:
    """Return the attention that a model computes with once it is on ``device``."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return choose_attention(config.attention, config.dtype, device, capability)


def _place(path: str | Path) -> tuple[str, dict[str, str]]:
    """Return where transformers finds a model, and which file it is where it is a single one."""
    file = Path(path)
    return (str(file.parent), {"gguf_file": file.name}) if file.suffix == ".gguf" else (str(path), {})


def _nf4(config: ModelConfig) -> BitsAndBytesConfig:
    """Return 4-bit NormalFloat with double quantisation (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
    )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Return the tokens of a chat up to the point where the assistant speaks, by the tokenizer's chat template."""
    chat = [{"role": str(message["role"]), "content": message["content"]} for message in messages]
    ids: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    return list(ids)


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Return the tokens of a chat that ends in a response, by the tokenizer's chat template."""
    chat = [{"role": str(message["role"]), "content": message["content"]} for message in messages]
    ids: Any = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    return list(ids)


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a response as they follow a prompt: what the template puts before it, the text, EOS.

    A tokenizer that marks the start of a text (SentencePiece's ``▁``, as Mistral's does) would split the first word
    differently on its own, so it is tokenized behind the character that prompts end in.
    """
    last, lead = _response_start(tokenizer)
    before: list[int] = tokenizer(last, add_special_tokens=False)["input_ids"]
    ids: list[int] = tokenizer(last + lead + text.strip(), add_special_tokens=False, verbose=False)["input_ids"]
    if ids[: len(before)] == before:
        ids = ids[len(before) :]
    else:  # that character merged with what follows it
        ids = tokenizer(lead + text.strip(), add_special_tokens=False, verbose=False)["input_ids"]
    return [*ids, int(tokenizer.eos_token_id)]


def _response_start(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the character that prompts end in, and what the chat template writes between it and a response."""
    template = str(tokenizer.chat_template)
    if template not in _RESPONSE_STARTS:
        chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "\ufffd"}]
        prompt: Any = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
        whole: Any = tokenizer.apply_chat_template(chat, tokenize=False)
        continued = bool(prompt) and whole.startswith(prompt) and "\ufffd" in whole[len(prompt) :]
        lead = whole[len(prompt) :].partition("\ufffd")[0] if continued else " "
        _RESPONSE_STARTS[template] = (prompt[-1:] or ":", lead)
    return _RESPONSE_STARTS[template]


def first_line(error: BaseException) -> str:
    """Return what an exception says first."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def lora_config(config: ModelConfig, new_tokens: Mapping[str, Sequence[int]] | None = None) -> Any:
    """Return peft's configuration of the adapters that ``model.lora`` describes.

    Args:
        config: of the model.
        new_tokens: rows of embedding and head that are trained too (see `trlhf.embeddings`), by the layer's name.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=list(config.lora.target_modules),
        task_type="CAUSAL_LM",
        trainable_token_indices={name: list(rows) for name, rows in new_tokens.items()} if new_tokens else None,
    )
