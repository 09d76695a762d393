"""K small heads that agree where there are labels and differ where there are none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trlhf.reward.features import Pooled
from trlhf.seeding import torch_generator


class EnsembleHeads(nn.Module):
    """Score pooled hidden states with K linear heads, each on a fixed random prior of its own.

    f_k(φ) = (w_k + s·v_k)·φ̃, where w_k is learned and v_k never: randomised priors, Osband et al. 2018, sec. 3
    (https://arxiv.org/abs/1806.03335). Regularised towards w_k = 0, a head falls back on its prior in the directions
    in which no label speaks, and there the heads differ. Departure from the paper: the priors are centred over the
    heads, so that they widen the ensemble and leave its mean alone.

    Two *nuisances* belong to a label and not to a response's score: an intercept b_k(x) = u_k·ξ̃ + a_k, a function of
    the prompt's own hidden state ξ (how hard is the question?), and c_k·l̃, the standardised logarithm of the response's
    length. They take up what difficulty and length explain, so that the score keeps what is left: what tells two
    responses to one prompt apart. The length term is 0 whenever anything is scored.

    Args:
        feature_size: F, size of the response features φ.
        prompt_size: D, size of the prompt features ξ.
        heads: K.
        prior_scale: s, standard deviation of the prior's scores over the training responses, in logits.
        seed: of the priors.
    """

    weight: Tensor
    prior: Tensor

    def __init__(self, feature_size: int, prompt_size: int, heads: int, prior_scale: float, seed: int) -> None:
        super().__init__()
        self.heads = heads
        self.prior_scale = prior_scale
        self.weight = nn.Parameter(torch.zeros(heads, feature_size))
        self.intercept_weight = nn.Parameter(torch.zeros(heads, prompt_size))
        self.intercept_bias = nn.Parameter(torch.zeros(heads))
        self.length_weight = nn.Parameter(torch.zeros(2, heads))  # verdicts, preferences
        generator = torch_generator(seed, "reward", "priors")
        prior = torch.randn(heads, feature_size, generator=generator) / math.sqrt(feature_size)
        self.register_buffer("prior", prior - prior.mean(dim=0) if heads > 1 else prior)
        for name, size in (("feature", feature_size), ("prompt", prompt_size), ("length", 1)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_gain", torch.ones(size))

    @torch.no_grad()
    def standardise_on(self, pooled: Pooled, response_lengths: Sequence[int]) -> None:
        """Take means and standard deviations from training samples; a feature that never varies is switched off."""
        log_lengths = torch.tensor(response_lengths, dtype=torch.float32).log()[:, None]
        for name, values in (("feature", pooled.response), ("prompt", pooled.prompt), ("length", log_lengths)):
            mean = values.mean(dim=0)
            sd = values.std(dim=0, correction=0)
            varies = sd > 1e-5 * (1 + mean.abs())
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_gain").copy_(torch.where(varies, 1 / sd.clamp_min(1e-12), 0.0))

    def standardised(self, pooled: Pooled) -> Pooled:
        """Return the features that the linear maps see: mean 0 and standard deviation 1 over the training samples."""
        return Pooled(
            (pooled.response - self._buffer("feature_mean")) * self._buffer("feature_gain"),
            (pooled.prompt - self._buffer("prompt_mean")) * self._buffer("prompt_gain"),
        )

    def standardised_lengths(self, response_lengths: Sequence[int]) -> Float[Tensor, " B"]:
        """Return l̃, the standardised logarithm of each length in tokens."""
        log_lengths = torch.tensor(response_lengths, dtype=torch.float32, device=self.weight.device).log()
        return (log_lengths - self._buffer("length_mean")) * self._buffer("length_gain")

    def scores(self, pooled: Pooled) -> Float[Tensor, "B K"]:
        """Return f, uncalibrated; differences within one prompt are what it means."""
        return self.standardised(pooled).response @ (self.weight + self.prior_scale * self.prior).T

    def intercepts(self, pooled: Pooled) -> Float[Tensor, "B K"]:
        """Return b(x): f + b is the uncalibrated logit of a right verdict."""
        return self.standardised(pooled).prompt @ self.intercept_weight.T + self.intercept_bias

    def forward(self, pooled: Pooled) -> Float[Tensor, "B K"]:
        """Return :meth:`scores`."""
        return self.scores(pooled)

    def _buffer(self, name: str) -> Tensor:
        buffer = getattr(self, name)
        assert isinstance(buffer, Tensor)
        return buffer
