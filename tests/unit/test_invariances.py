"""What must not matter: microbatches, padding, order, neighbours, packing, the batch size of scoring."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trials import (
    ALGORITHMS,
    EOS,
    LAYOUTS,
    LORA,
    PAD,
    RL,
    SAMPLES,
    Named,
    Trial,
    copied_gradients,
    demonstrations,
    farthest,
    fit_reward,
    labels,
    sampled_groups,
    sft_steps,
    sharp_model,
    some_anchors,
    stir,
)

from trlhf.config import ModelConfig, RlConfig, build_config
from trlhf.labelling import Archive
from trlhf.logprobs import SequenceBatch, can_share_prompts, pad_sequences, response_logprobs
from trlhf.models import encode_prompt, load_causal_lm, load_tokenizer
from trlhf.reward import features, finetune
from trlhf.reward.features import Batch
from trlhf.rl import anchors, dpo, ppo, rollout_batch
from trlhf.rl.rollout_batch import Experience, blank_experience
from trlhf.rl.train import train_rl
from trlhf.roles import Role, Roles, SharedBase
from trlhf.rollout import Sampling, sample_responses
from trlhf.run import RunDirectory
from trlhf.sft.encode import encode_demonstrations
from trlhf.types import Prompt, Rollout

# peft asks transformers by a name that transformers has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
MICROBATCHES = (8, 4, 2, 1)  # of a step of 8
PADDING = (0, 7, 64)
GROUPS = {"leave_one_out": 2, "gae": 2, "dpo": 4}  # what makes a step of 8 responses, or of 8 pairs
LENGTHS = "what is 2?", "what is 3 plus 2 plus 5?", "add 3 and 5", "2"
PROMPTS = [Prompt(f"p{i}", ({"role": "user", "content": text},)) for i, text in enumerate(LENGTHS)]


@pytest.fixture(params=list(ALGORITHMS))
def algorithm(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["sdpa", "eager"])
def attention(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def sampler(tiny_model_dir: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model whose next token depends on all before it, and that says EOS now and then."""
    model: Any = sharp_model(tiny_model_dir, layers=12)
    with torch.no_grad():
        model.model.embed_tokens.weight[EOS] *= 2
    return model, load_tokenizer(tiny_model_dir)


# ---- microbatches ----


def test_microbatches_change_no_gradient(tiny_model_dir: Path, algorithm: str, layout: str) -> None:
    groups, held = sampled_groups(GROUPS[algorithm]), some_anchors(3)
    found = []
    for size in MICROBATCHES:
        rows = 2 * size if algorithm == "dpo" else size  # a pair is two rows
        trial = Trial(tiny_model_dir, replace(ALGORITHMS[algorithm], microbatch_size=rows), layout)
        metrics = trial.update(groups, held)
        found.append((trial.gradients(), metrics))
    first, expected = found[0]
    assert {name.split(".")[0] for name in first} == {"policy", "critic"} if algorithm == "gae" else {"policy"}
    for gradients, metrics in found[1:]:
        for role in ("policy", "critic") if algorithm == "gae" else ("policy",):  # the critic's are much larger
            mine, theirs = ({k: v for k, v in one.items() if k.startswith(role)} for one in (gradients, first))
            assert farthest(mine, theirs) < 1e-5
        assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_sft_microbatches_change_no_gradient(tiny_model_dir: Path, tmp_path: Path, lora: bool, packing: bool) -> None:
    found: list[Named] = []
    for size in MICROBATCHES:
        sft = {"microbatch_size": size, "packing": packing}
        model = {"lora": {"enabled": lora, "r": 4}}
        steps = sft_steps(tiny_model_dir, tmp_path / str(size), demonstrations(), sft=sft, model=model)
        assert len(steps) == 1
        found += steps
    assert all(farthest(one, found[0]) < 1e-5 for one in found[1:])


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_reward_microbatches_change_no_gradient(tiny_model_dir: Path, kind: str) -> None:
    fits = [fit_reward(tiny_model_dir, labels(), finetune=kind, microbatch_size=size) for size in MICROBATCHES]
    assert [len(one.gradients) for one in fits] == [1] * 4
    for one in fits[1:]:
        assert farthest(one.gradients[0], fits[0].gradients[0]) < 1e-5
        assert one.metrics[0] == pytest.approx(fits[0].metrics[0], rel=1e-5)


