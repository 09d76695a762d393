"""What holds the anchors still: their KL penalty, and the coefficient that follows a target."""

from __future__ import annotations

import random
from collections.abc import Sequence

from trlhf.config import RlConfig
from trlhf.distributed import share
from trlhf.losses.ppo import adapted_kl_coef
from trlhf.rl.anchors import Anchor, anchor_tokens, hold
from trlhf.roles import Role
from trlhf.sharding import passes


class AnchorHold:
    """A penalty of ``coef`` times KL(reference ‖ policy) on a few anchors a step, the same for every algorithm.

    With ``rl.anchor_kl_target`` the coefficient follows a controller of its own, apart from that of the KL on what is
    trained on: β ← β·(1 + clip(KL/target - 1, ±0.2)·n/H) after every rollout batch, n the anchors' responses that the
    KL was measured on (Ziegler et al. 2019, sec. 2.2, https://arxiv.org/abs/1909.08593).

    Args:
        policy: gets the gradient.
        reference: gets none.
        config: the rl section.
        pad_id: token to pad with.
    """

    def __init__(self, policy: Role, reference: Role, config: RlConfig, pad_id: int) -> None:
        self.policy, self.reference, self.config, self.pad_id = policy, reference, config, pad_id
        self.coef = config.anchor_coef

    def draw(self, anchors: Sequence[Anchor], rng: random.Random) -> list[Anchor]:
        """Draw the anchors of an optimizer step."""
        return rng.sample(anchors, min(self.config.anchor_prompts, len(anchors)))

    def add_gradient(self, anchors: Sequence[Anchor]) -> dict[str, float]:
        """Add the gradient of this rank's share of a step's anchors.

        Returns:
            ``anchor_kl``, the share's part of the mean over all their tokens, in nats; nothing where none are held.
        """
        if not anchors or not self.coef:
            return {}
        held, size = share(anchors), self.config.microbatch_size
        parts = [held[start : start + size] for start in range(0, len(held), size)]
        found = [
            weight * hold(self.policy, self.reference, part, self.pad_id, anchor_tokens(anchors), weight * self.coef)
            for part, weight in passes(self.policy.model, parts, filler=anchors[:1])
        ]
        return {"anchor_kl": sum(found)} if held else {}

    def adapt(self, kl: float | None, responses: int) -> None:
        """Let the coefficient follow its target, if there is one.

        Args:
            kl: mean over the update's optimizer steps, nats per token; None where no anchor was looked at.
            responses: n, of anchors, in these steps together.
        """
        config = self.config
        if config.anchor_kl_target is not None and kl is not None:
            self.coef = adapted_kl_coef(self.coef, kl, config.anchor_kl_target, responses, config.anchor_kl_horizon)
