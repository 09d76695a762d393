"""Anchors: prompts on which the policy must stay what it was, with the reference's own responses."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trlhf.knowledge import Knowledge
from trlhf.logprobs import can_share_prompts, pad_sequences, response_hidden
from trlhf.losses.ppo import full_kl_loss
from trlhf.roles import Role
from trlhf.targeting.choose import Candidate
from trlhf.vocabulary import over_vocabulary

MASTERED_SHARE = 0.85


@dataclass(frozen=True)
class Anchor:
    """A prompt and a typical response of the reference.

    Attributes:
        prompt_id: the prompt.
        prompt_ids: its tokens.
        response_ids: the response's tokens.
        answer: the response's answer; None where it has none.
    """

    prompt_id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    answer: str | None


def find_anchors(candidates: Sequence[Candidate], prompt_ids: Sequence[Sequence[int]]) -> list[Anchor]:
    """Return an anchor for every prompt that needs no thinking, and for every one whose samples nearly all agree.

    Args:
        candidates: prompts with samples of the *reference* policy.
        prompt_ids: their tokens.
    """
    anchors = []
    for candidate, ids in zip(candidates, prompt_ids, strict=True):
        finished = [r for r in candidate.rollouts if r.finished]
        if not finished:
            continue
        if candidate.prompt.reasoning:
            answers = [r.answer for r in finished if r.answer is not None]
            top = max(set(answers), key=lambda a: (answers.count(a), a)) if answers else None
            if top is None or answers.count(top) < MASTERED_SHARE * len(candidate.rollouts):
                continue
            finished = [r for r in finished if r.answer == top]
        typical = finished[0]
        anchors.append(Anchor(candidate.prompt.id, tuple(ids), typical.token_ids, typical.answer))
    return anchors


def still_trusted(anchors: Sequence[Anchor], knowledge: Knowledge) -> list[Anchor]:
    """Return the anchors without those whose answer labels have found wrong: agreement is no proof of mastery."""
    return [
        anchor
        for anchor in anchors
        if anchor.answer is None or knowledge.known(anchor.prompt_id, anchor.answer) is not False
    ]


def release(anchors: Sequence[Anchor], learned: Container[str]) -> list[Anchor]:
    """Return the anchors without those on prompts that are to be learned: what is to change is not held still."""
    return [anchor for anchor in anchors if anchor.prompt_id not in learned]


def anchor_loss(policy: Role, reference: Role, anchors: Sequence[Anchor], pad_id: int, denominator: float) -> Tensor:
    """Compute the sum over anchor tokens of KL(reference ‖ policy), over the whole vocabulary, over ``denominator``.

    Args:
        policy: gets the gradient.
        reference: gets none.
        anchors: at least one.
        pad_id: token to pad with.
        denominator: number of response tokens of all anchors of the optimizer step, over all ranks.
    """
    prompts, responses = [a.prompt_ids for a in anchors], [a.response_ids for a in anchors]
    batch = pad_sequences(prompts, responses, pad_id, can_share_prompts(policy.model)).to(policy.device)
    mask = batch.response_mask
    with torch.no_grad(), reference.acting() as model:
        reference_hidden = response_hidden(model.base_model, batch)[mask]

    def divergence(logits: Tensor, place: slice) -> Tensor:
        with torch.no_grad(), reference.acting() as model:
            head: Any = model.get_output_embeddings()
            reference_logits = head(reference_hidden[place])
        every = torch.ones_like(logits[:, 0], dtype=torch.bool)
        return full_kl_loss(logits[None], reference_logits[None], every[None], denominator)

    with policy.acting() as model:
        found = over_vocabulary(model, response_hidden(model.base_model, batch)[mask], divergence)
    return torch.stack(found).sum()


def hold(
    policy: Role, reference: Role, anchors: Sequence[Anchor], pad_id: int, denominator: float, coef: float
) -> float:
    """Add the gradient of ``coef`` times `anchor_loss`, and return that loss."""
    with policy.acting():
        loss = anchor_loss(policy, reference, anchors, pad_id, denominator)
        (coef * loss).backward()
    return float(loss.detach())


def anchor_tokens(anchors: Sequence[Anchor]) -> float:
    """Return the number of response tokens of some anchors."""
    return float(sum(len(anchor.response_ids) for anchor in anchors))
