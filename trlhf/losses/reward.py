"""One likelihood for everything that people say about responses: verdicts and preferences.

Both are Bernoulli draws whose probability is a smoothed logistic function of a margin m,
p(m) = ε + (1 - 2ε) σ(m), where ε is the chance that a label was flipped. Heads are independent columns.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Metrics = dict[str, float]


def verdict_loss(
    scores: Float[Tensor, "B K"],
    labels: Float[Tensor, " B"],
    weights: Float[Tensor, "B K"],
    denominator: float,
    flip_rate: float = 0.0,
) -> tuple[Float[Tensor, ""], Metrics]:
    """Return the negative log-likelihood of right / wrong verdicts, in nats.

    L = -Σ_bk w_bk [y_b log p(s_bk) + (1 - y_b) log(1 - p(s_bk))] / denominator.

    Args:
        scores: logits of being right, one column per head.
        labels: 1 right, 0 wrong; values between are read as probabilities.
        weights: of each label in each head (bootstrap weights); 0 leaves it out.
        denominator: what the sum is divided by: the total weight of the whole optimizer step.
        flip_rate: ε, the chance that a label is the opposite of the truth; in [0, 0.5).

    Returns:
        The loss (sum over labels and heads, over ``denominator``) and the metrics ``accuracy`` and ``margin``, means
        over labels of the mean head.
    """
    nll = _binary_nll(scores, labels[:, None].expand_as(scores), flip_rate)
    return (weights * nll).sum() / denominator, _metrics(scores, labels)


def preference_loss(
    first_scores: Float[Tensor, "B K"],
    second_scores: Float[Tensor, "B K"],
    preferences: Float[Tensor, " B"],
    weights: Float[Tensor, "B K"],
    *,
    denominator: float,
    temperature: float = 1.0,
    flip_rate: float = 0.0,
) -> tuple[Float[Tensor, ""], Metrics]:
    """Return the negative log-likelihood of comparisons under the Bradley-Terry model, in nats.

    P(first ≻ second) = p((s₁ - s₂) / τ): Bradley & Terry 1952; with ε as in Christiano et al. 2017, sec. 2.2.3
    (https://arxiv.org/abs/1706.03741); ε = 0, τ = 1 is Ouyang et al. 2022, eq. 1 (https://arxiv.org/abs/2203.02155).

    Args:
        first_scores: scores of the first responses, one column per head.
        second_scores: scores of the second ones.
        preferences: 1 the first is better, 0 the second, 0.5 a tie (half a vote each way).
        weights: of each comparison in each head; 0 leaves it out.
        denominator: what the sum is divided by: the total weight of the whole optimizer step.
        temperature: τ, the score difference that counts as one unit of logit; above 0.
        flip_rate: ε, the chance that a label is the opposite of the truth; in [0, 0.5).

    Returns:
        The loss (sum over comparisons and heads, over ``denominator``) and the metrics ``accuracy`` (ties left out)
        and ``margin``, means over comparisons of the mean head.
    """
    margins = (first_scores - second_scores) / temperature
    nll = _binary_nll(margins, preferences[:, None].expand_as(margins), flip_rate)
    return (weights * nll).sum() / denominator, _metrics(margins, preferences)


def _binary_nll(margins: Float[Tensor, "B K"], targets: Float[Tensor, "B K"], flip_rate: float) -> Float[Tensor, "B K"]:
    """Return -[q log p(m) + (1 - q) log(1 - p(m))]; 1 - p(m) = p(-m), so both logarithms are taken the stable way."""
    if not 0.0 <= flip_rate < 0.5:
        raise ValueError(f"flip_rate={flip_rate}: it must be in [0, 0.5); at 0.5 a label says nothing")
    return -(targets * _log_smoothed(margins, flip_rate) + (1 - targets) * _log_smoothed(-margins, flip_rate))


def _log_smoothed(margins: Float[Tensor, "B K"], flip_rate: float) -> Float[Tensor, "B K"]:
    """Return log(ε + (1 - 2ε) σ(m)), finite for every finite m."""
    log_sigmoid = F.logsigmoid(margins)
    if flip_rate == 0.0:
        return log_sigmoid
    floor = torch.full_like(log_sigmoid, math.log(flip_rate))
    return torch.logaddexp(floor, log_sigmoid + math.log1p(-2 * flip_rate))


@torch.no_grad()
def _metrics(margins: Float[Tensor, "B K"], targets: Float[Tensor, " B"]) -> Metrics:
    mean = margins.mean(dim=1)
    decided = targets != 0.5
    if not bool(decided.any()):
        return {"accuracy": math.nan, "margin": math.nan}
    agreed = (mean > 0) == (targets > 0.5)
    signed = torch.where(targets > 0.5, mean, -mean)
    return {
        "accuracy": float(agreed[decided].float().mean()),
        "margin": float(signed[decided].mean()),
    }
