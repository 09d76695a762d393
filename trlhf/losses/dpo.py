"""Direct preference optimisation, with the length-normalised likelihood of the chosen response."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    reference_chosen_logprobs: Float[Tensor, " B"],
    reference_rejected_logprobs: Float[Tensor, " B"],
    denominator: float,
    beta: float = 0.1,
    weights: Float[Tensor, " B"] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """Compute -Σ w·log σ(β·[(log π(y_w) - log π_ref(y_w)) - (log π(y_l) - log π_ref(y_l))]) / denominator.

    Rafailov et al. 2023, eq. 7, https://arxiv.org/abs/2305.18290. At policy = reference it is log 2 a pair.

    Args:
        chosen_logprobs: log-probability of the whole chosen response, in nats; likewise the other three.
        rejected_logprobs: of the rejected response under the policy.
        reference_chosen_logprobs: of the chosen response under the reference, detached.
        reference_rejected_logprobs: of the rejected response under the reference, detached.
        denominator: number of pairs of the whole optimizer step.
        beta: inverse temperature of the implicit reward, > 0.
        weights: w of each pair, the trust in its order; None: 1.

    Returns:
        The loss and sums over pairs: ``chosen_reward``, ``rejected_reward`` (implicit, nats times β), ``correct``.
    """
    chosen = beta * (chosen_logprobs - reference_chosen_logprobs)
    rejected = beta * (rejected_logprobs - reference_rejected_logprobs)
    with torch.no_grad():
        metrics = {
            "chosen_reward": float(chosen.sum()),
            "rejected_reward": float(rejected.sum()),
            "correct": float((chosen > rejected).float().sum()),
        }
    losses = -logsigmoid(chosen - rejected)
    return (losses if weights is None else losses * weights).sum() / denominator, metrics


def chosen_nll(
    chosen_logprobs: Float[Tensor, " B"], chosen_lengths: Float[Tensor, " B"], denominator: float
) -> Float[Tensor, ""]:
    """Compute -Σ log π(y_w)/|y_w| / denominator: keeps the chosen from losing probability together with the rejected.

    Pang et al. 2024, eq. 1 (second term), https://arxiv.org/abs/2404.19733.
    """
    return -(chosen_logprobs / chosen_lengths.clamp(min=1)).sum() / denominator
