"""One token a row at a time: the keys and values of a prompt are held once for all its samples.

Two ways, with the same results: `SharedDecoder` for the architectures it knows, `PlainDecoder` for all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from trlhf.packed_attention import attention, plain_attention
from trlhf.shared_prompts import SharedPrompts, shared_prompt_attention

ATTENTION = "trlhf_shared_prompts"
FIRST_CAPACITY = 64  # response tokens that room is made for at first; doubled when they are used up
LEAVE_AT = 8  # rows that are done leave when they are one in so many: leaving copies what the others have cached


AttentionInterface.register(ATTENTION, shared_prompt_attention)


class Decoder(Protocol):
    """Rows that each wait for their next token; samples of a prompt stand side by side."""

    logits: Float[Tensor, "N V"]

    def step(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "N V"]:
        """Append a token to every row and return the logits of the next ones."""
        ...

    def keep(self, rows: Int[Tensor, " N"]) -> None:
        """Go on with these rows alone."""
        ...


def start_decoding(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], samples: int, pad_id: int, limit: int
) -> Decoder:
    """Read the prompts, each once, and return what draws ``samples`` responses from each; ``logits`` are the first.

    Args:
        model: in evaluation mode, under `torch.no_grad`.
        prompts: of like length: they are padded to the longest.
        samples: rows of each prompt.
        pad_id: token to pad with.
        limit: tokens of a response.
    """
    shares = plain_attention(model, max(map(len, prompts)) + limit)
    kind = SharedDecoder if shares else PlainDecoder
    return kind(model, prompts, samples, pad_id)


class PlainDecoder:
    """Any causal model, through its own cache: every row holds its prompt's keys and values."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], samples: int, pad_id: int) -> None:
        self._model: Any = model
        self._cache = DynamicCache(config=model.config)
        mask, logits = _read(model, prompts, pad_id, self._cache)
        if samples > 1:
            self._cache.batch_repeat_interleave(samples)
        self.logits = logits.repeat_interleave(samples, 0)
        self._mask = mask.repeat_interleave(samples, 0)
        self._positions = self._mask.sum(1)

    def step(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "N V"]:
        """Append a token to every row and return the logits of the next ones."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        output = self._model(
            input_ids=tokens[:, None],
            attention_mask=self._mask,
            position_ids=self._positions[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        self._positions = self._positions + 1
        logits: Tensor = output.logits[:, -1]
        return logits

    def keep(self, rows: Int[Tensor, " N"]) -> None:
        """Go on with these rows alone."""
        self._cache.batch_select_indices(rows)
        self._mask, self._positions = self._mask[rows], self._positions[rows]


class SharedDecoder:
    """Keys and values of prompts once, those of responses row by row; attention looks at both.

    Rows that are done go on for a while without being looked at (`LEAVE_AT`).
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], samples: int, pad_id: int) -> None:
        self._model: Any = model
        cache = DynamicCache()  # whole, without windows: nothing reaches beyond one here
        mask, logits = _read(model, prompts, pad_id, cache)
        found: list[Any] = cache.layers
        held = [(layer.keys, layer.values) for layer in found]
        self.logits = logits.repeat_interleave(samples, 0)
        self._layers = [ResponseLayer() for _ in held]
        self._cache = Cache(layers=list(self._layers))
        prompt_of = torch.arange(len(prompts), device=model.device).repeat_interleave(samples)
        self._shared = SharedPrompts(held, mask, prompt_of)
        self._positions = mask.sum(1)[prompt_of]
        self._tokens = torch.zeros_like(prompt_of)  # of every row that is held; the others' do not matter
        self._going = torch.arange(len(prompt_of), device=model.device)  # rows that are looked at

    def step(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "N V"]:
        """Append a token to every row and return the logits of the next ones."""
        whole = len(self._going) == len(self._tokens)
        if not whole:
            self._tokens[self._going] = tokens
        with attention(self._model, ATTENTION):
            output = self._model(
                input_ids=(tokens if whole else self._tokens)[:, None],
                position_ids=self._positions[:, None],
                past_key_values=self._cache,
                use_cache=True,
                shared_prompts=self._shared,
            )
        self._positions = self._positions + 1
        logits: Tensor = output.logits[:, -1]
        return logits if whole else logits[self._going]

    def keep(self, rows: Int[Tensor, " N"]) -> None:
        """Go on with these rows alone."""
        self._going = self._going[rows]
        held = len(self._tokens)
        if (held - len(self._going)) * LEAVE_AT < held:
            return
        for layer in self._layers:
            layer.select(self._going)
        self._tokens, self._positions = self._tokens[self._going], self._positions[self._going]
        self._shared = self._shared.select(self._going)
        self._going = torch.arange(len(self._going), device=self._going.device)


def _read(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int, cache: Cache
) -> tuple[Int[Tensor, "P W"], Float[Tensor, "P V"]]:
    """Fill the cache with prompts, padded on the left; return which positions are real, and the logits behind them."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(tokens)) + list(tokens) for tokens in prompts], device=model.device)
    lengths = torch.tensor([len(tokens) for tokens in prompts], device=model.device)
    mask = (torch.arange(width, device=model.device)[None] >= width - lengths[:, None]).long()
    causal: Any = model
    output = causal(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return mask, output.logits[:, -1]


class ResponseLayer(CacheLayerMixin):
    """One layer's keys and values of what was decoded so far, in room that grows by doubling: nothing is moved a step.

    The prompts' are elsewhere (`SharedPrompts`).
    """

    is_sliding = False
    keys: Any  # [N H capacity D] once there are any
    values: Any

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for the first tokens."""
        rows, heads, _, size = key_states.shape
        self.keys = key_states.new_empty(rows, heads, FIRST_CAPACITY, size)
        self.values = value_states.new_empty(rows, heads, FIRST_CAPACITY, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take up one token's keys and values; return those of all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._length == self.keys.shape[2]:
            self.keys = torch.cat([self.keys, torch.empty_like(self.keys)], 2)
            self.values = torch.cat([self.values, torch.empty_like(self.values)], 2)
        place = slice(self._length, self._length + 1)
        self.keys[:, :, place], self.values[:, :, place] = key_states, value_states
        self._length += 1
        return self.keys[:, :, : self._length], self.values[:, :, : self._length]

    def select(self, rows: Int[Tensor, " N"]) -> None:
        """Go on with these rows alone."""
        if not self.is_initialized:  # rows that end with their first token leave before anything is held
            return
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = old.new_empty(len(rows), *old.shape[1:])
            new[:, :, : self._length] = old[:, :, : self._length].index_select(0, rows)
            setattr(self, name, new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys a query sees, and where they begin."""
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        """Return how many tokens are held."""
        return self._length

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1
