"""Rows that share: packed demonstrations and responses behind one prompt are what single rows are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from trials import (
    ALGORITHMS,
    PAD,
    RL,
    SAMPLES,
    Named,
    copied_gradients,
    demonstrations,
    farthest,
    sampled_groups,
    sharp_model,
    some_anchors,
)

from trlhf.config import ModelConfig, build_config
from trlhf.logprobs import SequenceBatch, can_share_prompts, pad_sequences, response_logprobs
from trlhf.models import load_causal_lm, load_tokenizer
from trlhf.rl import anchors, dpo, ppo, rollout_batch
from trlhf.roles import Role
from trlhf.sft.encode import encode_demonstrations


@pytest.fixture(params=["sdpa", "eager"])
def attention(request: pytest.FixtureRequest) -> Any:
    return request.param


def packed_rows(path: Path, count: int) -> tuple[dict[str, Tensor], list[int]]:
    """Return demonstrations in one row, as SFT's collator gives it to the model, and their lengths."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from trlhf.sft.train import _dataset

    encoded, _ = encode_demonstrations(load_tokenizer(path), demonstrations(count), 1000)
    config = build_config({"model": {"max_length": 1000}, "sft": {"packing": True}})
    dataset = _dataset(encoded, config)
    batch = DataCollatorForLanguageModeling(pad_token_id=PAD, padding_free=True)(list(dataset))
    assert len(dataset) == 1 and "attention_mask" not in batch
    return batch, dataset[0]["seq_lengths"]


def summed_loss(model: PreTrainedModel, ids: Tensor, labels: Tensor, **named: Any) -> tuple[Tensor, Tensor]:
    """Return the logits and the loss, summed over tokens, of one row; the cache is off, as in the trainer."""
    logits = model(ids, use_cache=False, **named).logits[0].float()
    return logits, torch.nn.functional.cross_entropy(logits[:-1], labels[0, 1:], reduction="sum")


def read_packed(model: PreTrainedModel, batch: dict[str, Tensor], **named: Any) -> tuple[Tensor, Tensor, Named]:
    model.zero_grad()
    logits, loss = summed_loss(model, batch["input_ids"], batch["labels"], position_ids=batch["position_ids"], **named)
    loss.backward()
    return logits.detach(), loss.detach(), copied_gradients(model.named_parameters())


def read_single(model: PreTrainedModel, batch: dict[str, Tensor], lengths: list[int]) -> tuple[Tensor, Tensor, Named]:
    model.zero_grad()
    found, losses, start = [], [], 0
    for length in lengths:
        ids, labels = (batch[name][:, start : start + length] for name in ("input_ids", "labels"))
        logits, loss = summed_loss(model, ids, labels)
        loss.backward()
        found.append(logits.detach())
        losses.append(loss.detach())
        start += length
    return torch.cat(found), torch.stack(losses).sum(), copied_gradients(model.named_parameters())


