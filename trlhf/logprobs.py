"""Log-probabilities of responses: padding, positions and the one-token shift happen here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from trlhf.masks import mask_from_lengths

TokenIds = Sequence[int]


@dataclass(frozen=True)
class SequenceBatch:
    """Prompts with their responses, each row ``prompt + response`` and then padding.

    Attributes:
        input_ids: [B T]; padding on the right.
        attention_mask: [B T], 1 on real tokens.
        starts: [B], where each response begins.
        response_ids: [B R], padded on the right.
        response_mask: [B R], True on the response's tokens (EOS included).
    """

    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    starts: Int[Tensor, " B"]
    response_ids: Int[Tensor, "B R"]
    response_mask: Bool[Tensor, "B R"]

    def to(self, device: torch.device | str) -> SequenceBatch:
        """Return the batch on a device."""
        return SequenceBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def response_positions(self) -> Int[Tensor, "B R"]:
        """Return for each response token the index in ``input_ids`` whose hidden state predicts it: one before it."""
        offsets = torch.arange(self.response_ids.shape[1], device=self.starts.device)
        return (self.starts[:, None] - 1 + offsets).clamp(max=self.input_ids.shape[1] - 1)


def pad_sequences(prompts: Sequence[TokenIds], responses: Sequence[TokenIds], pad_id: int) -> SequenceBatch:
    """Lay out ``prompts[i] + responses[i]`` as rows, padded on the right.

    Raises:
        ValueError: no rows, an empty prompt, or lists of different length.
    """
    if not prompts or len(prompts) != len(responses):
        raise ValueError(f"pad_sequences needs as many responses as prompts and at least one, got {len(prompts)}")
    if not all(prompts):
        raise ValueError("pad_sequences: a prompt without tokens has nothing to predict the first response token from")
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    longest = max(1, *(len(r) for r in responses)) if len(responses) > 1 else max(1, len(responses[0]))
    rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    return SequenceBatch(
        input_ids=torch.tensor([row + [pad_id] * (width - len(row)) for row in rows]),
        attention_mask=mask_from_lengths([len(row) for row in rows], width).long(),
        starts=torch.tensor([len(p) for p in prompts]),
        response_ids=torch.tensor([[*r, *([pad_id] * (longest - len(r)))] for r in responses]),
        response_mask=mask_from_lengths([len(r) for r in responses], longest),
    )


def response_hidden(backbone: PreTrainedModel, batch: SequenceBatch) -> Float[Tensor, "B R D"]:
    """Return the hidden states that predict each response token, from a model without its language-model head."""
    hidden = backbone(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).last_hidden_state
    index = batch.response_positions()[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, index)


def response_logits(model: PreTrainedModel, batch: SequenceBatch) -> Float[Tensor, "B R V"]:
    """Return the logits of each response position; none are computed for the prompt or the padding beyond it."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal.lm_head(response_hidden(causal.model, batch))


def token_logprobs(
    logits: Float[Tensor, "B R V"], tokens: Int[Tensor, "B R"], temperature: float = 1.0
) -> Float[Tensor, "B R"]:
    """Return log softmax(logits / temperature) at the tokens, in nats, computed in float32."""
    scaled = logits.float() / temperature
    return scaled.gather(-1, tokens[..., None]).squeeze(-1) - scaled.logsumexp(-1)


def response_logprobs(
    model: PreTrainedModel, batch: SequenceBatch, temperature: float = 1.0
) -> Float[Tensor, "B R"]:
    """Return the log-probability of every response token, in nats; positions outside the mask are meaningless."""
    return token_logprobs(response_logits(model, batch), batch.response_ids, temperature)
