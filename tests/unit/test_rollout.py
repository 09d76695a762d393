"""Sampling: the same tokens as plain generate, whatever the batch; log-probabilities as the training model has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from trlhf.logprobs import pad_sequences, response_logprobs
from trlhf.models import encode_prompt, load_tokenizer
from trlhf.rollout import Sampling, sample_responses
from trlhf.types import Prompt, Rollout

PROMPTS = [
    Prompt(f"p{i}", ({"role": "user", "content": text},))
    for i, text in enumerate(["what is 2?", "what is 3 plus 2 plus 5?", "add 3 and 5", "2"])
]


@pytest.fixture(scope="module")
def loaded(tiny_model_dir: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    with torch.no_grad():  # a fresh model repeats its last token; this one minds all before it, and says EOS at times
        model.model.embed_tokens.weight *= 8
        model.model.embed_tokens.weight[model.config.eos_token_id] *= 2
        for layer in model.model.layers:
            for value in layer.parameters():
                value *= 12 if value.dim() == 2 else 1
    return model, load_tokenizer(tiny_model_dir)


def test_greedy_decoding_agrees_with_generate(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = loaded
    for batch_size in (1, 3, 16):
        found = sample_responses(model, tokenizer, PROMPTS, Sampling(0, 12, 1, batch_size), torch.Generator())
        for prompt, [rollout] in zip(PROMPTS, found, strict=True):
            ids = torch.tensor([encode_prompt(tokenizer, prompt.messages)])
            full = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
            expected = full[0, ids.shape[1] :].tolist()
            assert list(rollout.token_ids) == expected
            assert rollout.finished == (expected[-1] == tokenizer.eos_token_id)
        assert len({rollout.token_ids for [rollout] in found}) == len(PROMPTS)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_samplers_logprobs_are_the_training_models(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase], temperature: float
) -> None:
    model, tokenizer = loaded
    generator = torch.Generator().manual_seed(0)
    groups = sample_responses(model, tokenizer, PROMPTS, Sampling(temperature, 20, 4, 8), generator)
    prompts = [tuple(encode_prompt(tokenizer, p.messages)) for p in PROMPTS for _ in range(4)]
    rollouts = [r for group in groups for r in group]
    batch = pad_sequences(prompts, [r.token_ids for r in rollouts], int(tokenizer.pad_token_id))
    with torch.no_grad():
        logprobs = response_logprobs(model, batch, temperature)
    for row, rollout in enumerate(rollouts):
        assert logprobs[row, : len(rollout.token_ids)].tolist() == pytest.approx(list(rollout.logprobs), abs=1e-4)
    assert {r.finished for r in rollouts} == {True, False}  # rows that stop early were among them


def test_sampling_is_seeded_and_follows_the_distribution(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = loaded
    sampling = Sampling(1.0, 1, 2000, 2000)

    def draw(seed: int) -> list[Rollout]:
        return sample_responses(model, tokenizer, PROMPTS[:1], sampling, torch.Generator().manual_seed(seed))[0]

    first = draw(1)
    assert [r.token_ids for r in first] == [r.token_ids for r in draw(1)] != [r.token_ids for r in draw(2)]
    with torch.no_grad():
        logits = model(torch.tensor([encode_prompt(tokenizer, PROMPTS[0].messages)])).logits[0, -1]
    probabilities = logits.softmax(-1)
    top = int(probabilities.argmax())
    share = sum(r.token_ids[0] == top for r in first) / 2000
    assert share == pytest.approx(float(probabilities[top]), abs=4 * (0.25 / 2000) ** 0.5)


def test_an_unfinished_response_has_no_answer(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = loaded
    groups = sample_responses(model, tokenizer, PROMPTS, Sampling(1.0, 3, 8, 64), torch.Generator().manual_seed(0))
    assert all(r.answer is None for group in groups for r in group if not r.finished)
