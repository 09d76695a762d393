"""Advantages: generalized advantage estimation, leave-one-out baselines, whitening. Axes as in `trlhf.types`."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trlhf.masks import masked_mean


def gae(
    rewards: Float[Tensor, "B R"],
    values: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B R"]]:
    """Estimate advantages and returns.

    δ_t = r_t + γ·V_{t+1} - V_t;  A_t = Σ_l (γλ)^l δ_{t+l};  return_t = A_t + V_t, with V = 0 past the last real token.
    Schulman et al. 2016, eq. 16, https://arxiv.org/abs/1506.02438.

    Args:
        rewards: per token, KL penalty included where it enters the reward.
        values: V_t, predicted from the tokens before response token t.
        mask: True on response tokens; a prefix of each row.
        gamma: discount per token, in (0, 1].
        gae_lambda: in [0, 1]; 1 gives Monte Carlo returns.

    Returns:
        advantages and returns, 0 where the mask is False. Not whitened: returns must not be.
    """
    rewards, values = (torch.where(mask, x, torch.zeros_like(x)) for x in (rewards, values))
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(running)
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * gae_lambda * running) * mask[:, t]
        advantages[:, t] = running
    return advantages, (advantages + values) * mask


def leave_one_out(scores: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Subtract from each score the mean of the *other* samples of its prompt.

    A_i = R_i - 1/(G-1)·Σ_{j≠i} R_j. Ahmadian et al. 2024, eq. 8, https://arxiv.org/abs/2402.14740.

    Raises:
        ValueError: fewer than two samples a prompt.
    """
    group = scores.shape[1]
    if group < 2:
        raise ValueError(f"leave_one_out needs at least 2 samples a prompt, got {group}")
    return (scores - scores.mean(1, keepdim=True)) * (group / (group - 1))


def whiten(values: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], eps: float = 1e-8) -> Float[Tensor, "B R"]:
    """Shift and scale to mean 0 and standard deviation 1 over the real positions; 0 elsewhere."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    return torch.where(mask, (values - mean) * torch.rsqrt(variance + eps), torch.zeros_like(values))


def explained_variance(values: Float[Tensor, "B R"], returns: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]) -> float:
    """Return 1 - Var(returns - values) / Var(returns) over the real positions: 1 is perfect, 0 as good as a constant.

    NaN where the returns do not vary.
    """
    residuals = (returns - values)[mask]
    spread = float(returns[mask].var(correction=0)) if residuals.numel() else 0.0
    return 1 - float(residuals.var(correction=0)) / spread if spread > 0 else float("nan")
