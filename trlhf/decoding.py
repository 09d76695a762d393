"""One token a row at a time: the keys and values of a prompt are held once for all its samples.

Two ways, with the same results: `SharedDecoder` for the architectures it knows, `PlainDecoder` for all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from trlhf.logprobs import pad_sequences
from trlhf.packed_attention import ATTENTION as PACKED
from trlhf.packed_attention import attention, pack, plain_attention, rows_of
from trlhf.shared_prompts import SharedPrompts, Written, shared_prompt_attention
from trlhf.token_step import hooked, next_logits

LEAVE_AT = 8  # rows that are done leave when they are one in so many: leaving copies what the others have cached


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
    shares = plain_attention(model, max(map(len, prompts)) + limit) and not hooked(model)
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
        mask, logits, held = _read_packed(model, prompts, pad_id)
        self.logits = logits.repeat_interleave(samples, 0)
        self._layers = [Written() for _ in held]
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
        logits = next_logits(self._model, tokens if whole else self._tokens, self._positions, self._attend)
        self._positions = self._positions + 1
        return logits if whole else logits[self._going]

    def _attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        number = module.layer_idx
        keys, values = self._layers[number].append(key, value)
        return shared_prompt_attention(self._shared, number, query * module.scaling, keys, values)

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


def _read_packed(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int
) -> tuple[Int[Tensor, "P W"], Float[Tensor, "P V"], list[tuple[Tensor, Tensor]]]:
    """Read prompts without padding, what all of them begin with once.

    Returns:
        Which positions are real, padded on the right; the logits behind the prompts; keys and values of every layer,
        [P H W D].
    """
    batch = pad_sequences(prompts, [[pad_id]] * len(prompts), pad_id, share_prompts=False)  # one token: it is not read
    packed = pack(batch.to(model.device))
    cache, causal = DynamicCache(), cast("Any", model)  # whole, without windows: nothing reaches beyond one here
    with attention(model, PACKED):
        output = causal(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            past_key_values=cache,
            use_cache=True,
            packed=packed,
            logits_to_keep=packed.sources[:, 0],
        )
    found: list[Any] = cache.layers
    held = []
    for layer in found:
        keys, values = (rows_of(x[0].transpose(0, 1), packed.prompts).contiguous() for x in (layer.keys, layer.values))
        held.append((keys, values))
        layer.keys = layer.values = None  # a layer at a time: both ways of laying them out are never held of all
    lengths = torch.tensor([len(tokens) for tokens in prompts], device=model.device)
    mask = (torch.arange(int(lengths.max()), device=model.device) < lengths[:, None]).long()
    logits: Tensor = output.logits[0]
    return mask, logits, held
