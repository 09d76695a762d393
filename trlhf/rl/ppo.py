"""PPO: one batch of sampled groups → a few clipped steps. Critic (GAE) or leave-one-out baseline."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from trlhf.advantages import gae, leave_one_out, whiten
from trlhf.config import RlConfig
from trlhf.logprobs import can_share_prompts, response_logprobs
from trlhf.losses.ppo import kl_estimate, kl_loss, ppo_loss, value_loss
from trlhf.masks import mask_from_lengths, masked_mean
from trlhf.models import Reference
from trlhf.rl.anchors import Anchor, anchor_loss
from trlhf.rl.critic import Critic
from trlhf.rl.experience import Group
from trlhf.rl.optimizer import GuardedOptimizer
from trlhf.rl.rollout_batch import Experience

Metrics = dict[str, float]


class PpoLearner:
    """The policy, its optimizer and (for GAE) a critic.

    Args:
        policy: trainable; in evaluation mode throughout, so that dropout stays off.
        reference: the SFT policy.
        critic: for ``config.advantage="gae"``, else None.
        config: the rl section.
        pad_id: token to pad with.
    """

    def __init__(
        self, policy: PreTrainedModel, reference: Reference, critic: Critic | None, config: RlConfig, pad_id: int
    ) -> None:
        self.policy, self.reference, self.critic, self.config, self.pad_id = policy, reference, critic, config, pad_id
        remedy = f"lower rl.learning_rate={config.learning_rate} or raise rl.kl_coef={config.kl_coef}"
        self.optimizer = GuardedOptimizer(policy.parameters(), config.learning_rate, config, remedy)
        self.critic_optimizer: GuardedOptimizer | None = None
        if critic is not None:
            remedy = f"lower rl.value_learning_rate={config.value_learning_rate}"
            self.critic_optimizer = GuardedOptimizer(critic.parameters(), config.value_learning_rate, config, remedy)
        self.share_prompts = can_share_prompts(policy)
        self.kl_coef = config.kl_coef

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
            groups: sampled by this policy.
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
        rewards = [reward for group in groups for reward in group.rewards]
        metrics: Metrics = {
            "reward": sum(rewards) / len(rewards),
            "mixed_groups": sum(group.mixed for group in groups) / len(groups),
            "unfinished": sum(not r.finished for g in groups for r in g.rollouts) / len(rewards),
            "kl_coef": self.kl_coef,
        }
        if not used:
            return metrics
        experience, measured = self._collect(used)
        metrics |= measured
        sums: defaultdict[str, float] = defaultdict(float)
        rows = len(experience.prompts)
        per_minibatch = max(1, config.minibatch_size // config.samples_per_prompt)
        for _ in range(config.epochs):
            order = list(experience.groups)
            rng.shuffle(order)
            for start in range(0, len(order), per_minibatch):
                chosen = rng.sample(anchors, min(config.anchor_prompts, len(anchors)))
                self._step(experience, order[start : start + per_minibatch], chosen, sums, warmup)
        steps, tokens = max(1.0, sums.pop("steps")), max(1.0, sums.pop("tokens"))
        metrics |= {name: value / tokens for name, value in sums.items() if name not in ("grad_norm", "anchor_kl")}
        metrics |= {name: sums[name] / steps for name in ("grad_norm", "anchor_kl")}
        if config.kl_target is not None and not warmup:
            response_kl = metrics["kl"] * tokens / (rows * config.epochs)
            error = max(-0.2, min(0.2, response_kl / config.kl_target - 1))
            self.kl_coef *= 1 + error * rows / config.kl_horizon
        return metrics

    def _collect(self, groups: Sequence[Group]) -> tuple[Experience, Metrics]:
        """Compute log-probabilities, values and advantages of a batch, without gradients."""
        config, device = self.config, self.policy.device
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        prompts = [group.prompt_ids for group in groups for _ in group.rollouts]
        size = config.samples_per_prompt
        scores = torch.tensor([group.rewards for group in groups], device=device)
        lengths = [len(rollout.token_ids) for rollout in rollouts]
        mask = mask_from_lengths(lengths, max(lengths)).to(device)
        blank = torch.zeros(mask.shape, device=device)
        experience = Experience(
            [list(range(start, start + size)) for start in range(0, len(rollouts), size)],
            prompts,
            [rollout.token_ids for rollout in rollouts],
            mask,
            *(blank.clone() for _ in range(5)),
        )
        with torch.no_grad():
            for rows in experience.microbatches(experience.groups, config.microbatch_size):
                batch = experience.batch(rows, self.pad_id, self.share_prompts)
                width = batch.response_mask.shape[1]
                experience.old_logprobs[rows, :width] = response_logprobs(self.policy, batch, config.temperature)
                with self.reference.active(self.policy) as reference:
                    logprobs = response_logprobs(reference, batch, config.temperature)
                experience.reference_logprobs[rows, :width] = logprobs
                if self.critic is not None:
                    experience.old_values[rows, :width] = self.critic(batch)
        kl = kl_estimate(experience.old_logprobs, experience.reference_logprobs, "k1")
        if self.critic is None:
            per_response = leave_one_out(scores).flatten()
            if config.kl_in == "reward":
                per_response = leave_one_out(scores - self.kl_coef * (kl * mask).sum(1).view(scores.shape)).flatten()
            experience.advantages = whiten(per_response[:, None].expand(mask.shape), mask)
        else:
            last = mask.sum(1) - 1
            rewards = torch.zeros_like(blank)
            rewards[torch.arange(len(last)), last] = scores.flatten()
            if config.kl_in == "reward":
                rewards = rewards - self.kl_coef * kl * mask
            advantages, experience.returns = gae(rewards, experience.old_values, mask, config.gamma, config.gae_lambda)
            experience.advantages = whiten(advantages, mask)
        return experience, self._sampler_mismatch(experience, [r.logprobs for r in rollouts])

    def _sampler_mismatch(self, experience: Experience, sampled: Sequence[Sequence[float]]) -> Metrics:
        """Compare the sampler's log-probabilities with the training model's: KL(sampler ‖ policy), k3, per token."""
        mask = experience.mask
        padded = torch.zeros(mask.shape)
        for i, row in enumerate(sampled):
            padded[i, : len(row)] = torch.tensor(row)
        difference = kl_estimate(padded.to(mask.device), experience.old_logprobs, "k3")
        return {
            "sampler_mismatch": float(masked_mean(difference, mask)),
            "response_tokens": float(mask.sum(1).float().mean()),
        }

    def _step(
        self,
        experience: Experience,
        groups: Sequence[list[int]],
        anchors: Sequence[Anchor],
        sums: defaultdict[str, float],
        warmup: bool,
    ) -> None:
        """Take one optimizer step on a minibatch; add its sums to ``sums``."""
        config = self.config
        denominator = float(sum(len(experience.responses[i]) for group in groups for i in group))
        self.optimizer.zero_grad()
        if self.critic_optimizer is not None:
            self.critic_optimizer.zero_grad()
        for rows in experience.microbatches(groups, config.microbatch_size):
            batch = experience.batch(rows, self.pad_id, self.share_prompts)
            mask = batch.response_mask
            old, reference, advantages, old_values, returns = experience.cut(rows, mask.shape[1])
            if self.critic is not None:
                critic_loss, counts = value_loss(
                    self.critic(batch), old_values, returns, mask, denominator, config.value_clip_range
                )
                (config.value_coef * critic_loss).backward()
                self._add(sums, counts | {"value_loss": float(critic_loss.detach()) * denominator})
            if warmup:
                continue
            logprobs = response_logprobs(self.policy, batch, config.temperature)
            loss, counts = ppo_loss(logprobs, old, advantages, mask, denominator, config.clip_range, config.dual_clip)
            penalty, kl_counts = kl_loss(logprobs, reference, mask, denominator)
            if config.kl_in == "loss":
                loss = loss + self.kl_coef * penalty
            loss.backward()
            self._add(sums, counts | kl_counts | {"loss": float(loss.detach()) * denominator})
        if anchors and config.anchor_coef and not warmup:
            held = anchor_loss(self.policy, self.reference, anchors, self.pad_id)
            (config.anchor_coef * held).backward()
            sums["anchor_kl"] += float(held.detach())
        if not warmup:
            sums["grad_norm"] += self.optimizer.step() or 0.0
        if self.critic_optimizer is not None:
            self.critic_optimizer.step()
        sums["tokens"] += denominator
        sums["steps"] += 1

    @staticmethod
    def _add(sums: defaultdict[str, float], counts: Metrics) -> None:
        for name, value in counts.items():
            sums[name] += value

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a continued run needs beside the weights of the policy."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "critic": self.critic.state_dict() if self.critic is not None else None,
            "critic_optimizer": self.critic_optimizer.state_dict() if self.critic_optimizer is not None else None,
            "kl_coef": self.kl_coef,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.critic is not None and self.critic_optimizer is not None:
            self.critic.load_state_dict(state["critic"])
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.kl_coef = state["kl_coef"]