# ---- padding ----


def widened(batch: SequenceBatch, extra: int) -> SequenceBatch:
    """Add columns on the right of tokens and of responses; what stands in them is EOS, not the pad token."""
    width = batch.input_ids.shape[1]
    mask = batch.attention_mask
    if mask.dim() == 2:
        mask = pad(mask, (0, extra))
    else:
        mask = pad(mask, (0, extra, 0, extra))
        new = torch.arange(width, width + extra)
        mask[:, :, new, new] = True  # as padding attends to itself
    sources = batch.sources // width * (width + extra) + batch.sources % width
    return SequenceBatch(
        pad(batch.input_ids, (0, extra), value=EOS),
        pad(batch.position_ids, (0, extra)),
        mask,
        pad(sources, (0, extra)),
        pad(batch.response_ids, (0, extra), value=EOS),
        pad(batch.response_mask, (0, extra)),
    )


def with_padding(monkeypatch: pytest.MonkeyPatch, extra: int) -> None:
    """Let both learners, the anchors and the reward model see so many more columns."""

    def wider_sequences(*arguments: Any, **named: Any) -> SequenceBatch:
        return widened(pad_sequences(*arguments, **named), extra)

    def wider_experience(groups: Any, device: torch.device) -> Experience:
        found = blank_experience(groups, device)
        for name in ("mask", "old_logprobs", "reference_logprobs", "advantages", "old_values", "returns"):
            setattr(found, name, pad(getattr(found, name), (0, extra)))
        return found

    def wider_samples(*arguments: Any) -> Batch:
        batch = features.collate(*arguments)
        ids = pad(batch.input_ids, (0, extra), value=EOS)
        return Batch(ids, pad(batch.attention_mask, (0, extra)), batch.prompt_lengths)

    for module in (rollout_batch, dpo, anchors):
        monkeypatch.setattr(module, "pad_sequences", wider_sequences)
    monkeypatch.setattr(ppo, "blank_experience", wider_experience)
    monkeypatch.setattr(finetune, "collate", wider_samples)


