"""The estimate, against what torch, transformers, peft and bitsandbytes really hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from trlhf.compose import compose
from trlhf.config import Config, LoraConfig, ModelConfig, RlConfig
from trlhf.decoding import start_decoding
from trlhf.estimate import speed
from trlhf.estimate.activations import Packed, Rows, activation_bytes, forward_of, graph_bytes, layer_bytes
from trlhf.estimate.lengths import lengths_of, longest_possible
from trlhf.estimate.measure import at_hand, read_lengths
from trlhf.estimate.memory import Job, peaks
from trlhf.estimate.passes import decoding, of_responses, rows_of
from trlhf.estimate.remedies import needed, remedies
from trlhf.estimate.report import fit_lines, lengths_line, time_line
from trlhf.estimate.shape import MISTRAL_7B, Shape, shape_of
from trlhf.estimate.speed import Machine, machine_of, measure_cpu, seconds_of
from trlhf.estimate.stages import phases_of
from trlhf.logprobs import pad_sequences, response_hidden
from trlhf.models import encode_prompt, encode_response, load_causal_lm, load_tokenizer
from trlhf.recompute import recomputing
from trlhf.rl.optimizer import GuardedOptimizer
from trlhf.roles import Role, SharedBase

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
ROWS, WIDTH = 3, 24
KINDS = (
    ("float32", "full", "none"),
    ("float32", "lora", "none"),
    ("bfloat16", "full", "none"),
    ("bfloat16", "lora", "none"),
    ("bfloat16", "lora", "nf4"),
)


def one(*overrides: str) -> Config:
    (config,) = compose(overrides).configs
    return config


def job_of(*overrides: str) -> Job:
    config = one("experiment=cerebrum-7b", "dry_run=true", *overrides)
    shape = shape_of(config.model)
    assert shape is not None
    device = "cuda" if config.hardware.device == "cuda" else "cpu"
    return Job(config, shape, longest_possible(config), device)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Mistral of odd sizes, so that no two of them can be mistaken for one another."""
    config = MistralConfig(
        vocab_size=97, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=None, tie_word_embeddings=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("odd")
    torch.manual_seed(0)
    MistralForCausalLM(config).save_pretrained(path)
    return path


def config_of(folder: Path, kind: tuple[str, str, str], **changes: Any) -> ModelConfig:
    dtype, trained, quantization = kind
    values: dict[str, Any] = {"name": str(folder), "dtype": dtype, "quantization": quantization}
    return ModelConfig(**values, lora=LoraConfig(enabled=trained == "lora", r=4), **changes)


def shape(folder: Path) -> Shape:
    found = shape_of(ModelConfig(name=str(folder)))
    assert found is not None
    return found


@contextlib.contextmanager
def kept_by_autograd(model: Any) -> Iterator[dict[int, int]]:
    """Yield the bytes of every storage that graphs keep, without the model's own weights."""
    own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def note(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(value)  # so that no address is used twice
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        yield sizes


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("mask", ["none", "layer", "shared"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_what_autograd_keeps(
    folder: Path, kind: tuple[str, str, str], attention: Any, autocast: bool, mask: str, checkpointed: bool
) -> None:
    if autocast and kind[0] == "float32":
        pytest.skip("SFT in float32 has no autocast")
    if mask == "shared" and (attention == "eager" or autocast):
        pytest.skip("a mask of our own goes with sdpa and without autocast")
    config = config_of(folder, kind, attention=attention, gradient_checkpointing=checkpointed)
    loaded = config if config.lora.enabled else replace(config, dtype="float32")
    model: Any = load_causal_lm(folder, loaded, quantized=kind[2] != "none")
    role = SharedBase(model, config).add("policy", 0) if config.lora.enabled else Role(model)
    ids = torch.randint(0, 97, (ROWS, WIDTH), generator=torch.Generator().manual_seed(0))
    given: torch.Tensor | None = None
    if mask == "layer":
        given = torch.ones(ROWS, WIDTH, dtype=torch.long)
        given[0, -5:] = 0
    elif mask == "shared":
        causal = torch.ones(WIDTH, WIDTH, dtype=torch.bool).tril()
        given = torch.zeros(ROWS, 1, WIDTH, WIDTH, dtype=model.dtype)
        given = given.masked_fill(~causal, torch.finfo(model.dtype).min)
    casting = torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext()
    with kept_by_autograd(model) as sizes, casting, role.acting() as acting, recomputing(acting.model):
        positions = torch.arange(WIDTH).repeat(ROWS, 1)
        acting.model(input_ids=ids, attention_mask=given, position_ids=positions, use_cache=False)
    how = forward_of(config, training=autocast, masked=mask != "none", shared_mask=mask == "shared")
    layout = Rows(ROWS, WIDTH)
    assert graph_bytes(shape(folder), how, layout) == pytest.approx(sum(sizes.values()), rel=0.01)
    least = layer_bytes(shape(folder), how, layout) if checkpointed else 0
    assert activation_bytes(shape(folder), how, layout) >= sum(sizes.values()) * 0.99 + least


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("prompt", "response", "samples"), [(20, 15, 4), (40, 60, 8), (9, 1, 2), (30, 20, 1)])
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_what_autograd_keeps_of_responses(
    folder: Path, kind: tuple[str, str, str], prompt: int, response: int, samples: int, checkpointed: bool
) -> None:
    """As PPO and DPO compute them: packed behind the prompts that they share, or in rows that are computed twice."""
    config = config_of(folder, kind, gradient_checkpointing=checkpointed)
    loaded = config if config.lora.enabled else replace(config, dtype="float32")
    model: Any = load_causal_lm(folder, loaded, quantized=kind[2] != "none")
    role = SharedBase(model, config).add("policy", 0) if config.lora.enabled else Role(model)
    prompts = [[5 + i // samples] * prompt for i in range(2 * samples)]
    batch = pad_sequences(prompts, [[7] * response] * (2 * samples), 3, True)
    with kept_by_autograd(model) as sizes, role.acting() as acting:
        response_hidden(acting.model, batch)
    how, layout = of_responses(config, prompt, response, 2 * samples, samples)
    assert isinstance(layout, Rows if checkpointed else Packed)
    assert graph_bytes(shape(folder), how, layout) == pytest.approx(sum(sizes.values()), rel=0.03)


def test_the_cache_is_as_large_as_transformers_makes_it(folder: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        model = load_causal_lm(folder, ModelConfig(name=str(folder), dtype=dtype))  # type: ignore[arg-type]
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.ones(ROWS, WIDTH, dtype=torch.long), past_key_values=cache, use_cache=True)
        found = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert shape(folder).cache_bytes(ROWS * WIDTH, dtype) == found


def test_four_bits_are_as_many_bytes_as_bitsandbytes_takes(tmp_path: Path) -> None:
    config = MistralConfig(
        vocab_size=97, hidden_size=512, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=4, sliding_window=None, tie_word_embeddings=False,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    model = ModelConfig(name=str(tmp_path), dtype="bfloat16", quantization="nf4", lora=LoraConfig(enabled=True))
    found = 0.0
    for value in load_causal_lm(tmp_path, model, quantized=True).parameters():
        state = getattr(value, "quant_state", None)
        found += value.nbytes
        if state is not None:
            found += state.absmax.nbytes + state.state2.absmax.nbytes
    assert shape(tmp_path).base_bytes(model) == pytest.approx(found, rel=0.01)


def test_learning_takes_gradients_and_two_moments(folder: Path) -> None:
    config = config_of(folder, ("bfloat16", "lora", "none"))
    role = SharedBase(load_causal_lm(folder, config), config).add("policy", 0)
    optimizer = GuardedOptimizer(role.trainable().values(), 1e-3, RlConfig(), "")
    for parameter in optimizer.parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    run = Config(model=config)
    job = Job(run, shape(folder), longest_possible(run))
    states = [value for state in optimizer.adamw.state.values() for value in state.values() if value.dim()]
    assert 2 * job.learned == sum(value.nbytes for value in states)
    assert job.learned == job.adapter == sum(parameter.nbytes for parameter in optimizer.parameters)


@pytest.mark.parametrize(("prompt", "response"), [(90, 80), (40, 30), (300, 200), (600, 10)])
@pytest.mark.parametrize(("responses", "group"), [(16, 8), (4, 8), (16, 2), (6, 4)])
@pytest.mark.parametrize("shared", [True, False])
def test_rows_are_laid_out_as_log_probabilities_are_computed(
    prompt: int, response: int, responses: int, group: int, shared: bool
) -> None:
    prompts = [[1 + i // min(group, responses)] * prompt for i in range(responses)]
    batch = pad_sequences(prompts, [[5] * response] * responses, 3, shared)
    rows, together = rows_of(prompt, response, responses, group, shared)
    assert batch.input_ids.shape == (rows, prompt + together * response)
    assert (together > 1) == (batch.attention_mask.dim() == 4)


def test_what_decoding_holds(folder: Path) -> None:
    model = load_causal_lm(folder, ModelConfig(name=str(folder)))
    with torch.no_grad():
        decoder: Any = start_decoding(model, [[5] * 30, [6] * 30], 4, 3, 100)
        for _ in range(70):
            decoder.step(torch.zeros(8, dtype=torch.long))
    held = sum(keys.nbytes + values.nbytes for keys, values in decoder._shared.layers)
    held += sum(keys.nbytes + values.nbytes for keys, values in (layer._held for layer in decoder._layers))
    run = Config(model=ModelConfig(name=str(folder)))
    card, cpu = (Job(run, shape(folder), longest_possible(run), device) for device in ("cuda", "cpu"))
    _, writing = decoding(card, 8, 4, 30, 70, "float32")
    assert writing["KV cache"] == pytest.approx(held * (1 + 1 / 3))  # and a layer's copy where it grows
    written = held - sum(x[:, :, 70:].numel() * 4 for layer in decoder._layers for x in layer._held)
    _, writing = decoding(cpu, 8, 4, 30, 70, "float32")  # whose pages are there once they are written to
    assert writing["KV cache"] == pytest.approx(written * (1 + 1 / 3))
    alike = replace(cpu, lengths=replace(cpu.lengths, common=10))
    reading, shared = (decoding(job, 8, 4, 30, 70, "float32")[0] for job in (cpu, alike))
    assert reading["KV cache"] == 60 / 50 * shared["KV cache"]  # two prompts of 30, of which 10 once


@pytest.mark.parametrize(("name", "limit"), [("gpu-24gb", 22.0), ("gpu-80gb", 79.0), ("multi-gpu", 79.0)])
def test_the_recipe_fits_even_with_the_longest_sequences(name: str, limit: float) -> None:
    job = job_of(f"hardware={name}")
    stage, most = needed(job)
    assert stage in ("sft", "reward", "rl", "eval") and most < limit * 2**30
    assert all(phase.total < limit * 2**30 for phase in phases_of(job))
    verdict, *_ = fit_lines(job)
    assert verdict.endswith(f"it fits into {limit:.1f} GiB")


def test_what_does_not_fit_is_said_with_what_to_change() -> None:
    job = job_of("hardware=gpu-24gb", "model.quantization=none", "rl.rollout_batch_size=128", "evaluation.batch_size=8")
    stage, most = needed(job)
    assert stage in ("reward", "rl") and most > 22 * 2**30
    found = remedies(job)
    assert [remedy.saved for remedy in found] == sorted((remedy.saved for remedy in found), reverse=True)
    assert found[0].change in ("rl.rollout_batch_size=64", "model.quantization=nf4")
    for remedy in found:  # what is promised is what the estimate says of the changed run
        again = job_of(
            *("hardware=gpu-24gb", "model.quantization=none", "rl.rollout_batch_size=128", "evaluation.batch_size=8"),
            *remedy.change.split(),
        )
        assert needed(again)[1] == pytest.approx(remedy.needed) == most - remedy.saved
    verdict, advice = fit_lines(job)
    assert "it does NOT fit into 22.0 GiB" in verdict
    assert advice.startswith(f"what saves memory, most first: {found[0].change} ")


def test_a_change_that_would_be_refused_is_not_advised() -> None:
    job = job_of("hardware=gpu-24gb", "model.quantization=none", "rl.interpolate=true")
    assert "model.quantization=nf4" not in [remedy.change for remedy in remedies(job)]
    assert "model.quantization=nf4" in [r.change for r in remedies(job_of("hardware=cpu"))]


def test_parts_follow_what_is_trained_and_how() -> None:
    def rl(*overrides: str) -> dict[str, float]:
        return dict(peaks(phases_of(job_of("hardware=gpu-80gb", "stage=rl", *overrides)))["rl"].parts)

    plain, critic, full = rl(), rl("rl.advantage=gae"), rl("model.lora.enabled=false", "reward.finetune=full")
    adapter = 4 * MISTRAL_7B.adapter_parameters(one("experiment=cerebrum-7b").model)
    assert plain["weights"] == 2 * MISTRAL_7B.parameters and plain["gradients"] == adapter
    assert plain["adapters"] == 2 * adapter and plain["optimizer"] == 2 * adapter  # the policy's, the reward model's
    assert critic["optimizer"] == 2 * plain["optimizer"] and critic["adapters"] == 3 * adapter
    assert full["weights"] == 3 * 4 * MISTRAL_7B.parameters  # policy, reference, reward model
    assert full["optimizer"] == 8 * MISTRAL_7B.parameters
    quantized = rl("model.quantization=nf4")
    assert quantized["weights"] == pytest.approx(0.285 * plain["weights"], rel=0.01)
    assert quantized["adapters"] == 3 * adapter  # SFT's stays one
    wider = rl("rl.rollout_batch_size=256")
    assert wider["KV cache"] == pytest.approx(2 * plain["KV cache"])


def test_less_is_kept_with_checkpoints_and_smaller_microbatches() -> None:
    def sft(*overrides: str) -> float:
        phases = phases_of(job_of("hardware=gpu-80gb", "stage=sft", *overrides))
        return next(phase.parts["activations"] for phase in phases if phase.name == "backward pass")

    assert sft() < sft("model.gradient_checkpointing=false") / 5
    assert sft("sft.microbatch_size=4", "sft.packing=false") < sft("sft.packing=false")


def test_full_length_rows_bound_every_data_set(tmp_path: Path) -> None:
    config = one("data.sft_prompts=20", "data.pool_prompts=40", "data.test_prompts=10")
    assert at_hand(config) and not at_hand(one("experiment=cerebrum-7b"))
    assert not at_hand(one("data=gsm8k", "data.path=openai/gsm8k"))
    found, most = read_lengths(config), longest_possible(config)
    for name in ("demonstration", "prompt", "test_prompt", "response"):
        assert 0 < getattr(found, name) < getattr(most, name)
    assert (found.demonstrations, found.tests, found.source) == (20, 10, "the data")
    tokenizer = load_tokenizer(Path(speed.__file__).parents[1] / "micro" / "base")
    assert encode_prompt(tokenizer, [{"role": "user", "content": "?"}]) and encode_response(tokenizer, "x")


def test_lengths_that_nobody_read_are_the_longest_possible() -> None:
    config = one()
    found = lengths_of([(30, 10), (20, 40)], [50, 60], [], config)
    assert (found.demonstration, found.response, found.prompt) == (60, 40, 60)
    assert found.test_prompt == config.model.max_length - config.evaluation.max_new_tokens
    assert (found.mean_demonstration, found.mean_response, found.mean_prompt) == (50.0, 25.0, 55.0)
    capped = lengths_of([(30, 500)], [50], [50], config)
    assert capped.response == config.rl.max_new_tokens and capped.mean_response == config.rl.max_new_tokens


CARD = Machine("card", 1e14, 1e12, 0.5, 0.5, 0.0, "a test's")


def test_time_follows_from_operations() -> None:
    job = job_of("hardware=gpu-80gb", "model.gradient_checkpointing=false", "data.sft_prompts=100", "sft.epochs=1")
    seconds = seconds_of(job, CARD)
    assert list(seconds) == ["sft", "reward", "rl", "eval"] and all(value > 0 for value in seconds.values())
    tokens = 100 * 2048
    weights = MISTRAL_7B.linear_parameters + 32000 * 4096
    attention = 2 * 2048 * 4096 * 32
    assert seconds["sft"] == pytest.approx(2 * tokens * (2 * weights + attention) / (1e14 * 0.5))
    again = replace(job, config=replace(job.config, model=replace(job.config.model, gradient_checkpointing=True)))
    assert seconds_of(again, CARD)["sft"] == pytest.approx(1.5 * seconds["sft"])  # 3 passes for 2
    assert seconds_of(replace(job, processes=4), CARD)["sft"] == pytest.approx(seconds["sft"] / 4)
    twice = job_of("hardware=gpu-80gb", "rl.rounds=8")
    assert seconds_of(twice, CARD)["rl"] == pytest.approx(2 * seconds_of(job_of("hardware=gpu-80gb"), CARD)["rl"])


def test_decoding_is_bound_by_what_is_read() -> None:
    job = job_of("hardware=gpu-80gb", "stage=eval", "data.test_prompts=128")
    slow = seconds_of(job, CARD)["eval"]
    assert seconds_of(job, replace(CARD, bandwidth=2e12))["eval"] < slow
    launched = seconds_of(job, replace(CARD, launch=1e-3))["eval"]
    assert launched - slow == pytest.approx(512 * 32 * 1e-3)


def test_the_machine_is_named_with_its_source() -> None:
    assert machine_of(job_of("hardware=gpu-80gb")).source.startswith("assumed A100: 312 TFLOP/s")
    assert machine_of(job_of("hardware=gpu-24gb")).name == "RTX 3090"
    cpu = measure_cpu()
    assert cpu.flops > 1e8 and cpu.bandwidth > 1e7 and "measured just now" in cpu.source
    line = time_line(job_of("hardware=gpu-80gb"))
    assert line.startswith("time, modelled: sft ") and "35% and 50% are reached" in line


def test_the_lengths_are_said() -> None:
    assert lengths_line(job_of("hardware=gpu-24gb")) == (
        "longest: demonstrations 2048 tokens, prompts 1536, responses 512, test prompts 1536 "
        "(the longest possible sequences)"
    )
