"""DPO on pairs of the policy's own samples: right against wrong where labels decide, elsewhere by the reward model."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trlhf.config import RlConfig
from trlhf.logprobs import can_share_prompts, pad_sequences, response_logprobs
from trlhf.losses.dpo import chosen_nll, dpo_loss
from trlhf.models import Reference
from trlhf.rl.anchors import Anchor, anchor_loss
from trlhf.rl.experience import Group
from trlhf.rl.optimizer import GuardedOptimizer

Metrics = dict[str, float]
TokenIds = tuple[int, ...]
OPEN_GAP = 0.1  # least difference in P(preferred) for a pair that only the reward model tells apart


@dataclass(frozen=True)
class Pair:
    """A prompt with a better and a worse response, as tokens; ``verified`` if labels decided which is which."""

    prompt_ids: TokenIds
    chosen_ids: TokenIds
    rejected_ids: TokenIds
    verified: bool


def build_pairs(groups: Sequence[Group], per_group: int, rng: random.Random) -> list[Pair]:
    """Pair samples of each mixed group.

    Where labels decide, up to ``per_group`` pairs, each a right sample with the wrong one that parts from it last: what
    two responses share cancels out of the loss, so that it falls on where they differ. Where only the reward model
    tells, the top sample with one about two standard deviations below it, not with the worst
    (https://arxiv.org/abs/2502.16825), and only across a gap that means something.
    """
    pairs = []
    for group in groups:
        ids = [rollout.token_ids for rollout in group.rollouts]
        if all(group.verified):
            right = [i for i, reward in enumerate(group.rewards) if reward > 0.5]
            wrong = [i for i, reward in enumerate(group.rewards) if reward <= 0.5]
            rng.shuffle(right)
            rng.shuffle(wrong)
            count = min(per_group, max(len(right), len(wrong))) if right and wrong else 0
            uses: Counter[int] = Counter()
            for n in range(count):
                i = right[n % len(right)]
                j = min(wrong, key=lambda j: (uses[j], -_common_prefix(ids[i], ids[j])))
                uses[j] += 1
                pairs.append(Pair(group.prompt_ids, ids[i], ids[j], True))
            continue
        rewards = torch.tensor(group.rewards)
        best = int(rewards.argmax())
        aim = float(rewards.mean() - 2 * rewards.std())
        others = [i for i in range(len(ids)) if ids[i] != ids[best]]
        if not others:
            continue
        worse = min(others, key=lambda i: abs(group.rewards[i] - aim))
        if group.rewards[best] - group.rewards[worse] >= OPEN_GAP:
            pairs.append(Pair(group.prompt_ids, ids[best], ids[worse], group.verified[best] and group.verified[worse]))
    return pairs


def _common_prefix(first: TokenIds, second: TokenIds) -> int:
    """Return how many tokens two responses share from their start."""
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


class DpoLearner:
    """The policy with its optimizer; arguments as for `trlhf.rl.ppo.PpoLearner`."""

    def __init__(self, policy: PreTrainedModel, reference: Reference, config: RlConfig, pad_id: int) -> None:
        self.policy, self.reference, self.config, self.pad_id = policy, reference, config, pad_id
        remedy = f"lower rl.learning_rate={config.learning_rate} or rl.beta={config.beta}"
        self.optimizer = GuardedOptimizer(policy.parameters(), config.learning_rate, config, remedy)
        self.share_prompts = can_share_prompts(policy)

    def update(
        self,
        groups: Sequence[Group],
        anchors: Sequence[Anchor],
        rng: random.Random,
        lr_scale: float,
        warmup: bool = False,
    ) -> Metrics:
        """Take ``config.epochs`` passes over the pairs of these groups, ``config.pairs_per_step`` a step."""
        del warmup  # nothing but the policy learns here
        config = self.config
        self.optimizer.scale(lr_scale)
        rewards = [reward for g in groups for reward in g.rewards]
        pairs = build_pairs(groups, config.pairs_per_prompt, rng)
        metrics: Metrics = {
            "reward": sum(rewards) / len(rewards),
            "mixed_groups": sum(g.mixed for g in groups) / len(groups),
            "unfinished": sum(not r.finished for g in groups for r in g.rollouts) / len(rewards),
            "pairs": float(len(pairs)),
        }
        sums: defaultdict[str, float] = defaultdict(float)
        for _ in range(config.epochs):
            rng.shuffle(pairs)
            for start in range(0, len(pairs), config.pairs_per_step):
                chosen = rng.sample(anchors, min(config.anchor_prompts, len(anchors)))
                self._step(pairs[start : start + config.pairs_per_step], chosen, sums)
        if not pairs:
            return metrics
        steps, seen = sums.pop("steps"), sums.pop("seen")
        per_step = ("grad_norm", "anchor_kl")
        return metrics | {name: value / (steps if name in per_step else seen) for name, value in sums.items()}

    def _step(self, pairs: Sequence[Pair], anchors: Sequence[Anchor], sums: defaultdict[str, float]) -> None:
        config = self.config
        self.optimizer.zero_grad()
        ordered = sorted(pairs, key=lambda pair: (len(pair.prompt_ids), pair.prompt_ids))  # equal prompts side by side
        size = max(1, config.microbatch_size // 2)
        for start in range(0, len(ordered), size):
            part = ordered[start : start + size]
            loss, metrics = self._loss(part, float(len(pairs)))
            loss.backward()
            for name, value in (metrics | {"loss": float(loss.detach()) * len(pairs)}).items():
                sums[name] += value
        if anchors and config.anchor_coef:
            held = anchor_loss(self.policy, self.reference, anchors, self.pad_id)
            (config.anchor_coef * held).backward()
            sums["anchor_kl"] += float(held.detach())
        sums["steps"] += 1
        sums["seen"] += len(pairs)
        sums["grad_norm"] += self.optimizer.step() or 0.0

    def _loss(self, pairs: Sequence[Pair], denominator: float) -> tuple[Tensor, Metrics]:
        """Compute the loss of a microbatch: rows are chosen, rejected, chosen, … so that they share their prompts."""
        config = self.config
        prompts = [pair.prompt_ids for pair in pairs for _ in range(2)]
        responses = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
        batch = pad_sequences(prompts, responses, self.pad_id, self.share_prompts).to(self.policy.device)
        with torch.no_grad(), self.reference.active(self.policy) as model:
            reference = (response_logprobs(model, batch) * batch.response_mask).sum(1)
        policy = (response_logprobs(self.policy, batch) * batch.response_mask).sum(1)
        chosen, rejected = policy[::2], policy[1::2]
        loss, metrics = dpo_loss(chosen, rejected, reference[::2], reference[1::2], denominator, config.beta)
        nll = chosen_nll(chosen, batch.response_mask[::2].sum(1).float(), denominator)
        with torch.no_grad():
            metrics |= {
                "chosen_logprob": float(chosen.sum()),
                "rejected_logprob": float(rejected.sum()),
                "chosen_log_ratio": float((chosen - reference[::2]).sum()),
                "nll": float(nll) * denominator,
            }
        return loss + config.nll_coef * nll, metrics

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a continued run needs beside the weights of the policy."""
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
