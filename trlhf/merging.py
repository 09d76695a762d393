"""What is saved of a model: every weight as plain transformers has it, with one adapter merged in."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def merged_state(model: PreTrainedModel, dtype: torch.dtype, adapter: str | None = None) -> dict[str, Tensor]:
    """Return every weight as a plain model has it, one adapter merged in, on the CPU; the model stays as it is.

    W + (α/r)·BA for adapted layers, computed in float32 and rounded once; quantised weights are dequantised first.
    Hu et al. 2021, eq. 3, https://arxiv.org/abs/2106.09685. Rows of new tokens that the adapter learned take their
    places in embedding and head.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight
    from peft.utils.other import TrainableTokensWrapper

    state: dict[str, Tensor] = {}
    inside: tuple[str, ...] = ()
    with torch.no_grad():
        for name, module in model.named_modules():
            if inside and name.startswith(inside):
                continue
            prefix = f"{name}." if name else ""
            layer: Any = module
            if isinstance(module, TrainableTokensWrapper):
                inside = (*inside, prefix)
                rows: Tensor = layer.token_adapter.get_merged_weights([adapter] if adapter is not None else [])
                state[f"{prefix}weight"] = rows.detach().to(dtype).cpu().contiguous()
                continue
            adapted = isinstance(module, LoraLayer)
            if adapted:
                inside = (*inside, prefix)
                layer = layer.get_base_layer()
            for key, value in (*layer.named_parameters(recurse=False), *_saved_buffers(layer)):
                whole = dequantize_module_weight(layer) if hasattr(value, "quant_state") else value
                if adapted and key == "weight" and adapter is not None:
                    whole = whole.float() + cast("Any", module).get_delta_weight(adapter).float()
                state[prefix + key] = whole.detach().to(dtype).cpu().contiguous()
    return state


def _saved_buffers(module: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, value


def greedy(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Return how a model is evaluated, said outright: pipelines sample where a generation config says nothing."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig(do_sample=False, **ids)


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, dtype: str, adapter: str | None = None
) -> None:
    """Save a model that plain transformers loads, with tokenizer, chat template and greedy generation config.

    Args:
        model: a causal language model; its adapters stay in memory as they are.
        tokenizer: with its chat template.
        directory: exists and is empty.
        dtype: of the saved weights.
        adapter: to merge into what is saved; None: the base alone.
    """
    kind = getattr(torch, dtype)
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.use_cache = True
    with torch.device("meta"):
        plain: Any = type(model)(config).to(kind)  # its type is what its config.json will say
    plain.generation_config = greedy(tokenizer)
    state = merged_state(model, kind, adapter)
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    plain.save_pretrained(directory, state_dict=state)
    tokenizer.save_pretrained(directory)
