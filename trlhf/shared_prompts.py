"""Attention of single tokens over a prompt that several rows share, and over each row's own response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Layer = tuple[Tensor, Tensor]  # keys and values of the prompts, [P H W D]


class SharedPrompts:
    """Keys and values of P prompts, and where each row's query goes beside those of its prompt's other rows.

    Args:
        layers: keys and values of every layer, [P H W D]: H heads, W positions.
        mask: [P W], 1 on real tokens.
        prompt_of: [N], the prompt of each row; rows of a prompt need not stand side by side.
    """

    def __init__(self, layers: Sequence[Layer], mask: Int[Tensor, "P W"], prompt_of: Int[Tensor, " N"]) -> None:
        self.layers, self._mask, self._prompt_of = layers, mask, prompt_of
        counts = torch.bincount(prompt_of, minlength=len(mask))
        self.prompts, self.slots = len(mask), int(counts.max())
        order = torch.argsort(prompt_of, stable=True)
        first = counts.cumsum(0) - counts
        place = torch.empty_like(prompt_of)
        place[order] = torch.arange(len(prompt_of), device=mask.device) - first[prompt_of[order]]
        self._slot = prompt_of * self.slots + place
        regular = torch.arange(len(prompt_of), device=mask.device)
        self._regular = len(prompt_of) == self.prompts * self.slots and bool((self._slot == regular).all())
        lowest = torch.finfo(layers[0][0].dtype).min
        bias = torch.zeros(mask.shape, dtype=layers[0][0].dtype, device=mask.device).masked_fill(mask == 0, lowest)
        self.bias = None if bool(mask.all()) else bias[:, None, None]

    def select(self, rows: Int[Tensor, " N"]) -> SharedPrompts:
        """Return the same for some rows; prompts that none of them needs are let go."""
        prompts, prompt_of = torch.unique(self._prompt_of[rows], return_inverse=True)
        if len(prompts) == self.prompts:
            return SharedPrompts(self.layers, self._mask, prompt_of)
        layers = [(keys[prompts], values[prompts]) for keys, values in self.layers]
        return SharedPrompts(layers, self._mask[prompts], prompt_of)

    def gather(self, rows: Float[Tensor, "N H K D"]) -> Float[Tensor, "P H GK D"]:
        """Lay out what belongs to rows by prompt."""
        _, heads, each, size = rows.shape
        if not self._regular:
            laid = rows.new_zeros(self.prompts * self.slots, heads, each, size)
            laid[self._slot] = rows
            rows = laid
        rows = rows.view(self.prompts, self.slots, heads, each, size).transpose(1, 2)
        return rows.reshape(self.prompts, heads, self.slots * each, size)

    def scatter(self, laid: Float[Tensor, "P H GK D"]) -> Float[Tensor, "N H K D"]:
        """Undo `gather`."""
        prompts, heads, together, size = laid.shape
        each = together // self.slots
        rows = laid.view(prompts, heads, self.slots, each, size).transpose(1, 2)
        rows = rows.reshape(prompts * self.slots, heads, each, size)
        return rows if self._regular else rows[self._slot]


def shared_prompt_attention(
    module: nn.Module,
    query: Float[Tensor, "N Q 1 D"],
    key: Float[Tensor, "N H R D"],
    value: Float[Tensor, "N H R D"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    shared_prompts: SharedPrompts | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "N 1 Q D"], None]:
    """Return softmax([q·Kᵖ, q·Kʳ]·scaling)·[Vᵖ, Vʳ], the prompt's part in one product for all rows of a prompt.

    Called by transformers in place of its own attention (an "attention interface"); heads of queries that share a head
    of keys stand side by side.

    Args:
        module: the layer's attention; its ``layer_idx`` says which keys of the prompts.
        query: of one token a row.
        key: of the responses so far, this token included.
        value: likewise.
        attention_mask: none is made for this attention.
        scaling: of the scores.
        shared_prompts: handed through by the model.
    """
    assert shared_prompts is not None and attention_mask is None
    layer: Any = module
    keys, values = shared_prompts.layers[layer.layer_idx]
    rows, heads, size, width = len(query), keys.shape[1], query.shape[-1], keys.shape[2]
    query = (query * (size**-0.5 if scaling is None else scaling)).view(rows, heads, -1, size)
    on_prompt = torch.matmul(shared_prompts.gather(query), keys.transpose(2, 3))
    if shared_prompts.bias is not None:
        on_prompt = on_prompt + shared_prompts.bias
    scores = torch.cat([shared_prompts.scatter(on_prompt), torch.matmul(query, key.transpose(2, 3))], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    from_prompt = torch.matmul(shared_prompts.gather(weights[..., :width]), values)
    found = shared_prompts.scatter(from_prompt) + torch.matmul(weights[..., width:], value)
    return found.reshape(rows, 1, -1, values.shape[-1]), None
