"""Attention of single tokens over a prompt that several rows share, and over each row's own response."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

FIRST_CAPACITY = 64  # response tokens that room is made for at first; doubled when they are used up
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


class Written:
    """One layer's keys and values of what was decoded so far, in room that is doubled when it is full."""

    def __init__(self) -> None:
        self._length = 0
        self._held: Layer | None = None  # each [N H capacity D]

    def append(self, key: Float[Tensor, "N H D"], value: Float[Tensor, "N H D"]) -> tuple[Tensor, Tensor]:
        """Take up one token a row; return keys and values of all so far, [N H R D]."""
        if self._held is None:
            room = (*key.shape[:2], FIRST_CAPACITY, key.shape[2])
            self._held = key.new_empty(room), value.new_empty(room)
        elif self._length == self._held[0].shape[2]:
            keys, values = (torch.cat([x, torch.empty_like(x)], 2) for x in self._held)
            self._held = keys, values
        keys, values = self._held
        keys[:, :, self._length], values[:, :, self._length] = key, value
        self._length += 1
        return keys[:, :, : self._length], values[:, :, : self._length]

    def select(self, rows: Int[Tensor, " N"]) -> None:
        """Go on with these rows alone."""
        if self._held is None:  # rows that end with their first token leave before anything is held
            return
        left = []
        for old in self._held:
            new = old.new_empty(len(rows), *old.shape[1:])
            new[:, :, : self._length] = old[:, :, : self._length].index_select(0, rows)
            left.append(new)
        self._held = left[0], left[1]


def shared_prompt_attention(
    prompts: SharedPrompts,
    layer: int,
    query: Float[Tensor, "N Q D"],
    keys: Float[Tensor, "N H R D"],
    values: Float[Tensor, "N H R D"],
) -> Float[Tensor, "N QD"]:
    """Return softmax([q·Kᵖ, q·Kʳ])·[Vᵖ, Vʳ], the prompt's part in one product for all rows of a prompt.

    Args:
        prompts: their keys and values.
        layer: of which.
        query: of one token a row, scaled; heads that share a head of keys stand side by side.
        keys: of the responses so far, this token included.
        values: likewise.
    """
    on_keys, on_values = prompts.layers[layer]
    rows, heads, size, width = len(query), keys.shape[1], query.shape[-1], on_keys.shape[2]
    query = query.view(rows, heads, -1, size)
    on_prompt = torch.matmul(prompts.gather(query), on_keys.transpose(2, 3))
    if prompts.bias is not None:
        on_prompt = on_prompt + prompts.bias
    scores = torch.cat([prompts.scatter(on_prompt), torch.matmul(query, keys.transpose(2, 3))], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    from_prompt = torch.matmul(prompts.gather(weights[..., :width]), on_values)
    found = prompts.scatter(from_prompt) + torch.matmul(weights[..., width:], values)
    return found.reshape(rows, -1)
