"""What a preference can be read from: a response's mean hidden states, and its slips where the model was sure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from trlhf.distributed import gather, share
from trlhf.reward.features import Sample, collate
from trlhf.roles import Role
from trlhf.sharding import whole

BATCH = 64  # samples at once
SURPRISES = 2  # columns of `surprise`


def surprise(logits: Float[Tensor, "T V"], token_ids: Int[Tensor, " T"]) -> Float[Tensor, " 2"]:
    """Return the mean and the minimum over a response's tokens of log p(token) + H(p), in nats.

    That is by how much a token is likelier than its prediction led to expect: 0 on average over samples of the model
    itself, and far below 0 at a *slip*, an unlikely token where little was open.

    Args:
        logits: the prediction of each token.
        token_ids: the tokens, at least one.
    """
    logprobs = torch.log_softmax(logits.float(), -1)
    own = logprobs.gather(1, token_ids[:, None])[:, 0]
    beyond = own - (logprobs.exp() * logprobs).sum(-1)
    return torch.stack([beyond.mean(), beyond.min()])


@torch.no_grad()
def liking_features(role: Role, samples: Sequence[Sample], pad_id: int) -> Float[ndarray, "N F"]:
    """Return the means over each response's tokens of a middle layer and of the last, then its `surprise`.

    Measured on the embedded world (benchmarks/LOG.md): plain means tell two sound responses apart better than means at
    the forks, and without the surprise a model of preferences knows little of which responses are sound.

    Several processes that call this alike share the batches, and all have all of it.

    Args:
        role: a causal language model that does not change.
        samples: prompts with responses, EOS included.
        pad_id: token to pad with.

    Returns:
        F = 2·(hidden size) + `SURPRISES`, in float64.
    """
    own: dict[int, list[Tensor]] = {}
    with whole(role), role.acting() as model:
        for start in share(range(0, len(samples), BATCH)):
            rows = own.setdefault(start, [])
            batch = collate(samples[start : start + BATCH], pad_id, role.device)
            output = model.base_model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask.long(),
                output_hidden_states=True,
                use_cache=False,
            )
            states = torch.cat([output.hidden_states[len(output.hidden_states) // 2], output.last_hidden_state], 2)
            for n, sample in enumerate(samples[start : start + BATCH]):
                first, end = sample.prompt_length, len(sample.ids)
                logits = model.get_output_embeddings()(output.last_hidden_state[n, first - 1 : end - 1])
                mean = states[n, first:end].float().mean(0)
                rows.append(torch.cat([mean, surprise(logits, batch.input_ids[n, first:end])]).cpu())
    found = {start: rows for parts in gather(own) for start, rows in parts.items()}
    return np.asarray(torch.stack([row for start in sorted(found) for row in found[start]]).double().numpy())
