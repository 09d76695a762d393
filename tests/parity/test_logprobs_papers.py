"""Log-probabilities and entropy against loops; the layout of shared rows against what it must mean."""

from __future__ import annotations

import math

import pytest
import torch

from trlhf.logprobs import SequenceBatch, pad_sequences, token_entropy, token_logprobs

PAD = 3
PROMPTS = [(5, 6, 7), (5, 6, 7), (5, 6, 7), (8,), (5, 6, 7), (9, 10, 11, 12), (9, 10, 11, 12)]
RESPONSES = [(20, 21, 2), (2,), (), (23, 24, 25, 26, 2), (27, 28), (30, 31), (30, 32, 2)]


def log_softmax(row: list[float], temperature: float) -> list[float]:
    scaled = [x / temperature for x in row]
    total = math.log(sum(math.exp(x) for x in scaled))
    return [x - total for x in scaled]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_token_logprobs_and_entropy(temperature: float) -> None:
    """log softmax(z/T) at the token, and -Σ p log p, position by position."""
    torch.manual_seed(0)
    logits, tokens = torch.randn(3, 4, 6, dtype=torch.float64), torch.randint(0, 6, (3, 4))
    found, entropy = token_logprobs(logits, tokens, temperature), token_entropy(logits, temperature)
    for i in range(3):
        for t in range(4):
            row = log_softmax(logits[i, t].tolist(), temperature)
            assert found[i, t].item() == pytest.approx(row[int(tokens[i, t])], abs=1e-6)  # computed in float32
            assert entropy[i, t].item() == pytest.approx(-sum(math.exp(x) * x for x in row), abs=1e-6)


def test_half_precision_logits_are_raised_before_anything_is_computed() -> None:
    torch.manual_seed(1)
    logits, tokens = (4 * torch.randn(2, 3, 50)).bfloat16(), torch.randint(0, 50, (2, 3))
    found, entropy = token_logprobs(logits, tokens), token_entropy(logits)
    for i in range(2):
        for t in range(3):
            row = log_softmax(logits[i, t].tolist(), 1.0)
            assert found[i, t].item() == pytest.approx(row[int(tokens[i, t])], abs=5e-6)
            assert entropy[i, t].item() == pytest.approx(-sum(math.exp(x) * x for x in row), abs=5e-6)


def visible(batch: SequenceBatch, row: int, column: int) -> list[tuple[int, int]]:
    """Return (position, token) of everything that a column sees under the causal and the batch's own mask."""
    if batch.attention_mask.dim() == 2:
        columns = [c for c in range(column + 1) if batch.attention_mask[row, c]]
    else:
        columns = [c for c in range(batch.input_ids.shape[1]) if batch.attention_mask[row, 0, column, c]]
        assert max(columns) <= column
    return [(int(batch.position_ids[row, c]), int(batch.input_ids[row, c])) for c in columns]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("limit", [512, 7, 6])
def test_what_predicts_a_token_sees_the_prompt_and_the_response_before_it(
    share: bool, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """p(y_t | x, y_<t): the source of y_t sees x and y_<t, at positions 0, 1, 2, …, and nothing else."""
    monkeypatch.setattr("trlhf.logprobs.ROW_TOKENS", limit)
    batch = pad_sequences(PROMPTS, RESPONSES, PAD, share_prompts=share)
    width = batch.input_ids.shape[1]
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        padding = batch.response_ids.shape[1] - len(response)
        assert batch.response_ids[i].tolist() == [*response] + [PAD] * padding
        assert batch.response_mask[i].tolist() == [True] * len(response) + [False] * padding
        for t in range(len(response)):
            source = int(batch.sources[i, t])
            context = [*prompt, *response[:t]]
            assert visible(batch, source // width, source % width) == list(enumerate(context))


def test_rows_are_shared_by_neighbours_with_equal_prompts_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = pad_sequences(PROMPTS, RESPONSES, PAD)
    assert shared.input_ids.tolist() == [
        [5, 6, 7, 20, 21, 2, 2, 3, 3],
        [8, 23, 24, 25, 26, 2, 3, 3, 3],
        [5, 6, 7, 27, 28, 3, 3, 3, 3],
        [9, 10, 11, 12, 30, 31, 30, 32, 2],
    ]
    monkeypatch.setattr("trlhf.logprobs.ROW_TOKENS", 9)  # just enough
    assert pad_sequences(PROMPTS, RESPONSES, PAD).input_ids.tolist() == shared.input_ids.tolist()
    monkeypatch.setattr("trlhf.logprobs.ROW_TOKENS", 8)
    assert pad_sequences(PROMPTS, RESPONSES, PAD).input_ids.shape == (5, 7)
    assert pad_sequences(PROMPTS, RESPONSES, PAD, share_prompts=False).attention_mask.shape == (7, 7)


def test_padding_is_masked_and_points_inside() -> None:
    batch = pad_sequences(PROMPTS, RESPONSES, PAD, share_prompts=False)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        length = len(prompt) + len(response)
        assert batch.attention_mask[row].tolist() == [1] * length + [0] * (7 - length)
        assert batch.input_ids[row, length:].tolist() == [PAD] * (7 - length)
    assert int(batch.sources.min()) >= 0 and int(batch.sources.max()) < batch.input_ids.numel()
    empty = pad_sequences([(5, 6)], [()], PAD)
    assert empty.response_mask.tolist() == [[False]] and empty.sources.shape == (1, 1)
