"""Responses behind the prompts they share, without padding: every token goes through the model's layers once.

What all prompts begin with, a template's first lines say, goes through them once too. Only attention needs rows. It is
computed in parts: that beginning over itself, the rest of each prompt over its prompt, responses over their prompt and
themselves; a mask over whole rows (`trlhf.logprobs.SequenceBatch.attention_mask`) would cost the square of the row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trlhf.logprobs import SequenceBatch

SHARING = ("llama", "mistral", "qwen2", "qwen3")  # architectures whose layers hand keyword arguments to the attention
ATTENTION = "trlhf_packed"
LEAST_COMMON = 8  # tokens that all prompts must begin with to be worth a part of their own


def plain_attention(model: PreTrainedModel, length: int) -> bool:
    """Whether an attention of ours can take the place of the model's: causal, over all of ``length`` tokens."""
    config: Any = model.config
    window = getattr(config, "sliding_window", None)
    within = window is None or window >= length
    return config.model_type in SHARING and config._attn_implementation in ("sdpa", "eager") and within


@dataclass(frozen=True)
class Packed:
    """The tokens of U prompts and B responses that predict a response token, K in all, one after another.

    Attributes:
        input_ids: [1 K].
        position_ids: [1 K].
        sources: [B R], index of the token that predicts each response token.
        common: how many tokens all prompts begin with, which are there once; 0: none worth it.
        prompts: [U P], indices of the prompts' tokens, the common ones included, 0 behind their ends.
        responses: [B S], indices of the responses' tokens, without the last of each, 0 behind their ends; S = R - 1.
        prompt_of: [B], which of the prompts a response follows.
        restore: [K], where each token is among the common ones, then the rows of what follows in the prompts, then the
            rows of responses.
        visible: [B 1 S P+S], what each response token may attend to: its prompt, its own response up to itself.
    """

    input_ids: Int[Tensor, "1 K"]
    position_ids: Int[Tensor, "1 K"]
    sources: Int[Tensor, "B R"]
    common: int
    prompts: Int[Tensor, "U P"]
    responses: Int[Tensor, "B S"]
    prompt_of: Int[Tensor, " B"]
    restore: Int[Tensor, " K"]
    visible: Tensor


def pack(batch: SequenceBatch) -> Packed:
    """Take the padding out of a batch, and what no response token needs: the last token of each response."""
    ids, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    last, prompt_of = torch.unique(batch.sources[:, 0], return_inverse=True)  # of each prompt, in the batch's rows
    lengths = positions[last] + 1
    steps = torch.arange(int(lengths.max()), device=ids.device)
    in_prompt = steps < lengths[:, None]
    prompt_places = (last - lengths + 1)[:, None] + steps
    in_response, response_places = batch.response_mask[:, 1:], batch.sources[:, 1:]
    common = _common(ids[prompt_places], lengths)
    held = in_prompt.clone()  # of the common tokens those of the first prompt alone
    held[1:, :common] = False
    places = torch.cat([prompt_places[held], response_places[in_response]])
    prompts, responses = torch.zeros_like(prompt_places), torch.zeros_like(response_places)
    count = int(held.sum())
    prompts[held] = torch.arange(count, device=ids.device)
    prompts[1:, :common] = prompts[:1, :common]
    responses[in_response] = torch.arange(count, len(places), device=ids.device)
    own = torch.arange(responses.shape[1], device=ids.device)
    causal = (own <= own[:, None]).expand(len(responses), -1, -1)
    on_prompt = in_prompt[prompt_of][:, None].expand(-1, len(own), -1)
    behind = prompts.gather(1, lengths[:, None] - 1)[prompt_of]
    rows, rest = torch.arange(len(prompts), device=ids.device), len(steps) - common
    laid = steps + rows[:, None] * rest  # of the first prompt's common tokens too: they stand before all rows
    return Packed(
        ids[places][None],
        positions[places][None],
        torch.cat([behind, responses], 1),
        common,
        prompts,
        responses,
        prompt_of,
        torch.cat([laid[held], common + len(prompts) * rest + in_response.flatten().nonzero().squeeze(1)]),
        torch.cat([on_prompt, causal], 2)[:, None],
    )


