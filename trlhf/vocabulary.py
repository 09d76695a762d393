"""The language-model head on a few positions at a time: logits of all positions are never held at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_AT_ONCE = 2**24  # numbers: 64 MiB in float32, of which a backward pass holds about four


def over_vocabulary(
    model: PreTrainedModel, hidden: Float[Tensor, "K D"], compute: Callable[[Float[Tensor, "k V"], slice], Tensor]
) -> list[Tensor]:
    """Apply a function to the logits of consecutive positions, `LOGITS_AT_ONCE` numbers at most.

    Where that takes more than one part and gradients are wanted, a part's logits are computed once more in the backward
    pass, so that the function must give the same then. One part costs nothing extra.

    Args:
        model: with the head.
        hidden: of the last layer, after its norm.
        compute: from a part's logits and its place among the positions.

    Returns:
        What the function gave for each part.
    """
    head: Any = model.get_output_embeddings()
    size = max(1, LOGITS_AT_ONCE // int(model.config.get_text_config().vocab_size))
    if len(hidden) <= size:
        return [compute(head(hidden), slice(0, len(hidden)))]

    def one(states: Tensor, place: slice) -> Tensor:
        return compute(head(states), place)

    found = []
    for start in range(0, len(hidden), size):
        place = slice(start, min(start + size, len(hidden)))
        if torch.is_grad_enabled():
            part = checkpoint(one, hidden[place], place, use_reentrant=False, preserve_rng_state=False)
        else:
            part = one(hidden[place], place)
        found.append(part)
    return found


def spread(values: Float[Tensor, " K"], mask: Bool[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Put values where the mask is True, row by row, and 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
