"""One token a row through the layers of a Mistral-like model, and nothing else: no masks, no cache classes, no hooks.

transformers' own forward pass does the same with four times the Python around it, which for one token a row of a small
model is half of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel

Attend = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def hooked(model: PreTrainedModel) -> bool:
    """Say whether somebody waits for the model's or a layer's own forward pass: FSDP's sharding, accelerate's hooks."""
    causal: Any = model
    modules = (causal, causal.model, *causal.model.layers)
    return any(x._forward_pre_hooks or x._forward_hooks or hasattr(x, "_hf_hook") for x in modules)


def next_logits(
    model: PreTrainedModel, tokens: Int[Tensor, " N"], positions: Int[Tensor, " N"], attend: Attend
) -> Float[Tensor, "N V"]:
    """Return the logits behind one more token of every row.

    Args:
        model: of an architecture in `trlhf.packed_attention.SHARING`; adapters in its linear layers act.
        tokens: one a row.
        positions: of the tokens.
        attend: from a layer's attention module, queries [N Q D], keys [N H D] and values [N H D] of the tokens, with
            their positions in them, to [N Q·D]; it knows what came before.
    """
    causal: Any = model
    backbone = causal.model
    hidden = backbone.embed_tokens(tokens)
    cos, sin = (x[:, 0][:, None] for x in backbone.rotary_emb(hidden[:, None], positions[:, None]))
    half = cos.shape[-1] // 2
    sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
    for layer in backbone.layers:
        hidden = hidden + _attention(layer.self_attn, _norm(layer.input_layernorm, hidden), cos, sin, attend)
        inner, mlp = _norm(layer.post_attention_layernorm, hidden), layer.mlp
        hidden = hidden + mlp.down_proj(mlp.act_fn(mlp.gate_proj(inner)) * mlp.up_proj(inner))
    logits: Tensor = causal.lm_head(_norm(backbone.norm, hidden))
    return logits


def _attention(module: Any, hidden: Float[Tensor, "N h"], cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
    size, rows = module.head_dim, len(hidden)
    query, key, value = (
        project(hidden).view(rows, -1, size) for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    if hasattr(module, "q_norm"):  # Qwen 3
        query, key = _norm(module.q_norm, query), _norm(module.k_norm, key)
    both = torch.cat([query, key], 1)
    both = torch.addcmul(both * cos, both.roll(size // 2, -1), sin)  # (x₁, x₂) → (x₁ cos - x₂ sin, x₂ cos + x₁ sin)
    query, key = both.split([query.shape[1], key.shape[1]], 1)
    output: Tensor = module.o_proj(attend(module, query, key, value))
    return output


def _norm(module: Any, hidden: Tensor) -> Tensor:
    return rms_norm(hidden, hidden.shape[-1:], module.weight, module.variance_epsilon)
