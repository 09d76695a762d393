"""Padding, shared prompts and microbatches change neither log-probabilities nor gradients."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from trlhf.logprobs import pad_sequences, response_logprobs, token_entropy, token_logprobs

PROMPTS = [(5, 6, 7), (5, 6, 7), (8, 9, 10, 11, 12), (5, 6, 7)]
RESPONSES = [(20, 21, 2), (22, 2), (23, 24, 25, 26, 2), (27, 28, 2)]


@pytest.fixture(params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest, tiny_model_dir: Path) -> PreTrainedModel:
    loaded = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, dtype=torch.float64, attn_implementation=request.param
    )
    return loaded.eval()


def one_at_a_time(model: PreTrainedModel) -> list[torch.Tensor]:
    """Compute each response's log-probabilities on its own, from the plain forward pass."""
    result = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = torch.tensor([[*prompt, *response]])
        logprobs = model(input_ids=ids).logits.log_softmax(-1)
        result.append(torch.stack([logprobs[0, len(prompt) - 1 + t, token] for t, token in enumerate(response)]))
    return result


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 1, 3)])
def test_rows_and_shared_prompts_leave_logprobs_unchanged(
    model: PreTrainedModel, share: bool, order: tuple[int, ...]
) -> None:
    batch = pad_sequences([PROMPTS[i] for i in order], [RESPONSES[i] for i in order], pad_id=3, share_prompts=share)
    found = response_logprobs(model, batch)
    expected = one_at_a_time(model)
    for row, i in enumerate(order):
        assert batch.response_mask[row].sum() == len(RESPONSES[i])
        torch.testing.assert_close(found[row, : len(RESPONSES[i])].double(), expected[i], atol=1e-5, rtol=0)


def test_equal_prompts_side_by_side_share_a_row() -> None:
    batch = pad_sequences(PROMPTS, RESPONSES, pad_id=3)
    assert batch.input_ids.shape[0] == 3  # the first two share, the third is another prompt, the fourth stands apart
    assert pad_sequences(PROMPTS, RESPONSES, pad_id=3, share_prompts=False).input_ids.shape[0] == 4


@pytest.mark.parametrize("share", [True, False])
def test_gradients_are_those_of_single_rows(model: PreTrainedModel, share: bool) -> None:
    torch.cat(one_at_a_time(model)).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    batch = pad_sequences(PROMPTS, RESPONSES, pad_id=3, share_prompts=share)
    (response_logprobs(model, batch).double() * batch.response_mask).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
        torch.testing.assert_close(parameter.grad, expected[name], atol=2e-5, rtol=1e-4)


def test_rows_that_grow_too_long_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trlhf.logprobs.ROW_TOKENS", 7)
    batch = pad_sequences([(5, 6, 7)] * 3, [(20, 2), (21, 2), (22, 2)], pad_id=3)
    assert batch.input_ids.shape == (2, 7)


def test_temperature_divides_the_logits() -> None:
    logits = torch.tensor([[[2.0, 0.0]]])
    found = token_logprobs(logits, torch.tensor([[0]]), temperature=2.0)
    assert found.item() == pytest.approx(torch.tensor(1.0).sigmoid().log().item(), abs=1e-6)


def test_entropy_is_that_of_the_tempered_distribution() -> None:
    flat = token_entropy(torch.zeros(1, 1, 8))
    assert flat.item() == pytest.approx(math.log(8), abs=1e-6)
    sure = token_entropy(torch.tensor([[[100.0, 0.0]]]))
    assert sure.item() == pytest.approx(0.0, abs=1e-6)
    logits = torch.tensor([[[2.0, 0.0]]])
    torch.testing.assert_close(token_entropy(logits, temperature=2.0), token_entropy(logits / 2))


def test_gradcheck() -> None:
    """Both compute in float32: steps of 1e-2 keep rounding and curvature below 1e-3."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 4, (2, 3))
    for function in (lambda x: token_logprobs(x, tokens, 0.7), lambda x: token_entropy(x, 0.7)):
        assert torch.autograd.gradcheck(function, (logits,), eps=1e-2, atol=1e-3)


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="a prompt without tokens"):
        pad_sequences([()], [(1, 2)], pad_id=3)
    with pytest.raises(ValueError, match="one prompt a response, got 1 and 2"):
        pad_sequences([(1,)], [(1,), (2,)], pad_id=3)
