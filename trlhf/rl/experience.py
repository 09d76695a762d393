"""Sampled groups with their rewards: exact where labels decide, else the reward model's lower confidence bound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor

from trlhf.config import RlConfig
from trlhf.knowledge import Knowledge
from trlhf.rl.judge import Judgement
from trlhf.types import Prompt, Rollout, Scorer

SCORE_LIMIT = 10.0  # of a score, in logits (standardised on the reference's samples)


@dataclass(frozen=True)
class Group:
    """The samples of one prompt.

    Attributes:
        prompt: whose samples these are.
        prompt_ids: the prompt's tokens.
        rollouts: G samples.
        rewards: G rewards in [0, 1] less penalties: probability of being right, or of being preferred to a typical
            response of the reference.
        verified: G flags: whether labels decided the reward (trust 1) or a model did.
        trust: G weights in [0, 1] of the advantages; empty: 1 each.
    """

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    rollouts: tuple[Rollout, ...]
    rewards: tuple[float, ...]
    verified: tuple[bool, ...]
    trust: tuple[float, ...] = ()

    @property
    def mixed(self) -> bool:
        """Whether the rewards differ and any is trusted; else the group teaches nothing."""
        return max(self.rewards) - min(self.rewards) > 1e-6 and max(self.weights) > 0

    @property
    def weights(self) -> tuple[float, ...]:
        """Return the trust in each advantage."""
        return self.trust or (1.0,) * len(self.rewards)

    def rows(self) -> list[dict[str, Any]]:
        """Return one JSON row a sample: prompt, response, reward, and whether labels decided it."""
        question = self.prompt.messages[-1]["content"]
        return [
            {
                "prompt_id": self.prompt.id,
                "prompt": question,
                "response": x.text,
                "reward": reward,
                "verified": verified,
            }
            for x, reward, verified in zip(self.rollouts, self.rewards, self.verified, strict=True)
        ]


def score_groups(
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[Sequence[int]],
    sampled: Sequence[Sequence[Rollout]],
    knowledge: Knowledge,
    scorer: Scorer | None,
    config: RlConfig,
    judged: Mapping[str, Judgement] | None = None,
) -> list[Group]:
    """Reward every sample.

    Known from the ledger: 1 if right, 0 if wrong. Otherwise σ(μ - κ·sd), the lower confidence bound of the
    reward model's probability. A response that never ended scores as wrong and pays the missing-EOS penalty.

    Args:
        prompts: P.
        prompt_ids: their tokens.
        sampled: their samples.
        knowledge: what labels say.
        scorer: the reward model.
        config: penalties.
        judged: prompt id → rewards and trust that take the place of all this for its samples.

    Raises:
        ValueError: an unverified response and no scorer.
    """
    judged = judged or {}
    asked = [
        (i, j)
        for i, (prompt, rollouts) in enumerate(zip(prompts, sampled, strict=True))
        for j, rollout in enumerate(rollouts)
        if _known(prompt, rollout, knowledge) is None and prompt.id not in judged
    ]
    scores: dict[tuple[int, int], float] = {}
    if asked:
        if scorer is None:
            raise ValueError("score_groups: some responses are not decided by labels, and there is no reward model")
        found = scorer.score([prompts[i] for i, _ in asked], [sampled[i][j].text for i, j in asked])
        bounds = np.array([score.mean - config.uncertainty_penalty * score.sd for score in found])
        values = expit(bounds.clip(-SCORE_LIMIT, SCORE_LIMIT))
        scores = dict(zip(asked, values.tolist(), strict=True))
    groups = []
    for i, (prompt, rollouts) in enumerate(zip(prompts, sampled, strict=True)):
        judgement = judged.get(prompt.id)
        known = [None if judgement else _known(prompt, rollout, knowledge) for rollout in rollouts]
        if judgement:
            scores |= {(i, j): reward for j, reward in enumerate(judgement.rewards)}
        rewards = [scores[i, j] if fact is None else float(fact) for j, fact in enumerate(known)]
        rewards = [
            r - (0.0 if x.finished else config.missing_eos_penalty) for r, x in zip(rewards, rollouts, strict=True)
        ]
        verified = tuple(fact is not None for fact in known)
        trust = judgement.trust if judgement else ()
        groups.append(Group(prompt, tuple(prompt_ids[i]), tuple(rollouts), tuple(rewards), verified, trust))
    return groups


def describe(groups: Sequence[Group]) -> dict[str, float]:
    """Return what a step's samples are like, before anything is learned from them.

    Returns:
        ``reward`` and ``trust`` (means), ``mixed_groups`` and ``truncated`` (shares), ``response_tokens`` (mean).
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return {
        "reward": float(np.mean([reward for group in groups for reward in group.rewards])),
        "trust": float(np.mean([weight for group in groups for weight in group.weights])),
        "mixed_groups": float(np.mean([group.mixed for group in groups])),
        "truncated": float(np.mean([not rollout.finished for rollout in rollouts])),
        "response_tokens": float(np.mean([len(rollout.token_ids) for rollout in rollouts])),
    }


def sampler_logprobs(rollouts: Iterable[Rollout], like: Tensor) -> Tensor:
    """Return the sampler's own log-probabilities of B responses, [B R], 0 behind their ends, where ``like`` is."""
    padded = torch.zeros(like.shape)
    for i, rollout in enumerate(rollouts):
        padded[i, : len(rollout.logprobs)] = torch.tensor(rollout.logprobs)
    return padded.to(like.device)


def _known(prompt: Prompt, rollout: Rollout, knowledge: Knowledge) -> bool | None:
    """Return what labels say of a response; one that never ended is wrong whatever it says."""
    if not rollout.finished:
        return False
    return knowledge.known(prompt.id, rollout.answer) if prompt.task == "exact" else None
