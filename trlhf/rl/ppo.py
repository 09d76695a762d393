"""PPO: one batch of sampled groups → a few clipped steps. Critic (GAE) or leave-one-out baseline."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trlhf.advantages import explained_variance, gae, leave_one_out, whiten
from trlhf.config import RlConfig
from trlhf.distributed import share, sum_counts, sum_tensors
from trlhf.logprobs import can_share_prompts, measured_logprobs, response_logprobs
from trlhf.losses.ppo import adapted_kl_coef, kl_estimate, kl_loss, ppo_loss, value_loss
from trlhf.masks import masked_mean
from trlhf.rl.anchors import Anchor
from trlhf.rl.critic import Critic
from trlhf.rl.experience import Group, describe, sampler_logprobs
from trlhf.rl.hold import AnchorHold
from trlhf.rl.optimizer import GuardedOptimizer
from trlhf.rl.rollout_batch import Experience, blank_experience
from trlhf.roles import Role
from trlhf.sharding import passes, put, whole

Metrics = dict[str, float]
PER_STEP = ("grad_norm", "anchor_kl")  # means over optimizer steps; the others are means over response tokens


class PpoLearner:
    """The policy, its optimizer and (for GAE) a critic.

    Args:
        policy: learns; dropout stays off throughout.
        reference: the SFT policy.
        critic: for ``config.advantage="gae"``, else None.
        config: the rl section.
        pad_id: token to pad with.
    """

    def __init__(self, policy: Role, reference: Role, critic: Critic | None, config: RlConfig, pad_id: int) -> None:
        self.policy, self.reference, self.critic, self.config, self.pad_id = policy, reference, critic, config, pad_id
        remedy = f"lower rl.learning_rate={config.learning_rate} or raise rl.kl_coef={config.kl_coef}"
        self.optimizer = GuardedOptimizer(policy.trainable().values(), config.learning_rate, config, remedy)
        self.critic_optimizer: GuardedOptimizer | None = None
        if critic is not None:
            remedy = f"lower rl.value_learning_rate={config.value_learning_rate}"
            learning = critic.trainable().values()
            self.critic_optimizer = GuardedOptimizer(learning, config.value_learning_rate, config, remedy)
        self.share_prompts = can_share_prompts(policy.model)
        self.kl_coef = config.kl_coef
        self.hold = AnchorHold(policy, reference, config, pad_id)

    def update(
        self,
        groups: Sequence[Group],
        anchors: Sequence[Anchor],
        rng: random.Random,
        lr_scale: float,
        warmup: bool = False,
    ) -> Metrics:
        """Take ``config.epochs`` passes of clipped steps over the groups.

        Args:
            groups: sampled by this policy; on every rank the same.
            anchors: to draw anchor rows from.
            rng: order of the minibatches and choice of the anchors.
            lr_scale: of the peak learning rate, in [0, 1].
            warmup: only the critic learns.
        """
        config = self.config
        self.optimizer.scale(lr_scale)
        if self.critic_optimizer is not None:
            self.critic_optimizer.scale(lr_scale)
        used = [group for group in groups if group.mixed] if config.advantage == "leave_one_out" else list(groups)
        metrics = describe(groups) | {"kl_coef": self.kl_coef, "learning_rate": config.learning_rate * lr_scale}
        metrics["anchor_coef"] = self.hold.coef
        if not used:
            return metrics
        experience, measured = self._collect(used)
        metrics |= measured
        sums: defaultdict[str, float] = defaultdict(float)
        skipped, held = self._skipped(), 0
        per_minibatch = max(1, config.minibatch_size // config.samples_per_prompt)
        for _ in range(config.epochs):
            order = list(experience.groups)
            rng.shuffle(order)
            for start in range(0, len(order), per_minibatch):
                chosen = self.hold.draw(anchors, rng)
                held += len(chosen)
                self._step(experience, order[start : start + per_minibatch], chosen, sums, warmup)
        steps, tokens = max(1.0, sums.pop("steps")), max(1.0, sums.pop("tokens"))
        if "first_ratio" in sums:
            metrics["first_ratio"] = sums.pop("first_ratio")
        metrics |= {name: value / (steps if name in PER_STEP else tokens) for name, value in sums.items()}
        metrics["skipped_steps"] = float(self._skipped() - skipped)
        self.hold.adapt(metrics.get("anchor_kl"), held)
        if config.kl_target is not None and not warmup:
            kl = metrics["kl_per_response"]
            self.kl_coef = adapted_kl_coef(
                self.kl_coef, kl, config.kl_target, len(experience.prompts), config.kl_horizon
            )
        return metrics

    def _collect(self, groups: Sequence[Group]) -> tuple[Experience, Metrics]:
        """Compute log-probabilities, values and advantages of a batch, without gradients; each rank its share."""
        config = self.config
        experience = blank_experience(groups, self.policy.device)
        mask = experience.mask
        scores = torch.tensor([group.rewards for group in groups], device=mask.device)
        trust = torch.tensor([group.weights for group in groups], device=mask.device).flatten()[:, None]
        entropy = self._measure(experience)
        sum_tensors((experience.old_logprobs, experience.reference_logprobs, experience.old_values, entropy))
        kl = kl_estimate(experience.old_logprobs, experience.reference_logprobs, "k1")
        if self.critic is None:
            per_response = leave_one_out(scores).flatten()
            if config.kl_in == "reward":
                per_response = leave_one_out(scores - self.kl_coef * (kl * mask).sum(1).view(scores.shape)).flatten()
            experience.advantages = whiten(per_response[:, None].expand(mask.shape) * trust, mask)
        else:
            last = mask.sum(1) - 1
            rewards = torch.zeros_like(experience.old_values)
            rewards[torch.arange(len(last)), last] = scores.flatten()
            if config.kl_in == "reward":
                rewards = rewards - self.kl_coef * kl * mask
            advantages, experience.returns = gae(rewards, experience.old_values, mask, config.gamma, config.gae_lambda)
            experience.advantages = whiten(advantages * trust, mask)
        measured = {
            "sampler_mismatch": self._sampler_mismatch(experience, groups),
            "kl_per_response": float((kl * mask).sum(1).mean()),
            "entropy": float(masked_mean(entropy, mask)),
        }
        if self.critic is not None:
            measured["explained_variance"] = explained_variance(experience.old_values, experience.returns, mask)
        return experience, measured

    @torch.no_grad()
    def _measure(self, experience: Experience) -> Tensor:
        """Let each model look at this rank's share of the rows, one model after the other; return the entropy [B R]."""
        config = self.config
        entropy = torch.zeros_like(experience.old_logprobs)
        own = list(experience.microbatches(share(experience.groups), config.microbatch_size))
        batches = [experience.batch(rows, self.pad_id, self.share_prompts) for rows in own]
        widths = [batch.response_mask.shape[1] for batch in batches]
        with whole(self.policy), self.policy.acting() as model:
            for rows, width, batch in zip(own, widths, batches, strict=True):
                logprobs, entropy[rows, :width] = measured_logprobs(model, batch, config.temperature)
                experience.old_logprobs[rows, :width] = logprobs
        with whole(self.reference), self.reference.acting() as model:
            for rows, width, batch in zip(own, widths, batches, strict=True):
                experience.reference_logprobs[rows, :width] = response_logprobs(model, batch, config.temperature)
        if self.critic is not None:
            with whole(self.critic.role):
                for rows, width, batch in zip(own, widths, batches, strict=True):
                    experience.old_values[rows, :width] = self.critic(batch)
        return entropy

    def _sampler_mismatch(self, experience: Experience, groups: Sequence[Group]) -> float:
        """Compare the sampler's log-probabilities with the training model's: KL(sampler ‖ policy), k3, per token."""
        mask = experience.mask
        sampled = sampler_logprobs((rollout for group in groups for rollout in group.rollouts), mask)
        return float(masked_mean(kl_estimate(sampled, experience.old_logprobs, "k3"), mask))

    def _step(
        self,
        experience: Experience,
        groups: Sequence[list[int]],
        anchors: Sequence[Anchor],
        sums: defaultdict[str, float],
        warmup: bool,
    ) -> None:
        """Take one optimizer step on a minibatch, each rank its share; add its sums, over all ranks, to ``sums``."""
        config = self.config
        denominator = float(sum(len(experience.responses[i]) for group in groups for i in group))
        counts: defaultdict[str, float] = defaultdict(float)
        self.optimizer.zero_grad()
        if self.critic_optimizer is not None:
            self.critic_optimizer.zero_grad()
        own = list(experience.microbatches(share(groups), config.microbatch_size))
        for rows, weight in passes(self.policy.model, own, filler=groups[0][:1]):
            self._backward(experience, rows, denominator, counts, warmup, weight)
        if not warmup:
            counts |= self.hold.add_gradient(anchors)
        counts = defaultdict(float, sum_counts(counts))
        if not warmup:
            counts["grad_norm"] += self.optimizer.step() or 0.0
            sums.setdefault("first_ratio", counts["ratio"] / denominator)
        if self.critic_optimizer is not None:
            self.critic_optimizer.step()
        for name, value in (counts | {"tokens": denominator, "steps": 1.0}).items():
            sums[name] += value

    def _backward(
        self,
        experience: Experience,
        rows: Sequence[int],
        denominator: float,
        counts: defaultdict[str, float],
        warmup: bool,
        weight: float,
    ) -> None:
        """Add the gradients of a microbatch, and its sums to ``counts``; ``weight`` 0: only keep the others company."""
        config = self.config
        batch = experience.batch(rows, self.pad_id, self.share_prompts)
        mask = batch.response_mask
        old, reference, advantages, old_values, returns = experience.cut(rows, mask.shape[1])
        found: Metrics = {}
        if self.critic is not None:
            with self.critic.role.acting():  # also while the backward pass recomputes what was not kept
                values = self.critic(batch)
                loss, found = value_loss(values, old_values, returns, mask, denominator, config.value_clip_range)
                (weight * config.value_coef * loss).backward()
            found |= {"value_loss": float(loss.detach()) * denominator}
        if not warmup:
            with self.policy.acting() as model:
                logprobs = response_logprobs(model, batch, config.temperature)
                loss, more = ppo_loss(logprobs, old, advantages, mask, denominator, config.clip_range, config.dual_clip)
                penalty, kl = kl_loss(logprobs, reference, mask, denominator)
                if config.kl_in == "loss":
                    loss = loss + self.kl_coef * penalty
                (weight * loss).backward()
            found |= more | kl | {"loss": float(loss.detach()) * denominator}
        for name, value in found.items():
            counts[name] += weight * value

    def _skipped(self) -> int:
        """Return how many steps were skipped so far, the critic's included."""
        return self.optimizer.skipped + (self.critic_optimizer.skipped if self.critic_optimizer is not None else 0)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a continued run needs beside the weights of the policy."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "critic": {} if self.critic is None else {k: v.detach() for k, v in self.critic.trainable().items()},
            "critic_optimizer": self.critic_optimizer.state_dict() if self.critic_optimizer is not None else None,
            "kl_coef": self.kl_coef,
            "anchor_coef": self.hold.coef,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.critic is not None and self.critic_optimizer is not None:
            for name, value in self.critic.trainable().items():
                put(value, state["critic"][name])
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.kl_coef, self.hold.coef = state["kl_coef"], state["anchor_coef"]
