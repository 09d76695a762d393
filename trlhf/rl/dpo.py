"""DPO on pairs of the policy's own samples: right against wrong where labels decide, elsewhere by the reward model."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trlhf.config import RlConfig
from trlhf.distributed import gather, share, sum_counts
from trlhf.logprobs import SequenceBatch, can_share_prompts, measured_logprobs, pad_sequences, response_logprobs
from trlhf.losses.dpo import chosen_nll, dpo_loss
from trlhf.losses.ppo import kl_estimate
from trlhf.masks import masked_sum
from trlhf.rl.anchors import Anchor
from trlhf.rl.experience import Group, describe, sampler_logprobs
from trlhf.rl.hold import AnchorHold
from trlhf.rl.optimizer import GuardedOptimizer
from trlhf.roles import Role
from trlhf.sharding import is_sharded, passes, whole

Metrics = dict[str, float]
PER_STEP = ("grad_norm", "anchor_kl")  # means over optimizer steps; the others are means over pairs
TokenIds = tuple[int, ...]
OPEN_GAP = 0.1  # least difference in P(preferred) for a pair that only the reward model tells apart


@dataclass(frozen=True)
class Pair:
    """A prompt with a better and a worse response, as tokens.

    ``verified``: labels decided which is which. ``weight``: trust in that, in (0, 1].
    """

    prompt_ids: TokenIds
    chosen_ids: TokenIds
    rejected_ids: TokenIds
    verified: bool
    weight: float = 1.0


def build_pairs(groups: Sequence[Group], per_group: int, rng: random.Random) -> list[Pair]:
    """Pair samples of each mixed group.

    Where labels or the answer model decide, up to ``per_group`` pairs, each a right sample with the wrong one that
    parts from it last: what two responses share cancels out of the loss, so that it falls on where they differ. Where
    only the reward model tells, the top sample with one about two standard deviations below it, not with the worst
    (https://arxiv.org/abs/2502.16825), and only across a gap that means something.
    """
    pairs = []
    for group in groups:
        ids = [rollout.token_ids for rollout in group.rollouts]
        if all(group.verified) or group.trust:
            right, wrong = _sides(group)
            rng.shuffle(right)
            rng.shuffle(wrong)
            count = min(per_group, max(len(right), len(wrong))) if right and wrong else 0
            uses: Counter[int] = Counter()
            for n in range(count):
                i = right[n % len(right)]
                j = min(wrong, key=lambda j: (uses[j], -_common_prefix(ids[i], ids[j])))
                uses[j] += 1
                weight = min(group.weights[i], group.weights[j])
                pairs.append(Pair(group.prompt_ids, ids[i], ids[j], all(group.verified), weight))
            continue
        rewards = torch.tensor(group.rewards)
        best = int(rewards.argmax())
        aim = float(rewards.mean() - 2 * rewards.std())
        others = [i for i in range(len(ids)) if ids[i] != ids[best]]
        if not others:
            continue
        worse = min(others, key=lambda i: abs(group.rewards[i] - aim))
        weight = min(group.weights[best], group.weights[worse])
        if group.rewards[best] - group.rewards[worse] >= OPEN_GAP and weight > 0:
            verified = group.verified[best] and group.verified[worse]
            pairs.append(Pair(group.prompt_ids, ids[best], ids[worse], verified, weight))
    return pairs


def _sides(group: Group) -> tuple[list[int], list[int]]:
    """Return the samples that are right and those that are wrong: above and below the mean by a gap, and trusted."""
    if all(group.verified):
        right = [reward > 0.5 for reward in group.rewards]
        return [i for i, x in enumerate(right) if x], [i for i, x in enumerate(right) if not x]
    mean = sum(group.rewards) / len(group.rewards)
    trusted = [i for i, weight in enumerate(group.weights) if weight > 0]
    above = [i for i in trusted if group.rewards[i] > mean + OPEN_GAP / 2]
    return above, [i for i in trusted if group.rewards[i] < mean - OPEN_GAP / 2]


def _common_prefix(first: TokenIds, second: TokenIds) -> int:
    """Return how many tokens two responses share from their start."""
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


class DpoLearner:
    """The policy with its optimizer; arguments as for `trlhf.rl.ppo.PpoLearner`."""

    def __init__(self, policy: Role, reference: Role, config: RlConfig, pad_id: int) -> None:
        self.policy, self.reference, self.config, self.pad_id = policy, reference, config, pad_id
        remedy = f"lower rl.learning_rate={config.learning_rate} or rl.beta={config.beta}"
        self.optimizer = GuardedOptimizer(policy.trainable().values(), config.learning_rate, config, remedy)
        self.share_prompts = can_share_prompts(policy.model)
        self.hold = AnchorHold(policy, reference, config, pad_id)
        self._known: dict[Pair, Tensor] = {}  # what the reference makes of the pairs of this update: [chosen, rejected]

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
        pairs = build_pairs(groups, config.pairs_per_prompt, rng)
        self._known = {}
        metrics = describe(groups) | self._measure(groups)
        metrics |= {"pairs": float(len(pairs)), "learning_rate": config.learning_rate * lr_scale}
        metrics["anchor_coef"] = self.hold.coef
        if is_sharded(self.reference.model):
            self._look_at(pairs)
        sums: defaultdict[str, float] = defaultdict(float)
        skipped, held = self.optimizer.skipped, 0
        for _ in range(config.epochs):
            rng.shuffle(pairs)
            for start in range(0, len(pairs), config.pairs_per_step):
                chosen = self.hold.draw(anchors, rng)
                held += len(chosen)
                self._step(pairs[start : start + config.pairs_per_step], chosen, sums)
        if not pairs:
            return metrics
        steps, seen = sums.pop("steps"), sums.pop("seen")
        metrics["skipped_steps"] = float(self.optimizer.skipped - skipped)
        metrics |= {name: value / (steps if name in PER_STEP else seen) for name, value in sums.items()}
        self.hold.adapt(metrics.get("anchor_kl"), held)
        return metrics

    @torch.no_grad()
    def _measure(self, groups: Sequence[Group]) -> Metrics:
        """Measure on one fresh sample of each prompt how far the policy is from its reference, and from its sampler."""
        config = self.config
        sums: defaultdict[str, float] = defaultdict(float)
        ordered = sorted(share(groups), key=lambda group: len(group.rollouts[0].token_ids))
        measured = []
        with whole(self.policy), self.policy.acting() as model:
            for start in range(0, len(ordered), config.microbatch_size):
                part = ordered[start : start + config.microbatch_size]
                rollouts = [group.rollouts[0] for group in part]
                batch = pad_sequences(
                    [group.prompt_ids for group in part],
                    [x.token_ids for x in rollouts],
                    self.pad_id,
                    self.share_prompts,
                ).to(self.policy.device)
                own, entropy = measured_logprobs(model, batch, config.temperature)
                mask = batch.response_mask
                sampled = sampler_logprobs(rollouts, mask)
                sums["entropy"] += float(masked_sum(entropy, mask))
                sums["sampler_mismatch"] += float(masked_sum(kl_estimate(sampled, own, "k3"), mask))
                sums["tokens"] += float(mask.sum())
                measured.append((batch, own))
        with whole(self.reference), self.reference.acting() as model:
            for batch, own in measured:
                reference = response_logprobs(model, batch, config.temperature)
                sums["kl_per_response"] += float(masked_sum(kl_estimate(own, reference, "k1"), batch.response_mask))
        totals = sum_counts(sums)
        tokens = max(1.0, totals.pop("tokens"))
        return {name: value / (len(groups) if name == "kl_per_response" else tokens) for name, value in totals.items()}

    def _step(self, pairs: Sequence[Pair], anchors: Sequence[Anchor], sums: defaultdict[str, float]) -> None:
        """Take one optimizer step, each rank its share of the pairs; add its sums, over all ranks, to ``sums``."""
        config = self.config
        counts: defaultdict[str, float] = defaultdict(float)
        self.optimizer.zero_grad()
        ordered = sorted(pairs, key=lambda pair: (len(pair.prompt_ids), pair.prompt_ids))  # equal prompts side by side
        own = share(ordered)
        size = max(1, config.microbatch_size // 2)
        parts = [own[start : start + size] for start in range(0, len(own), size)]
        for part, weight in passes(self.policy.model, parts, filler=ordered[:1]):
            with self.policy.acting():
                loss, metrics = self._loss(part, float(len(pairs)))
                (weight * loss).backward()
            for name, value in (metrics | {"loss": float(loss.detach()) * len(pairs)}).items():
                counts[name] += weight * value
        counts |= self.hold.add_gradient(anchors)
        totals = sum_counts(counts)
        totals |= {"grad_norm": self.optimizer.step() or 0.0, "steps": 1.0, "seen": float(len(pairs))}
        for name, value in totals.items():
            sums[name] += value

    def _loss(self, pairs: Sequence[Pair], denominator: float) -> tuple[Tensor, Metrics]:
        """Compute the loss of a microbatch: rows are chosen, rejected, chosen, … so that they share their prompts."""
        config = self.config
        batch = self._batch(pairs)
        reference = self._reference(pairs, batch)
        with self.policy.acting() as model:
            policy = response_logprobs(model, batch).sum(1)  # 0 behind a response's end
        chosen, rejected = policy[::2], policy[1::2]
        weights = torch.tensor([pair.weight for pair in pairs], device=chosen.device)
        loss, metrics = dpo_loss(
            chosen, rejected, reference[::2], reference[1::2], denominator, config.beta, weights=weights
        )
        nll = chosen_nll(chosen * weights, batch.response_mask[::2].sum(1).float(), denominator)
        with torch.no_grad():
            metrics |= {
                "chosen_logprob": float(chosen.sum()),
                "rejected_logprob": float(rejected.sum()),
                "chosen_log_ratio": float((chosen - reference[::2]).sum()),
                "nll": float(nll) * denominator,
            }
        return loss + config.nll_coef * nll, metrics

    @torch.no_grad()
    def _reference(self, pairs: Sequence[Pair], batch: SequenceBatch) -> Tensor:
        """Return the reference's log-probabilities of chosen, rejected, chosen, …: computed once in an update."""
        if any(pair not in self._known for pair in pairs):
            with self.reference.acting() as model:
                found = response_logprobs(model, batch).sum(1)
            self._known |= dict(zip(pairs, found.view(-1, 2).unbind(), strict=True))
        return torch.cat([self._known[pair] for pair in pairs])

    def _look_at(self, pairs: Sequence[Pair]) -> None:
        """Let the reference see all pairs before the first step, each rank its share: later, ranks would differ."""
        ordered = share(sorted(pairs, key=lambda pair: (len(pair.prompt_ids), pair.prompt_ids)))
        size = max(1, self.config.microbatch_size // 2)
        with whole(self.reference):
            for start in range(0, len(ordered), size):
                part = ordered[start : start + size]
                self._reference(part, self._batch(part))
        found = {pair: value.cpu() for pair, value in self._known.items()}
        self._known = {pair: value.to(self.policy.device) for part in gather(found) for pair, value in part.items()}

    def _batch(self, pairs: Sequence[Pair]) -> SequenceBatch:
        prompts = [pair.prompt_ids for pair in pairs for _ in range(2)]
        responses = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
        return pad_sequences(prompts, responses, self.pad_id, self.share_prompts).to(self.policy.device)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a continued run needs beside the weights of the policy."""
        return {"optimizer": self.optimizer.state_dict(), "anchor_coef": self.hold.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.hold.coef = state["anchor_coef"]
