"""vLLM through TRL: the contract of the installed TRL, and TRL's own code from end to end with a stand-in for vLLM.

vLLM itself needs a GPU and was not run. The stand-in is a second model that starts empty, takes what is loaded into it
and decodes greedily: its answers are the policy's only if every weight arrives under its right name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from trials import LORA, stir
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration

from trlhf.config import Config, ModelConfig, RlConfig, build_config
from trlhf.errors import ConfigError, UserError
from trlhf.models import load_causal_lm, load_tokenizer
from trlhf.roles import Role, SharedBase
from trlhf.rollout import Sampling, sample_as, sample_responses
from trlhf.types import Prompt
from trlhf.vllm_engine import VllmEngine, load_engine, merged_weights

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
PROMPTS = [
    Prompt(f"p{i}", ({"role": "user", "content": text},)) for i, text in enumerate(("what is 2?", "add 3 and 5", "2"))
]
CONFIG = Config(rl=RlConfig(max_new_tokens=6, rollout_batch_size=9), model=ModelConfig(max_length=128))


class Decoder:
    """Stands in for ``vllm.LLM``: its weights come through ``load_weights`` alone, and it decodes greedily."""

    def __init__(self, model: PreTrainedModel, eos: int) -> None:
        self.model, self.eos, self.loaded, self.asked = model, eos, list[str](), list[Any]()
        with torch.no_grad():
            for value in model.parameters():
                value.fill_(float("nan"))
        runner = SimpleNamespace(model=self)
        worker = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=worker)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        own = dict(self.model.named_parameters())
        for name, value in weights:
            self.loaded.append(name)
            own[name].data.copy_(value)

    def wake_up(self, tags: Any = None) -> None: ...
    def sleep(self, level: int) -> None: ...
    def reset_prefix_cache(self) -> None: ...

    def generate(self, prompts: list[dict[str, Any]], sampling_params: Any, use_tqdm: bool) -> list[Any]:
        self.asked.append(sampling_params)
        assert not use_tqdm
        return [self._answer(prompt["prompt_token_ids"], sampling_params.max_tokens) for prompt in prompts]

    @torch.no_grad()
    def _answer(self, prompt: list[int], limit: int) -> Any:
        ids, logprobs = list(prompt), list[Any]()
        for _ in range(limit):
            found = self.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(found.argmax()))
            logprobs.append({ids[-1]: SimpleNamespace(rank=1, logprob=float(found.max()))})
            if ids[-1] == self.eos:
                break
        output = SimpleNamespace(token_ids=ids[len(prompt) :], logprobs=logprobs)
        return SimpleNamespace(prompt_token_ids=prompt, outputs=[output])


@pytest.fixture
def decoder(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Decoder:
    """Let TRL find the stand-in where it would have loaded vLLM."""
    made = Decoder(AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval(), 2)

    def start(self: VLLMGeneration) -> None:
        self.llm, self._llm_weights_sleeping = made, self.enable_sleep_mode

    monkeypatch.setattr(VLLMGeneration, "_init_vllm", start)
    monkeypatch.setattr(vllm_generation, "SamplingParams", lambda **named: SimpleNamespace(**named), raising=False)
    monkeypatch.setattr(vllm_generation, "empty_cache", lambda: None)
    return made


def sharp(path: Path) -> PreTrainedModel:
    model = load_causal_lm(path, ModelConfig())
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(6 if value.dim() == 2 else 1)
    return model


def role_of(path: Path, layout: str) -> Role:
    if layout == "copies":
        return Role(sharp(path))
    base = SharedBase(sharp(path), ModelConfig(lora=LORA))
    stir(base.add("value", 1), 2)
    return stir(base.add("policy", 0), 1)


def test_the_installed_trl_takes_what_we_give() -> None:
    given = {"mode", "gpu_memory_utilization", "max_model_length", "max_num_seqs", "enable_sleep_mode", "temperature"}
    given |= {"max_completion_length", "logprobs"}
    inspect.signature(VLLMGeneration).bind("model", "accelerator", "tokenizer", **dict.fromkeys(given))
    engine = inspect.signature(VLLMGeneration.generate)
    engine.bind("self", [[1]], None, 1)
    assert list(inspect.signature(VLLMGeneration.sync_weights).parameters) == ["self"]
    assert list(inspect.signature(VLLMGeneration._iter_named_params).parameters) == ["self"]
    assert "_iter_named_params()" in inspect.getsource(VLLMGeneration.sync_weights)


@pytest.mark.parametrize("layout", ["copies", "adapters"])
def test_responses_are_the_policys_as_it_is_now(tiny_model_dir: Path, decoder: Decoder, layout: str) -> None:
    tokenizer, role = load_tokenizer(tiny_model_dir), role_of(tiny_model_dir, layout)
    role.engine = VllmEngine(role, tokenizer, CONFIG)
    for seed in (3, 4):
        stir(role, seed)
        done: list[int] = []
        found = sample_as(role, tokenizer, PROMPTS, Sampling(0.7, 6, 2), 0, done.append)
        with role.acting() as model:
            expected = sample_responses(model, tokenizer, PROMPTS, Sampling(0.0, 6, 1), torch.Generator())
        for rollouts, [greedy] in zip(found, expected, strict=True):
            assert [x.token_ids for x in rollouts] == [greedy.token_ids] * 2
            assert [x.text for x in rollouts] == [greedy.text] * 2
            for rollout in rollouts:
                assert rollout.logprobs == pytest.approx(greedy.logprobs, abs=1e-4)
                assert rollout.finished == greedy.finished and rollout.prompt_id == greedy.prompt_id
        assert done == [len(PROMPTS)]
    asked = decoder.asked[-1]
    assert (asked.n, asked.temperature, asked.max_tokens, asked.logprobs) == (1, 0.7, 6, 0)
    assert (asked.top_p, asked.top_k, asked.min_p, asked.repetition_penalty) == (1.0, 0, 0.0, 1.0)


def test_merging_is_done_on_copies_under_plain_names(tiny_model_dir: Path) -> None:
    role = role_of(tiny_model_dir, "adapters")
    before = {name: value.detach().clone() for name, value in role.model.named_parameters()}
    with role.acting():
        found = dict(merged_weights(role.model))
    plain = load_causal_lm(tiny_model_dir, ModelConfig())
    assert found.keys() == {name for name, _ in plain.named_parameters()}
    assert all(torch.equal(value, before[name]) for name, value in role.model.named_parameters())
    assert role.base is not None
    merged = role.base.merge("policy")
    changed = 0
    for name, value in merged.named_parameters():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-6)
        original = before.get(name, before.get(name.replace("_proj.", "_proj.base_layer.")))
        changed += not torch.equal(value, original)  # type: ignore[arg-type]
    assert changed == 14  # all linear layers of two layers
    bare = role_of(tiny_model_dir, "adapters")
    assert bare.base is not None
    with bare.base.role(None).acting():
        off = dict(merged_weights(bare.model))
    original = sharp(tiny_model_dir)
    assert all(torch.equal(off[name], value) for name, value in original.named_parameters())


def test_without_a_gpu_it_says_so(tiny_model_dir: Path) -> None:
    with pytest.raises(UserError, match=r"rl\.rollout_engine=vllm: torch finds no CUDA device"):
        load_engine(CONFIG, role_of(tiny_model_dir, "copies"), tiny_model_dir)


def test_what_it_cannot_do_is_refused_before_anything_starts() -> None:
    values: dict[str, Any] = {"rl": {"rollout_engine": "vllm"}, "hardware": {"device": "cpu"}}
    with pytest.raises(ConfigError, match=r"rl\.rollout_engine=vllm needs a GPU, but hardware.device=cpu"):
        build_config(values)
    values = {"model": {"quantization": "nf4", "lora": {"enabled": True}}, "reward": {"finetune": "lora"}}
    with pytest.raises(ConfigError, match=r"takes plain weights, but model\.quantization=nf4"):
        build_config({**values, "rl": {"rollout_engine": "vllm"}})
