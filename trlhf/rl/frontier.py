"""What the stage knows of each prompt's pass rate: noted from every sample, used to draw prompts, told in words."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from trlhf.config import RlConfig
from trlhf.distributed import share, sum_counts
from trlhf.knowledge import Knowledge
from trlhf.logprobs import can_share_prompts, pad_sequences, response_logprobs
from trlhf.masks import masked_sum
from trlhf.rl.experience import Group, sampler_logprobs
from trlhf.rl.judge import settled
from trlhf.roles import Role
from trlhf.sharding import whole
from trlhf.targeting.frontier import frontier_value
from trlhf.targeting.pass_rates import describe_samples, fit_prior, looked, posterior, prior_pass_rates, sets
from trlhf.types import Prompt, Rollout

if TYPE_CHECKING:
    from trlhf.rl.checkpoint import Progress

TOKEN_LIMIT = 2.0  # nats of a token's log-ratio that count towards the drift
PROBES = 0.05  # of the candidates: prompts that are thought mastered or hopeless


def note_samples(
    state: Progress, name: str, rollouts: Sequence[Rollout], knowledge: Knowledge, expected: float | None = None
) -> None:
    """Note what a prompt's fresh samples show.

    Args:
        state: takes it up.
        name: id of an exact prompt.
        rollouts: its samples, of the policy as it is.
        knowledge: what labels say of them; one that never ended is wrong whatever it says.
        expected: the share of them that something else than labels expects to be right; None where labels alone count.
    """
    facts = [knowledge.known(name, r.answer) if r.finished else False for r in rollouts]
    answers = [r.answer if r.finished else None for r in rollouts]
    features = [settled(value) for value in describe_samples(answers, [r.logprobs for r in rollouts])]
    told = float(sum(fact is True for fact in facts)), float(sum(fact is False for fact in facts))
    total = len(rollouts)
    guess = None if expected is None else (expected * total, (1 - expected) * total)
    state.looks[name] = looked(state.looks.get(name), features, told, total, state.drift, guess)


def posterior_of(state: Progress, prompts: Sequence[Prompt]) -> tuple[Float[ndarray, " N"], Float[ndarray, " N"]]:
    """Return α and β of some prompts; one never sampled has the mean prior of those that were."""
    seen = np.array([look["features"] for look in state.looks.values()], float).reshape(-1, 3)
    unseen = float(prior_pass_rates(state.prior, seen).mean()) if len(seen) else 0.5
    return posterior([state.looks.get(prompt.id) for prompt in prompts], state.prior, state.drift, unseen)


def refit_prior(state: Progress) -> None:
    """Fit the label-free prior to all that labels tell by now."""
    state.prior = fit_prior(list(state.looks.values()))


def describe_frontier(state: Progress, pool: Sequence[Prompt], group: int) -> dict[str, Any]:
    """Return what a round's file says of the pool's exact prompts.

    Returns:
        ``seen``: sampled at least once, and of these ``frontier``, ``mastered`` and ``hopeless``. ``worth``: ΣU over
        all of them, mixed groups if each were sampled once; those never sampled count as the mean of the others.
        ``prior``: its coefficients. ``drift``: nats a response.
    """
    exact = [prompt for prompt in pool if prompt.task == "exact"]
    seen = [prompt for prompt in exact if prompt.id in state.looks]
    found: dict[str, Any] = {"prompts": len(exact), "seen": len(seen), "worth": 0.0}
    alpha, beta = posterior_of(state, seen)
    kinds = sets(alpha, beta)
    found |= {name: kinds.count(name) for name in ("frontier", "mastered", "hopeless")}
    if seen:
        found["worth"] = settled(float(frontier_value(alpha, beta, group).mean()) * len(exact))
    return found | {"prior": state.prior, "drift": settled(state.drift)}


def draw_candidates(
    state: Progress, prompts: Sequence[Prompt], count: int, rng: random.Random, probe: bool
) -> list[Prompt]:
    """Draw the prompts that a round looks at.

    Args:
        state: what is known of them.
        prompts: to draw from.
        count: how many; fewer where there are fewer.
        rng: of the draw.
        probe: leave out what is thought mastered or hopeless, but for a share of `PROBES`, or as far as others are
            missing; else all alike.
    """
    count = min(count, len(prompts))
    if not probe:
        return rng.sample(prompts, count)
    kinds = sets(*posterior_of(state, prompts))
    known = [p.id in state.looks and kind != "frontier" for p, kind in zip(prompts, kinds, strict=True)]
    settled_ = [prompt for prompt, out in zip(prompts, known, strict=True) if out]
    others = [prompt for prompt, out in zip(prompts, known, strict=True) if not out]
    probes = max(min(round(PROBES * count), len(settled_)), count - len(others))
    return rng.sample(others, count - probes) + rng.sample(settled_, probes)


@torch.no_grad()
def measure_drift(policy: Role, groups: Sequence[Group], config: RlConfig, pad_id: int) -> float:
    """Return KL(π_then ‖ π_now) of the update just done, nats a response: how far it moved the policy.

    k2 (half the squared log-ratio, right to second order), from one fresh sample of each prompt: the sampler's own
    log-probabilities against those of the updated policy. Log-ratios are cut at `TOKEN_LIMIT`: a token or two that
    nearly vanished made up a whole batch's estimate (5.2 nats of k2, 1.6 of k3), where the KL of the updated policy's
    own samples was 0.1. What a stage moved is the sum over its updates. That takes the steps as independent: a
    policy that goes straight ahead moves further, √KL adding up instead of KL; one that wavers moves less.
    """
    total = 0.0
    ordered = sorted(share(groups), key=lambda group: len(group.rollouts[0].token_ids))
    with whole(policy), policy.acting() as model:
        for start in range(0, len(ordered), config.microbatch_size):
            part = ordered[start : start + config.microbatch_size]
            rollouts = [group.rollouts[0] for group in part]
            ids = [group.prompt_ids for group in part]
            batch = pad_sequences(ids, [r.token_ids for r in rollouts], pad_id, can_share_prompts(policy.model))
            batch = batch.to(policy.device)
            now = response_logprobs(model, batch, config.temperature)
            then = sampler_logprobs(rollouts, batch.response_mask)
            ratio = (then - now).clamp(-TOKEN_LIMIT, TOKEN_LIMIT)
            total += float(masked_sum(ratio**2 / 2, batch.response_mask))
    return sum_counts({"drift": total})["drift"] / max(1, len(groups))


def expected_rate(outlook: Mapping[str, tuple[float, float]], name: str, least_trust: float) -> float | None:
    """Return the pass rate that the answer model expects of a prompt; None where it tells nothing with trust."""
    rate, trust = outlook.get(name, (0.0, 0.0))
    return rate if trust >= least_trust else None
