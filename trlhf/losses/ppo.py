"""PPO's losses: clipped policy objective, clipped value loss, and the KL to the reference."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trlhf.masks import masked_sum

LOG_RATIO_LIMIT = 20.0  # exp(20) is still finite in float32 and far beyond any clip
Metrics = dict[str, float]


def ppo_loss(
    logprobs: Float[Tensor, "B R"],
    old_logprobs: Float[Tensor, "B R"],
    advantages: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    denominator: float,
    clip_range: float = 0.2,
    dual_clip: float = 3.0,
) -> tuple[Float[Tensor, ""], Metrics]:
    """Compute the clipped surrogate, to be minimised.

    L = -Σ min(ρA, clip(ρ, 1-ε, 1+ε)A) / denominator, and for A < 0 no less than c·A (dual clip).
    Schulman et al. 2017, eq. 7, https://arxiv.org/abs/1707.06347; Ye et al. 2020, eq. 5, https://arxiv.org/abs/1912.09729.

    Args:
        logprobs: of the response tokens under the policy, in nats, at the sampling temperature.
        old_logprobs: the same, detached, before the first update on this batch.
        advantages: detached.
        mask: True on response tokens.
        denominator: number of response tokens of the *whole* optimizer step, over all microbatches and ranks.
        clip_range: ε.
        dual_clip: c > 1.

    Returns:
        The loss (a sum over ``denominator``), and sums to be divided by the same denominator by the caller:
        ``clipped`` tokens, ``ratio`` and ``approx_kl`` (k3 of old to new).
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, torch.zeros_like(logprobs))
    log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    advantages = torch.where(mask, advantages, torch.zeros_like(advantages))
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)
    surrogate = torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)
    loss = -masked_sum(surrogate, mask) / denominator
    with torch.no_grad():
        metrics = {
            "clipped": float(masked_sum(((ratio - 1).abs() > clip_range).float(), mask)),
            "ratio": float(masked_sum(ratio, mask)),
            "approx_kl": float(masked_sum(ratio - 1 - log_ratio, mask)),
        }
    return loss, metrics


def value_loss(
    values: Float[Tensor, "B R"],
    old_values: Float[Tensor, "B R"],
    returns: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    denominator: float,
    clip_range: float = 0.2,
) -> tuple[Float[Tensor, ""], Metrics]:
    """Compute the clipped value loss.

    L = ½·Σ max((V - G)², (clip(V, V_old ± ε) - G)²) / denominator; OpenAI baselines' ppo2, detail 9 of
    https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/.

    Returns:
        The loss over ``denominator`` response tokens, and the sum ``value_clipped``.
    """
    values = torch.where(mask, values, old_values)  # no NaN gradient from what stands behind the mask
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    errors = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    loss = 0.5 * masked_sum(errors, mask) / denominator
    with torch.no_grad():
        outside = ((values - old_values).abs() > clip_range).float()
        metrics = {"value_clipped": float(masked_sum(outside, mask))}
    return loss, metrics


def kl_estimate(
    logprobs: Float[Tensor, "B R"], reference_logprobs: Float[Tensor, "B R"], estimator: Literal["k1", "k2", "k3"]
) -> Float[Tensor, "B R"]:
    """Estimate KL(policy ‖ reference) per token from samples of the policy, in nats.

    With d = log π - log π_ref: k1 = d (unbiased, high variance); k2 = d²/2 (biased, its *gradient* is the KL's);
    k3 = exp(-d) - 1 + d (unbiased, never negative). Schulman 2020, http://joschu.net/blog/kl-approx.html.
    """
    difference = (logprobs - reference_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference**2 / 2
    return torch.exp(-difference) - 1 + difference


def kl_loss(
    logprobs: Float[Tensor, "B R"],
    reference_logprobs: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    denominator: float,
) -> tuple[Float[Tensor, ""], Metrics]:
    """Compute the KL to the reference as a loss: k2, whose gradient on the policy's own samples is the gradient of
    KL(policy ‖ reference) (k3's is not). Sum over ``denominator`` response tokens; ``kl`` is the sum of k3."""
    loss = masked_sum(kl_estimate(logprobs, reference_logprobs, "k2"), mask) / denominator
    with torch.no_grad():
        metrics = {"kl": float(masked_sum(kl_estimate(logprobs, reference_logprobs, "k3"), mask))}
    return loss, metrics


def adapted_kl_coef(kl_coef: float, kl: float, target: float, responses: int, horizon: int) -> float:
    """Return β·(1 + clip(kl/target - 1, ±0.2)·n/H): the next coefficient of a proportional controller.

    Ziegler et al. 2019, sec. 2.2, https://arxiv.org/abs/1909.08593.

    Args:
        kl_coef: β now, per nat.
        kl: measured KL(policy ‖ reference), nats per response.
        target: where the KL should be, nats per response, > 0.
        responses: n, that the KL was measured on.
        horizon: H, responses; with an error of 20% throughout, β changes by a factor of about e^0.2 in so many.
    """
    error = max(-0.2, min(0.2, kl / target - 1))
    return kl_coef * (1 + error * responses / horizon)


def full_kl_loss(
    logits: Float[Tensor, "B R V"],
    reference_logits: Float[Tensor, "B R V"],
    mask: Bool[Tensor, "B R"],
    denominator: float,
) -> Float[Tensor, ""]:
    """Compute KL(reference ‖ policy) over the whole vocabulary at each real position, summed over ``denominator``.

    The anchors' loss: exact, not sampled, and it covers every token the reference might say.
    """
    reference = torch.log_softmax(reference_logits.float(), -1)
    logits = logits.masked_fill(~mask[..., None], 0)  # no NaN gradient from what stands behind the mask
    policy = torch.log_softmax(logits.float(), -1)
    return masked_sum((reference.exp() * (reference - policy)).sum(-1), mask) / denominator
