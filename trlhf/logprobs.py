"""Log-probabilities of responses: padding, positions and the one-token shift happen here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trlhf.masks import mask_from_lengths
from trlhf.packed_attention import ATTENTION, attention, pack, plain_attention
from trlhf.recompute import recomputes, recomputing
from trlhf.vocabulary import over_vocabulary, spread

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TokenIds = Sequence[int]
ROW_TOKENS = 512  # responses to one prompt share a row up to this length: beyond it attention costs more than is saved


@dataclass(frozen=True)
class SequenceBatch:
    """Responses with their prompts, ready for one forward pass. Responses to one prompt may share a row:
    ``prompt, response, response, …, padding``, each response blind to its neighbours, its positions going on from the
    prompt's. The prompt is then computed once.

    Attributes:
        input_ids: [N T], N rows.
        position_ids: [N T].
        attention_mask: [N T], 1 on real tokens, where every row holds one response; else [N 1 T T], True = may attend.
        sources: [B R], index into the N·T positions of the one that predicts each response token: the token before it.
        response_ids: [B R], padded on the right.
        response_mask: [B R], True on the response's tokens (EOS included).
    """

    input_ids: Int[Tensor, "N T"]
    position_ids: Int[Tensor, "N T"]
    attention_mask: Tensor
    sources: Int[Tensor, "B R"]
    response_ids: Int[Tensor, "B R"]
    response_mask: Bool[Tensor, "B R"]

    def to(self, device: torch.device | str) -> SequenceBatch:
        """Return the batch on a device."""
        return SequenceBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def pad_sequences(
    prompts: Sequence[TokenIds], responses: Sequence[TokenIds], pad_id: int, share_prompts: bool = True
) -> SequenceBatch:
    """Lay out responses behind their prompts, padded on the right.

    Args:
        prompts: one a response.
        responses: token lists.
        pad_id: fills up.
        share_prompts: let *consecutive* responses to equal prompts share a row; needs attention that takes a mask of
            its own (sdpa, eager), see `can_share_prompts`.

    Raises:
        ValueError: no responses, an empty prompt, or lists of different length.
    """
    if not prompts or len(prompts) != len(responses):
        raise ValueError(f"pad_sequences: expected one prompt a response, got {len(prompts)} and {len(responses)}")
    if not all(prompts):
        raise ValueError("pad_sequences: a prompt without tokens has nothing to predict the first response token from")
    rows: list[list[int]] = []
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        fits = share_prompts and rows and list(prompts[rows[-1][0]]) == list(prompt)
        if fits and len(prompt) + sum(len(responses[j]) for j in rows[-1]) + len(response) <= ROW_TOKENS:
            rows[-1].append(i)
        else:
            rows.append([i])
    lengths = [len(prompts[row[0]]) + sum(len(responses[i]) for i in row) for row in rows]
    width, longest = max(lengths), max(1, *(len(response) for response in responses), 1)
    ids = torch.full((len(rows), width), pad_id)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    segments = torch.full((len(rows), width), -1)
    sources = torch.zeros(len(prompts), longest, dtype=torch.long)
    response_ids = torch.full((len(prompts), longest), pad_id)
    for n, row in enumerate(rows):
        prompt = prompts[row[0]]
        end = len(prompt)
        ids[n, :end], positions[n, :end], segments[n, :end] = torch.tensor(list(prompt)), torch.arange(end), 0
        for number, i in enumerate(row, 1):
            tokens = torch.tensor(list(responses[i]), dtype=torch.long)
            start, end = end, end + len(tokens)
            ids[n, start:end], segments[n, start:end] = tokens, number
            positions[n, start:end] = len(prompt) + torch.arange(len(tokens))
            response_ids[i, : len(tokens)] = tokens
            before = torch.arange(start - 1, end - 1)
            before[:1] = len(prompt) - 1  # the first token of every response is predicted by the prompt's last
            sources[i, : len(tokens)] = n * width + before
    alone = len(rows) == len(prompts)
    mask = mask_from_lengths(lengths, width).long() if alone else _segment_mask(segments)
    response_mask = mask_from_lengths([len(response) for response in responses], longest)
    return SequenceBatch(ids, positions, mask, sources, response_ids, response_mask)


def _segment_mask(segments: Int[Tensor, "N T"]) -> Bool[Tensor, "N 1 T T"]:
    """Return who may attend to whom: earlier positions of the prompt (segment 0) and of one's own segment; oneself."""
    width = segments.shape[1]
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    return (((key == 0) | (key == query)) & causal)[:, None]


