"""One rollout batch as PPO learns from it: rows of tokens, log-probabilities, advantages, values, returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trlhf.logprobs import SequenceBatch, pad_sequences
from trlhf.masks import mask_from_lengths
from trlhf.rl.experience import Group


@dataclass
class Experience:
    """One rollout batch, ready for updates. Rows are responses, those of one prompt side by side; detached.

    Attributes:
        groups: the rows of each prompt.
        prompts: the prompt's tokens for each row.
        responses: the response's tokens for each row.
        mask: [B R], True on response tokens.
        old_logprobs: [B R] of the policy before the first update, at the sampling temperature.
        reference_logprobs: [B R], likewise.
        advantages: [B R], whitened.
        old_values: [B R]; zeros without a critic.
        returns: [B R]; zeros without a critic.
    """

    groups: list[list[int]]
    prompts: list[tuple[int, ...]]
    responses: list[tuple[int, ...]]
    mask: Tensor
    old_logprobs: Tensor
    reference_logprobs: Tensor
    advantages: Tensor
    old_values: Tensor
    returns: Tensor

    def batch(self, rows: Sequence[int], pad_id: int, share_prompts: bool) -> SequenceBatch:
        """Return some rows as a batch for a forward pass."""
        batch = pad_sequences([self.prompts[i] for i in rows], [self.responses[i] for i in rows], pad_id, share_prompts)
        return batch.to(self.mask.device)

    def cut(self, rows: Sequence[int], width: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return old and reference log-probabilities, advantages, old values and returns of some rows: [b width]."""
        fields = (self.old_logprobs, self.reference_logprobs, self.advantages, self.old_values, self.returns)
        old, reference, advantages, values, returns = (field[list(rows), :width] for field in fields)
        return old, reference, advantages, values, returns

    def microbatches(self, groups: Sequence[list[int]], size: int) -> Iterator[list[int]]:
        """Yield ``size`` rows at a time, of like length, whole groups together where they fit."""
        ordered = sorted(groups, key=lambda group: sum(len(self.responses[i]) for i in group))
        rows = [row for group in ordered for row in group]
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def blank_experience(groups: Sequence[Group], device: torch.device) -> Experience:
    """Return the rows of some groups with everything that is to be computed still 0."""
    responses = [rollout.token_ids for group in groups for rollout in group.rollouts]
    lengths = [len(response) for response in responses]
    mask = mask_from_lengths(lengths, max(lengths)).to(device)
    rows, start = [], 0
    for group in groups:
        rows.append(list(range(start, start + len(group.rollouts))))
        start += len(group.rollouts)
    prompts = [group.prompt_ids for group in groups for _ in group.rollouts]
    return Experience(rows, prompts, responses, mask, *(torch.zeros(mask.shape, device=device) for _ in range(5)))
