"""Without padding: log-probabilities and gradients of the padded way, for every architecture that is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import tiny
from torch import Tensor
from transformers import PreTrainedModel

from trlhf import logprobs as module
from trlhf.logprobs import pad_sequences, response_hidden, response_logprobs
from trlhf.packed_attention import SHARING, pack

PAD = 3
PROMPTS = [(5, 6, 7), (5, 6, 7), (5, 6, 7), (8, 9, 10, 11, 12), (13, 14)]
LONG = (30, 31, 32, 33, 34, 35, 36, 37, 38)  # all prompts begin with it, the second is nothing but that and a token
COMMON = [(*LONG, *prompt) for prompt in PROMPTS[:3]] + [(*LONG, 9), (*LONG, 5, 14)]
CASES: dict[str, list[tuple[int, ...]]] = {
    "several": [(20, 21, 2), (22, 2), (23, 24, 25, 26, 2), (27, 28, 2), (29, 2)],
    "of one token": [(2,), (2,), (20,), (2,), (21,)],
    "one of them empty": [(20, 21, 2), (), (22, 2), (2,), (23, 2)],
}


def read(
    model: PreTrainedModel, prompts: list[tuple[int, ...]], responses: list[tuple[int, ...]], share: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the log-probabilities and the gradients of a weighted sum of them."""
    model.zero_grad()
    batch = pad_sequences(prompts, responses, PAD, share)
    found = response_logprobs(model, batch).double()[batch.response_mask]
    (found * torch.arange(1, len(found) + 1)).sum().backward()
    return found.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", SHARING)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("prompts", [PROMPTS, COMMON], ids=["different", "alike"])
def test_values_and_gradients_are_those_of_padded_rows(
    kind: str, case: str, prompts: list[tuple[int, ...]], share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(kind).double()
    packed, gradients = read(model, prompts, CASES[case], share)
    monkeypatch.setattr(module, "plain_attention", lambda *_: False)
    padded, expected = read(model, prompts, CASES[case], share)
    torch.testing.assert_close(packed, padded, atol=2e-6, rtol=1e-6)  # log-probabilities are taken in float32
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5)
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 0.1


def test_no_padding_goes_through_the_layers_and_a_shared_prompt_goes_once() -> None:
    model = tiny("mistral")
    seen: list[tuple[int, ...]] = []
    model.model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"].shape), with_kwargs=True)
    batch = pad_sequences(PROMPTS, CASES["several"], PAD)
    response_hidden(model.model, batch)
    assert seen == [
        (1, 3 + 5 + 2 + (2 + 1 + 4 + 2 + 1))
    ]  # three prompts; the last token of a response predicts nothing
    batch = pad_sequences(COMMON, CASES["several"], PAD)
    response_hidden(model.model, batch)  # what all prompts begin with once, and the one extra token that is alike twice
    assert seen[1] == (1, len(LONG) + 3 + 1 + 2 + (2 + 1 + 4 + 2 + 1))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("prompts", [PROMPTS, COMMON], ids=["different", "alike"])
def test_every_token_predicts_the_next_one_and_sees_its_prompt_and_its_own_response(
    prompts: list[tuple[int, ...]],
) -> None:
    batch = pad_sequences(prompts, CASES["several"], PAD)
    packed = pack(batch)
    ids, common = packed.input_ids[0], packed.common
    assert common == (len(LONG) if prompts is COMMON else 0)
    for row, (prompt, response) in enumerate(zip(prompts, CASES["several"], strict=True)):
        before = (prompt[-1], *response[:-1])
        assert tuple(ids[packed.sources[row, : len(response)]].tolist()) == before
        keys = torch.cat([packed.prompts[packed.prompt_of[row]], packed.responses[row]])
        for step in range(len(response) - 1):
            visible = ids[keys[packed.visible[row, 0, step]]]
            assert tuple(visible.tolist()) == (*prompt, *response[: step + 1])
    rows = packed.prompts[0, :common], packed.prompts[:, common:].flatten(), packed.responses.flatten()
    places = torch.cat(rows)[packed.restore]
    assert places.tolist() == list(range(len(ids)))


@pytest.mark.parametrize("options", [{"sliding_window": 4}, {"attention": "flash_attention_2"}])
def test_attention_of_another_kind_is_left_to_the_model(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("mistral", sliding_window=options.get("sliding_window"))
    given: list[Any] = []

    def watched(**arguments: Any) -> Any:
        given.append(arguments)
        raise RuntimeError("seen")

    model.config._attn_implementation = options.get("attention", "sdpa")
    monkeypatch.setattr(model.model, "forward", watched)
    with pytest.raises(RuntimeError, match="seen"):
        response_hidden(model.model, pad_sequences(PROMPTS, CASES["several"], PAD, False))
    assert "packed" not in given[0] and given[0]["attention_mask"].shape == (5, 8)