def _common(prompts: Int[Tensor, "U P"], lengths: Int[Tensor, " U"]) -> int:
    """Return how many tokens all of several prompts begin with; each keeps at least its last one to itself."""
    if len(prompts) == 1:
        return 0
    shortest = int(lengths.min())
    alike = (prompts[:, : shortest - 1] == prompts[:1, : shortest - 1]).all(0)
    found = int(alike.long().cumprod(0).sum())
    return found if found >= LEAST_COMMON else 0


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 Q K D"],
    key: Float[Tensor, "1 H K D"],
    value: Float[Tensor, "1 H K D"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed: Packed | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "1 K Q D"], None]:
    """Return the attention of packed tokens; called by transformers in place of its own (an "attention interface").

    Args:
        module: the layer's attention.
        query: of all tokens.
        key: likewise; fewer heads, each of which serves Q / H neighbouring ones of the queries.
        value: likewise.
        attention_mask: none is made for this attention.
        scaling: of the scores.
        dropout: of the weights.
        packed: which token is where; handed through by the model.
    """
    assert packed is not None and attention_mask is None
    options: dict[str, Any] = {"scale": scaling, "dropout_p": dropout}
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    each = queries.shape[1] // keys.shape[1]
    prompt_keys, prompt_values = rows_of(keys, packed.prompts), rows_of(values, packed.prompts)
    on_keys, on_values = _repeat(prompt_keys, each), _repeat(prompt_values, each)
    common, parts, later = packed.common, [], packed.prompts[:, packed.common :]
    if common:
        asking, seen = rows_of(queries, packed.prompts[:1, :common]), (slice(1), slice(None), slice(common))
        found = scaled_dot_product_attention(asking, on_keys[seen], on_values[seen], is_causal=True, **options)
        parts.append(found.transpose(1, 2).flatten(0, 1))
    mask = _behind(packed, query.dtype) if common else None
    asking = rows_of(queries, later)
    found = scaled_dot_product_attention(asking, on_keys, on_values, attn_mask=mask, is_causal=not common, **options)
    parts.append(found.transpose(1, 2).flatten(0, 1))
    if packed.responses.shape[1]:
        both = (
            torch.cat([prompt.index_select(0, packed.prompt_of), rows_of(own, packed.responses)], 2)
            for prompt, own in ((prompt_keys, keys), (prompt_values, values))
        )
        on_keys, on_values = (_repeat(x, each) for x in both)
        asking, mask = rows_of(queries, packed.responses), _bias(packed, query.dtype)
        found = scaled_dot_product_attention(asking, on_keys, on_values, attn_mask=mask, **options)
        parts.append(found.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts).index_select(0, packed.restore)[None], None


def rows_of(states: Float[Tensor, "K H D"], places: Int[Tensor, "N S"]) -> Float[Tensor, "N H S D"]:
    """Lay out packed tokens in rows."""
    return states.index_select(0, places.flatten()).view(*places.shape, *states.shape[1:]).transpose(1, 2)


def _repeat(states: Float[Tensor, "N H S D"], each: int) -> Float[Tensor, "N Q S D"]:
    """Repeat every head for the queries that it serves."""
    if each == 1:
        return states
    rows, heads, steps, size = states.shape
    return states[:, :, None].expand(rows, heads, each, steps, size).reshape(rows, heads * each, steps, size)


def _behind(packed: Packed, dtype: torch.dtype) -> Tensor:
    """Return the bias of what follows the common tokens: all of these, and each token up to itself."""
    width = packed.prompts.shape[1]
    lowest = torch.full((width - packed.common, width), torch.finfo(dtype).min, dtype=dtype)
    return lowest.triu(packed.common + 1).to(packed.prompts.device)


def _bias(packed: Packed, dtype: torch.dtype) -> Tensor:
    return torch.zeros(packed.visible.shape, dtype=dtype, device=packed.visible.device).masked_fill(
        ~packed.visible, torch.finfo(dtype).min
    )


AttentionInterface.register(ATTENTION, packed_attention)


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let a model attend by another attention interface while the block runs."""
    config: Any = model.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
