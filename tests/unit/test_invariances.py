"""What must not matter: microbatches, padding, order, neighbours, the batch size of scoring."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trials import (
    ALGORITHMS,
    EOS,
    LAYOUTS,
    PAD,
    Named,
    Trial,
    demonstrations,
    farthest,
    fit_reward,
    labels,
    sampled_groups,
    sft_steps,
    sharp_model,
    some_anchors,
)

from trlhf.config import ModelConfig
from trlhf.logprobs import SequenceBatch, pad_sequences, response_logprobs
from trlhf.models import encode_prompt, load_tokenizer
from trlhf.reward import features, finetune
from trlhf.reward.features import Batch, collate
from trlhf.rl import anchors, dpo, ppo, rollout_batch
from trlhf.rl.rollout_batch import Experience, blank_experience
from trlhf.rollout import Sampling, sample_responses
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
        batch = collate(*arguments)
        ids = pad(batch.input_ids, (0, extra), value=EOS)
        return Batch(ids, pad(batch.attention_mask, (0, extra)), batch.prompt_lengths)

    for module in (rollout_batch, dpo, anchors):
        monkeypatch.setattr(module, "pad_sequences", wider_sequences)
    monkeypatch.setattr(ppo, "blank_experience", wider_experience)
    for module in (features, finetune):
        monkeypatch.setattr(module, "collate", wider_samples)


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
    """Neither columns that are added, nor those that a longer row makes, nor where in the batch a row stands."""
    trial = Trial(tiny_model_dir, ALGORITHMS["gae"], model=ModelConfig(attention=attention))
    (group,) = sampled_groups(1)
    ids = [found.token_ids for found in group.rollouts]
    prompts = [group.prompt_ids] * len(ids)
    batch = pad_sequences(prompts, ids, PAD, share)
    assert trial.critic is not None and batch.attention_mask.dim() == (4 if share else 2)
    longest = max(map(len, ids))
    with torch.no_grad():
        for read in (lambda x: response_logprobs(trial.policy.model, x), trial.critic):
            alone = torch.cat([read(pad_sequences([p], [r], PAD))[0] for p, r in zip(prompts, ids, strict=True)])
            assert alone.abs().max() > 0.1
            for extra in PADDING:
                wide = widened(batch, extra)
                torch.testing.assert_close(read(wide)[wide.response_mask], alone, atol=1e-5, rtol=0)
                long = (1, 9), (7,) * (longest + extra)
                beside = pad_sequences([long[0], *prompts], [long[1], *ids], PAD, share)
                torch.testing.assert_close(read(beside)[1:][beside.response_mask[1:]], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_padding_changes_neither_gradient_nor_score_of_the_reward_model(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    found = []
    for extra in PADDING:
        with monkeypatch.context() as patch:
            with_padding(patch, extra)
            one = fit_reward(tiny_model_dir, labels(), finetune=kind)
            scores = one.model.logits([label.prompt for label in labels()[0]], [x.response for x in labels()[0]])
            found.append((one.gradients[0], one.metrics[0], scores))
    for gradients, metrics, scores in found[1:]:
        assert farthest(gradients, found[0][0]) < 5e-6
        assert metrics == pytest.approx(found[0][1], rel=1e-5)
        torch.testing.assert_close(scores, found[0][2], atol=1e-5, rtol=0)


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


def watch_forward(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the list to which every forward pass from now on adds what it is given."""
    calls: list[dict[str, Any]] = []
    forward = type(model).forward

    def watched(self: Any, **arguments: Any) -> Any:
        names = ("input_ids", "attention_mask", "position_ids")
        calls.append({name: arguments[name].clone() for name in names if arguments.get(name) is not None})
        return forward(self, **arguments)

    monkeypatch.setattr(type(model), "forward", watched)
    return calls


def test_prompts_are_padded_on_the_left_and_their_positions_start_at_zero(
    sampler: tuple[PreTrainedModel, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = sampler
    calls = watch_forward(model, monkeypatch)
    monkeypatch.setattr("trlhf.decoding.plain_attention", lambda *_: False)  # as with an architecture of its own
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


def test_prompts_that_share_a_pass_have_the_positions_that_each_has_alone(
    sampler: tuple[PreTrainedModel, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = sampler
    calls = watch_forward(model, monkeypatch)
    sample_responses(model, tokenizer, PROMPTS, Sampling(0, 3, 1, 64), torch.Generator())
    (read,) = ({name: value.flatten().tolist() for name, value in call.items()} for call in calls)
    alone = [encode_prompt(tokenizer, prompt.messages) for prompt in PROMPTS]
    common = next(n for n, column in enumerate(zip(*alone, strict=False)) if len(set(column)) > 1)
    assert common > 0 and PAD not in read["input_ids"]
    found = list(zip(read["input_ids"], read["position_ids"], strict=True))
    wanted = [*enumerate(alone[0][:common]), *(pair for ids in alone for pair in list(enumerate(ids))[common:])]
    assert sorted((place, token) for token, place in found) == sorted(wanted)


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