def can_share_prompts(model: PreTrainedModel) -> bool:
    """Whether a model's attention takes a mask of our own."""
    return model.config._attn_implementation in ("sdpa", "eager")


def response_hidden(backbone: nn.Module, batch: SequenceBatch) -> Float[Tensor, "B R D"]:
    """Return the hidden states that predict each response token, from a model without its language-model head.

    No padding goes through the layers of an architecture that `packed_attention` knows, unless activations are to be
    recomputed: by the time of the backward pass the model has its own attention again.
    """
    model: Any = backbone
    mask = batch.attention_mask
    one_a_row = len(batch.input_ids) == len(batch.sources)
    packs = (mask.dim() == 4 or one_a_row) and not recomputes(model)
    if packs and plain_attention(model, batch.input_ids.shape[1]):
        packed = pack(batch)
        with attention(model, ATTENTION):
            hidden: Tensor = model(
                input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, packed=packed
            ).last_hidden_state
        return hidden[0][packed.sources]
    if mask.dim() == 4:  # additive, as every attention implementation that takes it understands
        lowest = torch.finfo(model.dtype).min
        mask = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(~mask, lowest)
    with recomputing(model):
        hidden = model(
            input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state
    return hidden.flatten(0, 1)[batch.sources]


def token_logprobs(
    logits: Float[Tensor, "B R V"], tokens: Int[Tensor, "B R"], temperature: float = 1.0
) -> Float[Tensor, "B R"]:
    """Return log softmax(logits / temperature) at the tokens, in nats, computed in float32."""
    scaled = logits.float() / temperature
    return scaled.gather(-1, tokens[..., None]).squeeze(-1) - scaled.logsumexp(-1)


def response_logprobs(model: PreTrainedModel, batch: SequenceBatch, temperature: float = 1.0) -> Float[Tensor, "B R"]:
    """Return the log-probability of every response token, in nats; 0 outside the mask."""
    mask = batch.response_mask
    tokens = batch.response_ids[mask]
    found = over_vocabulary(
        model,
        response_hidden(model.base_model, batch)[mask],
        lambda logits, place: token_logprobs(logits[None], tokens[None, place], temperature)[0],
    )
    return spread(torch.cat(found), mask)


@torch.no_grad()
def measured_logprobs(
    model: PreTrainedModel, batch: SequenceBatch, temperature: float = 1.0
) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B R"]]:
    """Return the log-probability of every response token and the entropy at its place, in nats, without gradients."""
    mask = batch.response_mask
    tokens = batch.response_ids[mask]

    def both(logits: Tensor, place: slice) -> Tensor:
        logprobs = token_logprobs(logits[None], tokens[None, place], temperature)[0]
        return torch.stack([logprobs, token_entropy(logits[None], temperature)[0]])

    logprobs, entropy = torch.cat(over_vocabulary(model, response_hidden(model.base_model, batch)[mask], both), 1)
    return spread(logprobs, mask), spread(entropy, mask)


def token_entropy(logits: Float[Tensor, "B R V"], temperature: float = 1.0) -> Float[Tensor, "B R"]:
    """Return the entropy of softmax(logits / temperature) at each position, -Σ p log p, in nats, in float32."""
    logprobs = torch.log_softmax(logits.float() / temperature, -1)
    return -(logprobs.exp() * logprobs).sum(-1)