def test_padding_changes_neither_metrics_nor_gradient(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, layout: str
) -> None:
    groups, held = sampled_groups(GROUPS[algorithm]), some_anchors(3)
    found = []
    for extra in PADDING:
        with monkeypatch.context() as patch:
            with_padding(patch, extra)
            trial = Trial(tiny_model_dir, ALGORITHMS[algorithm], layout)
            metrics = trial.update(groups, held)
            found.append((trial.gradients(), metrics))
    for gradients, metrics in found[1:]:
        for role in {name.split(".")[0] for name in gradients}:
            mine, theirs = ({k: v for k, v in one.items() if k.startswith(role)} for one in (gradients, found[0][0]))
            assert farthest(mine, theirs) < 1e-6
        assert metrics == pytest.approx(found[0][1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("share", [True, False])
def test_padding_changes_neither_logprobs_nor_values(tiny_model_dir: Path, attention: Any, share: bool) -> None:
    trial = Trial(tiny_model_dir, ALGORITHMS["gae"], model=ModelConfig(attention=attention))
    (group,) = sampled_groups(1)
    ids = [rollout.token_ids for rollout in group.rollouts]
    batch = pad_sequences([group.prompt_ids] * len(ids), ids, PAD, share)
    assert trial.critic is not None and batch.attention_mask.dim() == (4 if share else 2)
    with torch.no_grad():
        for read in (lambda x: response_logprobs(trial.policy.model, x), trial.critic):
            narrow = read(batch)[batch.response_mask]
            for extra in PADDING[1:]:
                wide = widened(batch, extra)
                torch.testing.assert_close(read(wide)[wide.response_mask], narrow, atol=1e-5, rtol=0)
            assert narrow.abs().max() > 0.1


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_padding_changes_no_gradient_of_the_reward_model(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    found = []
    for extra in PADDING:
        with monkeypatch.context() as patch:
            with_padding(patch, extra)
            found.append(fit_reward(tiny_model_dir, labels(), finetune=kind))
    for one in found[1:]:
        assert farthest(one.gradients[0], found[0].gradients[0]) < 1e-6
        assert one.metrics[0] == pytest.approx(found[0].metrics[0], rel=1e-5)


def beside(tokenizer: PreTrainedTokenizerBase, extra: int) -> list[Prompt]:
    """Return a prompt so many tokens longer than the longest of `PROMPTS`, or none."""
    if not extra:
        return []
    longest = max(len(encode_prompt(tokenizer, prompt.messages)) for prompt in PROMPTS)
    empty = len(encode_prompt(tokenizer, [{"role": "user", "content": ""}]))
    for digits in range(longest + extra - empty - 5, longest + extra):
        prompt = Prompt("long", ({"role": "user", "content": "7" * digits},))
        if len(encode_prompt(tokenizer, prompt.messages)) == longest + extra:
            return [prompt]
    raise AssertionError("a digit is a token")


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_padding_on_the_left_changes_no_rollout(
    sampler: tuple[PreTrainedModel, PreTrainedTokenizerBase], temperature: float
) -> None:
    """Greedy tokens stay; the log-probabilities are, at any temperature, those of the response alone."""
    model, tokenizer = sampler
    greedy: list[list[tuple[int, ...]]] = []
    for extra in PADDING:
        drawn = sample_responses(
            model, tokenizer, PROMPTS + beside(tokenizer, extra), Sampling(temperature, 12, 2, 64), torch.Generator()
        )[: len(PROMPTS)]
        for prompt, rollouts in zip(PROMPTS, drawn, strict=True):
            ids = encode_prompt(tokenizer, prompt.messages)
            for found in rollouts:
                with torch.no_grad():
                    alone = response_logprobs(model, pad_sequences([ids], [found.token_ids], PAD), temperature or 1.0)
                torch.testing.assert_close(torch.tensor([found.logprobs]), alone, atol=1e-5, rtol=0)
        greedy.append([found.token_ids for rollouts in drawn for found in rollouts])
    assert len({len(ids) for ids in greedy[0]}) > 1, "some have to end early"
    if temperature == 0:
        assert greedy[1:] == greedy[:1] * 2


def test_prompts_are_padded_on_the_left_and_their_positions_start_at_zero(
    sampler: tuple[PreTrainedModel, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = sampler
    calls: list[dict[str, Any]] = []
    forward = type(model).forward

    def watched(self: Any, **arguments: Any) -> Any:
        calls.append({name: arguments[name].clone() for name in ("input_ids", "attention_mask", "position_ids")})
        return forward(self, **arguments)

    monkeypatch.setattr(type(model), "forward", watched)
    sample_responses(model, tokenizer, PROMPTS, Sampling(0, 3, 1, 64), torch.Generator())
    lengths = sorted(len(encode_prompt(tokenizer, prompt.messages)) for prompt in PROMPTS)
    assert len(set(lengths)) > 1 and len(calls) == 3
    for row, length in enumerate(lengths):
        blank = lengths[-1] - length
        first = {name: value[row].tolist() for name, value in calls[0].items()}
        assert first["attention_mask"] == [0] * blank + [1] * length
        assert first["input_ids"][:blank] == [PAD] * blank and PAD not in first["input_ids"][blank:]
        assert first["position_ids"][blank:] == list(range(length))
    assert calls[1]["position_ids"].flatten().tolist() == lengths  # nobody has ended yet


def test_a_response_ends_at_its_first_eos_and_that_is_its_last_token_in_every_loss(
    sampler: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = sampler
    drawn = sample_responses(model, tokenizer, PROMPTS, Sampling(1.0, 20, 8, 64), torch.Generator().manual_seed(0))
    ids = [found.token_ids for rollouts in drawn for found in rollouts]
    assert all(EOS not in tokens[:-1] for tokens in ids)
    finished = [found.finished for rollouts in drawn for found in rollouts]
    assert [tokens[-1] == EOS for tokens in ids] == finished and set(finished) == {True, False}
    batch = pad_sequences([(1, 5)] * len(ids), ids, PAD)
    assert batch.response_mask.sum(1).tolist() == [len(tokens) for tokens in ids]
    counted = [tuple(row[mask].tolist()) for row, mask in zip(batch.response_ids, batch.response_mask, strict=True)]
    assert counted == ids


# ---- order and neighbours ----


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_the_order_of_groups_pairs_and_rows_changes_no_gradient(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, layout: str, order: tuple[int, ...]
) -> None:
    groups, held = sampled_groups(4), some_anchors(3)
    config = replace(ALGORITHMS[algorithm], minibatch_size=16)
    pairs = dpo.build_pairs(groups, 1, random.Random(0))
    found = []
    for places in ((0, 1, 2, 3), order):
        trial = Trial(tiny_model_dir, config, layout)
        monkeypatch.setattr(dpo, "build_pairs", lambda *_, places=places: [pairs[i] for i in places])
        moved = []
        for group in (groups[i] for i in places):  # the rows of every group too
            rollouts, rewards = ([values[i] for i in places] for values in (group.rollouts, group.rewards))
            moved.append(replace(group, rollouts=tuple(rollouts), rewards=tuple(rewards)))
        trial.update(moved, [held[i] for i in places if i < 3])
        found.append(trial.gradients())
    for role in {name.split(".")[0] for name in found[0]}:
        mine, theirs = ({k: v for k, v in one.items() if k.startswith(role)} for one in found)
        assert farthest(mine, theirs) < 1e-6


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_order_of_labels_changes_no_gradient_of_the_reward_model(tiny_model_dir: Path, kind: Any) -> None:
    found = []
    for order in (torch.arange(8), torch.tensor([7, 2, 5, 0, 6, 4, 1, 3])):
        fitted = fit_reward(tiny_model_dir, labels(), finetune=kind, order=order)
        found.append(fitted.gradients[0])
    assert farthest(found[1], found[0]) < 1e-6


def test_the_order_of_demonstrations_changes_no_gradient(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = demonstrations()
    found = [
        sft_steps(tiny_model_dir, tmp_path / name, chosen, sft={"microbatch_size": 4})[0]
        for name, chosen in (("forwards", rows), ("backwards", rows[::-1]))
    ]
    assert farthest(found[1], found[0]) < 1e-6


def test_a_greedy_rollout_does_not_depend_on_its_neighbours(
    sampler: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = sampler

    def draw(prompts: Sequence[Prompt], batch_size: int) -> dict[str, Rollout]:
        found = sample_responses(model, tokenizer, prompts, Sampling(0, 12, 1, batch_size), torch.Generator())
        return {one.prompt_id: one for (one,) in found}

    together = draw(PROMPTS, 64)
    for company in (draw(PROMPTS[::-1], 64), draw(PROMPTS, 1), draw(PROMPTS, 3), draw(PROMPTS[2:] + PROMPTS[:1], 2)):
        for name, one in company.items():
            assert one.token_ids == together[name].token_ids
            assert one.logprobs == pytest.approx(together[name].logprobs, abs=1e-5)
    assert len({one.token_ids for one in together.values()}) == len(PROMPTS)


def test_a_score_does_not_depend_on_the_batch_size(tiny_model_dir: Path) -> None:
    responses, pairs = labels()
    model = fit_reward(tiny_model_dir, (responses, pairs), finetune="full").model
    prompts, texts = [label.prompt for label in responses], [label.response for label in responses]
    expected = model.logits(prompts, texts, batch_size=64)
    for size in (1, 2, 5):
        torch.testing.assert_close(model.logits(prompts, texts, batch_size=size), expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.1


# ---- packed against single ----


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


# ---- what the optimizer and the models are set to ----


def test_both_optimizers_have_the_eps_and_the_scaled_rate(tiny_model_dir: Path) -> None:
    learner = Trial(tiny_model_dir, ALGORITHMS["gae"]).learner
    assert RlConfig().adam_eps == 1e-5 and isinstance(learner, ppo.PpoLearner) and learner.critic_optimizer
    learner.update(sampled_groups(2), (), random.Random(0), 0.25)
    for optimizer, peak in ((learner.optimizer, 1e-3), (learner.critic_optimizer, 1e-3)):
        (group,) = optimizer.adamw.param_groups
        assert (group["eps"], group["lr"], group["weight_decay"]) == (1e-5, 0.25 * peak, 0.0)


def test_the_reward_models_rate_warms_up_and_falls_to_zero(tiny_model_dir: Path) -> None:
    parameter = {"heads.weight": torch.nn.Parameter(torch.zeros(1))}
    settings = finetune.FitSettings(epochs=5.0, learning_rate=1.0, batch_size=4)
    optimizer, schedule = finetune._optimizer(parameter, settings, 16)  # 20 steps, 2 of them warm up
    rates = []
    for _ in range(21):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.5, 1.0, *(k / 19 for k in range(18, -1, -1))])


def test_the_rates_of_rl_warm_up_and_fall_to_zero_over_the_stage(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over all rounds together; a step's rate is that of its beginning, so the last is one step's share above 0."""
    from trlhf.rl.round import RlInputs, Round

    policy, scales = Role(load_causal_lm(tiny_model_dir, ModelConfig())), []

    class Learner:
        def update(self, _groups: Any, _anchors: Any, _rng: Any, scale: float, _warmup: bool) -> dict[str, float]:
            scales.append(scale)
            return {"reward": 0.0, "kl_per_response": 0.0}

        def state_dict(self) -> dict[str, Any]:
            return {}

    monkeypatch.setattr(
        Round, "buy_labels", lambda self: self.stage.write_json(f"round_{self.state.round:02d}.json", {})
    )
    monkeypatch.setattr(Round, "prepare", lambda self: None)
    monkeypatch.setattr(Round, "sample_groups", lambda self: [])
    monkeypatch.setattr("trlhf.rl.train._learner", lambda *_: Learner())
    none = SimpleNamespace(verifiable_prompts=list)
    ledger: Any = SimpleNamespace(labels=list, knowledge=lambda: none, budget=1, spent=0.0, remaining=1.0)
    missing: Any = None
    inputs = RlInputs([], tiny_model_dir, Roles(policy, policy, None, None), ledger, missing, Archive([]), missing)
    config = build_config({"rl": {"rounds": 2, "steps_per_round": 4, "warmup_ratio": 0.25}})
    train_rl(config, RunDirectory(tmp_path).stage("rl"), inputs)
    assert scales == pytest.approx([0.5, *(1 - step / 8 for step in range(1, 8))])


def noisy(path: Path, tmp_path: Path) -> Path:
    """Return a model whose configuration asks for dropout in attention."""
    config = json.loads((path / "config.json").read_text())
    shutil.copytree(path, tmp_path / "noisy")
    (tmp_path / "noisy" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    return tmp_path / "noisy"


def test_dropout_is_off_in_all_four_models(tiny_model_dir: Path, tmp_path: Path, layout: str) -> None:
    path = noisy(tiny_model_dir, tmp_path)
    model = ModelConfig(lora=replace(LORA, dropout=0.5, enabled=layout == "adapters"))
    trial = Trial(path, ALGORITHMS["gae"], layout, model)
    assert trial.critic is not None and trial.policy.model.config.attention_dropout == 0.5
    (group,) = sampled_groups(1)
    batch = pad_sequences([group.prompt_ids] * SAMPLES, [rollout.token_ids for rollout in group.rollouts], PAD)

    def read() -> list[Tensor]:
        assert trial.critic is not None
        with torch.no_grad(), trial.policy.acting() as policy:
            found = [response_logprobs(policy, batch)]
            with trial.reference.acting() as reference:
                return [*found, response_logprobs(reference, batch), trial.critic(batch)]

    for first, second in zip(read(), read(), strict=True):
        assert torch.equal(first, second)
    for role in (trial.policy, trial.reference, trial.critic.role):
        assert not any(module.training for module in role.model.modules())
    trial.update([group, *sampled_groups(1, seed=1)])
    assert trial.update([group])["first_ratio"] == pytest.approx(1, abs=1e-5)
    assert not any(module.training for module in trial.policy.model.modules())


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_dropout_is_off_in_the_reward_model_while_it_learns(tiny_model_dir: Path, tmp_path: Path, kind: str) -> None:
    path = noisy(tiny_model_dir, tmp_path)
    model = ModelConfig(lora=replace(LORA, dropout=0.5))
    settings = {"finetune": kind, "model": model, "epochs": 3.0}
    fits = []
    for seed in (0, 1):  # of whatever draws without being told to
        torch.manual_seed(seed)
        fits.append(fit_reward(path, labels(), **settings))
    first, second = (one.gradients for one in fits)
    assert all(farthest(a, b) == 0 for a, b in zip(first, second, strict=True))
    assert not any(module.training for module in fits[0].model.backbone.modules())


def test_an_adapter_from_a_folder_brings_no_dropout(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = ModelConfig(lora=replace(LORA, dropout=0.5))
    base = SharedBase(load_causal_lm(tiny_model_dir, config), config)
    stir(base.add("policy", 0), 1)
    base.save("policy", tmp_path)
    again = SharedBase(load_causal_lm(tiny_model_dir, config), config, start=tmp_path)
    again.load("reward", tmp_path)
    assert not any(module.training for module in again.model.modules())