def test_packed_demonstrations_are_single_ones(tiny_model_dir: Path, attention: Any) -> None:
    batch, lengths = packed_rows(tiny_model_dir, 4)
    model = sharp_model(tiny_model_dir, ModelConfig(attention=attention))
    packed, single = read_packed(model, batch), read_single(model, batch, lengths)
    leaking = read_packed(model, batch, attention_mask=torch.ones_like(batch["input_ids"]))
    torch.testing.assert_close(packed[0], single[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[1], single[1], atol=0, rtol=1e-6)
    assert farthest(packed[2], single[2]) < 1e-5
    assert (leaking[0] - single[0]).abs().max() > 0.1 and farthest(leaking[2], single[2]) > 0.01


def distances(found: tuple[Any, ...], expected: tuple[Any, ...]) -> Tensor:
    """Return by how much two readings differ: in logits (mean) and gradients (norm, as a share of the norm)."""
    apart = torch.cat([(found[2][name].float() - value).flatten() for name, value in expected[2].items()])
    whole = torch.cat([value.flatten() for value in expected[2].values()])
    return torch.stack([(found[0] - expected[0]).abs().mean(), apart.norm() / whole.norm()])


def test_in_bfloat16_packing_rounds_no_worse_than_single_rows(tiny_model_dir: Path, attention: Any) -> None:
    """Rounding alone moves both; what packing may add is measured against the distance of single rows from float32."""
    batch, lengths = packed_rows(tiny_model_dir, 4)
    exact = read_single(sharp_model(tiny_model_dir, ModelConfig(attention=attention)), batch, lengths)
    model = sharp_model(tiny_model_dir, ModelConfig(dtype="bfloat16", attention=attention))
    rounding = distances(read_single(model, batch, lengths), exact)
    packed = distances(read_packed(model, batch), exact)
    leaking = distances(read_packed(model, batch, attention_mask=torch.ones_like(batch["input_ids"])), exact)
    print(rounding, packed, leaking)
    assert (packed < 2 * rounding).all(), (packed, rounding)
    assert (leaking > 4 * rounding).all(), (leaking, rounding)


def responses_of_one_prompt() -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    (group,) = sampled_groups(1)
    return [group.prompt_ids] * SAMPLES, [rollout.token_ids for rollout in group.rollouts]


def read_responses(model: PreTrainedModel, batches: Sequence[SequenceBatch]) -> tuple[Tensor, Tensor, Named]:
    """Return log-probabilities of responses, their sum and its gradients."""
    model.zero_grad()
    found = [response_logprobs(model, batch)[batch.response_mask] for batch in batches]
    total = torch.cat(found).sum()
    total.backward()
    return torch.cat(found).detach(), total.detach(), copied_gradients(model.named_parameters())


def test_responses_that_share_a_prompt_are_single_ones(tiny_model_dir: Path, attention: Any) -> None:
    prompts, responses = responses_of_one_prompt()
    shared = pad_sequences(prompts, responses, PAD)
    assert shared.input_ids.shape[0] == 1 and shared.attention_mask.shape[1:] == (1, *shared.input_ids.shape[1:] * 2)
    alone = [pad_sequences([prompt], [response], PAD) for prompt, response in zip(prompts, responses, strict=True)]
    leaking = replace(shared, attention_mask=torch.ones_like(shared.input_ids))
    model = sharp_model(tiny_model_dir, ModelConfig(attention=attention))
    single, together, leaked = (read_responses(model, batches) for batches in (alone, [shared], [leaking]))
    torch.testing.assert_close(together[0], single[0], atol=1e-5, rtol=1e-5)
    assert farthest(together[2], single[2]) < 1e-5
    assert (leaked[0] - single[0]).abs().max() > 0.1 and farthest(leaked[2], single[2]) > 0.01
    model = sharp_model(tiny_model_dir, ModelConfig(dtype="bfloat16", attention=attention))
    rounding, packed, leaked_too = (
        distances(read_responses(model, batches), single) for batches in (alone, [shared], [leaking])
    )
    print(rounding, packed, leaked_too)
    assert (packed < 2 * rounding).all(), (packed, rounding)
    assert (leaked_too > 4 * rounding).all(), (leaked_too, rounding)


@pytest.mark.parametrize("case", ["leave_one_out", "dpo", "dpo pairs", "anchors"])
def test_flash_attention_never_sees_a_shared_row(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Its kernels know no mask but padding: they would let responses see each other, and say nothing."""

    class Shared(Exception):
        """Says whether prompts were about to share rows."""

    def watched(prompts: Any, responses: Any, pad_id: int, share_prompts: bool = True) -> SequenceBatch:
        raise Shared(share_prompts)

    for module in (rollout_batch, dpo, anchors):
        monkeypatch.setattr(module, "pad_sequences", watched)
    for kind in ("sdpa", "flash_attention_2"):
        reference, policy = (Role(load_causal_lm(tiny_model_dir, ModelConfig())) for _ in range(2))
        policy.model.config._attn_implementation = kind
        assert can_share_prompts(policy.model) == (kind == "sdpa")
        groups = sampled_groups(2)
        with pytest.raises(Shared, match=str(kind == "sdpa")):
            if case == "anchors":
                anchors.anchor_loss(policy, reference, some_anchors(2), PAD, 1.0)
            elif case == "leave_one_out":
                ppo.PpoLearner(policy, reference, None, RL, PAD).update(groups, (), random.Random(0), 1.0)
            else:
                learner = dpo.DpoLearner(policy, reference, ALGORITHMS["dpo"], PAD)
                if case == "dpo":
                    learner.update(groups, (), random.Random(0), 1.0)
                learner._loss(dpo.build_pairs(groups, 1, random.Random(0)), 1.0)
