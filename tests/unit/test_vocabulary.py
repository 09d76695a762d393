"""Logits in parts: the values and gradients of all at once, and never more of them than allowed."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny
from torch import Tensor

from trlhf import vocabulary
from trlhf.logprobs import measured_logprobs, pad_sequences, response_logprobs
from trlhf.rl.anchors import Anchor, anchor_loss
from trlhf.roles import Role
from trlhf.vocabulary import over_vocabulary, spread

PROMPTS, RESPONSES = [(5, 6, 7), (8, 9)], [(20, 21, 2), (22, 23, 24, 25, 2)]  # 8 tokens to predict


def in_parts(monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", positions * 40 + 39)  # 40 words


@pytest.mark.parametrize("positions", [1, 3, 4, 7])
def test_parts_give_the_values_and_gradients_of_the_whole(monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    model, batch = tiny("mistral"), pad_sequences(PROMPTS, RESPONSES, 3)
    found = []
    for size in (8, positions):
        in_parts(monkeypatch, size)
        model.zero_grad()
        logprobs = response_logprobs(model, batch, 0.7)
        logprobs.sum().backward()
        found.append((logprobs.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        found[-1] += (measured_logprobs(model, batch, 0.7),)
    (whole, gradients, measured), (parts, theirs, also) = found
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(also[0], whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(also[1], measured[1], atol=1e-6, rtol=0)
    for one, other in zip(theirs, gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert measured[1][batch.response_mask].min() > 0.1 and (whole[~batch.response_mask] == 0).all()


@pytest.mark.parametrize("positions", [3, 8])
def test_no_more_logits_than_allowed_forwards_or_backwards(monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    model, batch = tiny("mistral"), pad_sequences(PROMPTS, RESPONSES, 3)
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, logits: sizes.append(logits.numel()))
    in_parts(monkeypatch, positions)
    response_logprobs(model, batch).sum().backward()
    parts = [120, 120, 80] if positions == 3 else [320]
    assert sorted(sizes) == sorted(parts * (2 if positions == 3 else 1))  # a part is computed again, the whole is not


def test_gradcheck_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 2)
    model = tiny("mistral").double()
    torch.manual_seed(0)
    hidden = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([4, 9, 17, 2, 39])

    def logprobs(states: Tensor) -> Tensor:
        parts = over_vocabulary(model, states, lambda x, place: x.log_softmax(-1)[range(len(x)), tokens[place]])
        assert len(parts) == 3
        return torch.cat(parts)

    assert torch.autograd.gradcheck(logprobs, (hidden,))


def test_the_anchors_kl_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, policy = Role(tiny("mistral")).frozen(), Role(tiny("mistral"))
    torch.manual_seed(1)
    with torch.no_grad():
        for value in policy.model.parameters():
            value += 0.05 * torch.randn_like(value)
    held = [Anchor(str(n), p, r, None) for n, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True))]
    found = []
    for size in (8, 3):
        in_parts(monkeypatch, size)
        policy.model.zero_grad()
        loss = anchor_loss(policy, reference, held, 3, 8.0)
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in policy.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-6, rtol=0)
    for one, other in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert found[0][0] > 1e-3 and all(p.grad is None for p in reference.model.parameters())


def test_values_are_spread_over_their_places() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert spread(torch.tensor([1.0, 2.0, 3.0]), mask).tolist() == [[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]]
