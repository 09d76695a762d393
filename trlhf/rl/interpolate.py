"""The last step: back towards the reference, as far as held-out prompts ask for it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from trlhf.crew import keep, together
from trlhf.rl.held_out import FEWEST_TO_CHOOSE, pass_rates
from trlhf.rl.round import Round
from trlhf.roles import Role
from trlhf.rollout import Sampling, sample_as
from trlhf.seeding import derive_seed
from trlhf.sharding import local

log = logging.getLogger("trlhf")
GRID = (0.25, 0.5, 0.75, 1.0)
Rates = Mapping[str, float]  # prompt id → share of its samples that are right


def choose_share(rates: Mapping[float, Rates]) -> tuple[float, str]:
    """Choose λ: the best on held-out prompts, if it beats λ = 1 by more than a standard error; say why in words.

    mean(d) > sd(d)/√n over the paired differences d to λ = 1. Between equally good ones the largest λ.

    Args:
        rates: λ → pass rates of the same prompts; 1 among the λ.

    Raises:
        ValueError: no pass rates for λ = 1.
    """
    if 1.0 not in rates:
        raise ValueError("choose_share: no pass rates for λ = 1, which the others are compared with")
    means = {share: _mean(found) for share, found in rates.items()}
    best = max(means, key=lambda share: (means[share], share))
    if best == 1.0:
        return 1.0, f"no smaller share of the update is better than all of it: {means[1.0]:.1%} right"
    differences = [rates[best][name] - rate for name, rate in rates[1.0].items()]
    n, gain = len(differences), _mean(dict(enumerate(differences)))
    error = math.sqrt(sum((x - gain) ** 2 for x in differences) / (n - 1) / n) if n > 1 else math.inf
    words = f"{best:g} of the update: {means[best]:.1%} right, {means[1.0]:.1%} with all of it"
    if not gain > error + 1e-12:
        return 1.0, f"{words}, which is within a standard error ({error:.1%})"
    return best, f"{words}, more than a standard error ({error:.1%}) better"


def interpolate(trainer: Round) -> dict[str, Any] | None:
    """Set the policy to θ = π₀ + λ(θ_RL - π₀), λ of `GRID` chosen on the held-out prompts.

    Averaging with the model before RL gives back much of what RL forgets (Lin et al. 2023,
    https://arxiv.org/abs/2309.06256). The samples of every λ come from the same random numbers.

    Returns:
        ``share`` (λ), ``why``, ``accuracy`` by λ and the number of ``prompts``; None where it is not asked for, or
        there are too few prompts.
    """
    rl, prompts = trainer.config.rl, trainer.held_out
    if not rl.interpolate or len(prompts) < FEWEST_TO_CHOOSE:  # `Round.held_out` says so when the stage begins
        return None
    policy, reference = trainer.policy, trainer.inputs.roles.reference
    rates: dict[float, Rates] = {}
    for share in GRID:
        with blended(policy, reference, share):
            seed = derive_seed(trainer.config.seed, "rl", "interpolate")
            sampled = sample_as(policy, trainer.tokenizer, prompts, Sampling.of(rl, rl.samples_per_prompt), seed)
        rates[share] = pass_rates(prompts, sampled, trainer.knowledge)
    chosen, why = choose_share(rates)
    if chosen < 1:
        together(blend, policy, reference, chosen)
    log.info("rl.interpolate: λ = %g on %d held-out prompts; %s", chosen, len(prompts), why)
    accuracy = {f"{share:g}": _mean(found) for share, found in rates.items()}
    return {"share": chosen, "why": why, "accuracy": accuracy, "prompts": len(prompts)}


class Weights:
    """A copy of what a role learns with."""

    def __init__(self, role: Role) -> None:
        self._kept = {name: local(value.detach()).cpu().clone() for name, value in role.trainable().items()}

    @torch.no_grad()
    def put_back(self, role: Role) -> None:
        """Give a role these weights again."""
        for name, value in role.trainable().items():
            local(value).copy_(self._kept[name])


@contextmanager
def blended(policy: Role, reference: Role, share: float) -> Iterator[None]:
    """Let the policy be π₀ + λ(θ - π₀) while the block runs."""
    if share == 1:
        yield
        return
    kept = keep(Weights, policy)
    together(blend, policy, reference, share)
    try:
        yield
    finally:
        together(kept.put_back, policy)


@torch.no_grad()
def blend(policy: Role, reference: Role, share: float) -> None:
    """Move the policy back to π₀ + λ(θ - π₀), in place.

    Whole weights are interpolated one by one. Of an adapter that the base has no counterpart of, π₀ being the base,
    B is scaled: λ·BA.

    Raises:
        ValueError: the reference is an adapter too, of which no sum has the policy's rank.
    """
    if policy.base is None:
        start = dict(reference.model.named_parameters())
        for name, value in policy.trainable().items():
            value.copy_(start[name].to(value) + share * (value - start[name].to(value)))
        return
    if reference.adapter is not None:
        raise ValueError(
            f"blend: the reference is the adapter {reference.adapter!r}; only a policy over the bare base can be scaled"
        )
    for name, value in policy.trainable().items():
        if ".lora_B." in name:
            value.mul_(share)


def _mean(rates: Mapping[Any, float] | Sequence[float]) -> float:
    values = list(rates.values()) if isinstance(rates, Mapping) else list(rates)
    return sum(values) / len(values)
