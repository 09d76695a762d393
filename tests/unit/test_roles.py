"""One base, many adapters: who shares what, that nobody disturbs anybody, and what is saved is what was trained."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from trlhf.config import Config, LoraConfig, ModelConfig, RewardConfig, RlConfig
from trlhf.errors import UserError
from trlhf.estimate.shape import shape_of
from trlhf.logprobs import SequenceBatch, pad_sequences, response_logprobs
from trlhf.merging import merged_state, save_model
from trlhf.models import encode_prompt, load_causal_lm, load_tokenizer
from trlhf.rl.critic import Critic
from trlhf.roles import SFT_ADAPTER, Role, Roles, SharedBase, load_roles
from trlhf.sft.templates import load_template
from trlhf.types import Message

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
LORA = LoraConfig(enabled=True, r=4, alpha=8)
KINDS = ("float32", "bfloat16", "nf4")
LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
CHAT: list[Message] = [{"role": "user", "content": "what is 2 plus 3?"}]


def model_config(path: Path, kind: str) -> ModelConfig:
    if kind == "nf4":
        return ModelConfig(name=str(path), quantization="nf4", lora=LORA)
    return ModelConfig(name=str(path), dtype="bfloat16" if kind == "bfloat16" else "float32", lora=LORA)


def stir(role: Role, seed: int = 1) -> Role:
    """Move a role's weights: a fresh adapter changes nothing, since its second factor starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in role.trainable().values():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
    return role


def logprobs(role: Role, batch: SequenceBatch) -> Tensor:
    with torch.no_grad(), role.acting() as model:
        return response_logprobs(model, batch)[batch.response_mask]


@pytest.fixture(scope="module")
def batch() -> SequenceBatch:
    return pad_sequences([[1, 9, 8], [1, 7]], [[5, 6, 2], [4, 2]], 3)


@pytest.fixture(scope="module")
def stages(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the sft and reward stages leave behind, for each kind: ``sft/model``, ``sft/adapter``, ``reward/…``."""
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        config = model_config(tiny_model_dir, kind)
        quantized = kind == "nf4"
        base = SharedBase(load_causal_lm(tiny_model_dir, config, quantized=quantized), config)
        tokenizer = load_tokenizer(tiny_model_dir)
        for seed, (stage, name) in enumerate((("sft", "default"), ("reward", "reward"))):
            role = stir(base.add(name, 0, "default" if quantized and stage == "reward" else None), seed)
            (folder / stage / "adapter").mkdir(parents=True)
            base.save(name, folder / stage / "adapter")
            (folder / stage / "model").mkdir()
            with warnings.catch_warnings():
                save_model(role.model, tokenizer, folder / stage / "model", config.dtype, name)
        found[kind] = folder
    return found


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def roles_of(tiny_model_dir: Path, folder: Path, kind: str, advantage: Any = "gae", backbone: str = "adapter") -> Roles:
    config = Config(
        model=model_config(tiny_model_dir, kind),
        rl=RlConfig(advantage=advantage),
        reward=RewardConfig(finetune="lora" if backbone == "adapter" else "frozen"),
    )
    return load_roles(config, folder / "sft" / "model", folder / "reward", backbone, "cpu")


def test_four_roles_are_one_base_and_three_adapters(tiny_model_dir: Path, stages: dict[str, Path], kind: str) -> None:
    roles = roles_of(tiny_model_dir, stages[kind], kind)
    assert roles.value is not None and roles.reward is not None
    model = roles.policy.model
    assert all(role.model is model for role in (roles.reference, roles.value, roles.reward))
    config = model_config(tiny_model_dir, kind)
    shape = shape_of(config)
    assert shape is not None
    adapter = shape.adapter_parameters(config)
    count = {True: 0, False: 0}
    for name, value in model.named_parameters():
        whole = value.quant_state.shape.numel() if hasattr(value, "quant_state") else value.numel()
        count["lora_" in name] += whole
    adapters = 3 + (kind == "nf4")  # policy, value, reward; of a quantised base also what SFT learned
    assert count == {True: adapters * adapter, False: shape.parameters}
    sizes = {name: sum(v.numel() for v in role.trainable().values()) for name, role in vars(roles).items()}
    assert sizes == {"policy": adapter, "reference": 0, "value": adapter, "reward": 0}
    assert sum(v.numel() for v in Critic(roles.value).trainable().values()) == adapter + shape.hidden + 1
    assert {v.dtype for v in roles.policy.trainable().values()} == {torch.float32}  # whatever the base is stored in


def test_everything_else_loaded_the_policy_is_the_plain_model(
    tiny_model_dir: Path, stages: dict[str, Path], batch: SequenceBatch, kind: str
) -> None:
    """Bit for bit a model with this one adapter, and the reference bit for bit the SFT model."""
    roles = roles_of(tiny_model_dir, stages[kind], kind)
    config = model_config(tiny_model_dir, kind)
    sft = stages[kind] / "sft"
    if kind == "nf4":
        alone = SharedBase(load_causal_lm(tiny_model_dir, config, quantized=True), config, start=sft / "adapter")
        assert torch.equal(logprobs(roles.reference, batch), logprobs(alone.role(SFT_ADAPTER), batch))
    else:
        alone = SharedBase(load_causal_lm(sft / "model", config), config)
        plain = Role(load_causal_lm(sft / "model", config))
        assert torch.equal(logprobs(roles.reference, batch), logprobs(plain, batch))
    assert torch.equal(logprobs(roles.policy, batch), logprobs(roles.reference, batch))  # a fresh adapter is silent
    with torch.no_grad():
        for (_, mine), (_, theirs) in zip(
            stir(roles.policy).trainable().items(), alone.add("policy", 0).trainable().items(), strict=True
        ):
            theirs.copy_(mine)
    assert torch.equal(logprobs(roles.policy, batch), logprobs(alone.role("policy"), batch))
    assert (logprobs(roles.policy, batch) - logprobs(roles.reference, batch)).abs().max() > 1e-3


def test_adapters_do_not_disturb_each_other(
    tiny_model_dir: Path, stages: dict[str, Path], batch: SequenceBatch, kind: str
) -> None:
    roles = roles_of(tiny_model_dir, stages[kind], kind)
    assert roles.value is not None and roles.reward is not None
    everyone = vars(roles)
    before = {name: logprobs(role, batch) for name, role in everyone.items()}
    assert (before["reward"] - before["reference"]).abs().max() > 1e-4, "the reward model's adapter does nothing"
    assert torch.equal(before["value"], before["reward"])  # the critic starts where the reward model stands
    for moved in ("policy", "value"):
        stir(everyone[moved], 7)
        after = {name: logprobs(role, batch) for name, role in everyone.items()}
        changed = {name for name in everyone if not torch.equal(before[name], after[name])}
        assert changed == {moved}
        before = after


def test_gradients_stay_with_the_role_that_acts(
    tiny_model_dir: Path, stages: dict[str, Path], batch: SequenceBatch, kind: str
) -> None:
    """A loss of one role, another role acting meanwhile: neither loses a gradient, and no other weight gets one."""
    roles = roles_of(tiny_model_dir, stages[kind], kind)
    assert roles.value is not None
    stir(roles.policy)
    critic = Critic(roles.value)
    with torch.no_grad():
        critic.head.weight.fill_(0.1)
    with roles.policy.acting() as model:
        own = response_logprobs(model, batch)[batch.response_mask].sum()
    values = critic(batch)[batch.response_mask].sum()
    with torch.no_grad(), roles.reference.acting() as model:
        response_logprobs(model, batch)
    own.backward()
    graded = {name for name, p in roles.policy.model.named_parameters() if p.grad is not None}
    assert graded == set(roles.policy.trainable())
    values.backward()
    graded = {name for name, p in roles.policy.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert graded == set(roles.policy.trainable()) | set(roles.value.trainable())
    assert {name.split(".")[-4] for name in graded} == LAYERS
    assert critic.head.weight.grad is not None


def test_whoever_acted_before_acts_again(tiny_model_dir: Path, stages: dict[str, Path], batch: SequenceBatch) -> None:
    roles = roles_of(tiny_model_dir, stages["float32"], "float32")
    stir(roles.policy)
    expected = logprobs(roles.policy, batch)
    with roles.policy.acting() as model, torch.no_grad():
        with pytest.raises(KeyError), roles.reference.acting():
            raise KeyError
        assert torch.equal(response_logprobs(model, batch)[batch.response_mask], expected)


def test_without_a_learned_reward_backbone_the_reference_serves(
    tiny_model_dir: Path, stages: dict[str, Path], kind: str
) -> None:
    roles = roles_of(tiny_model_dir, stages[kind], kind, advantage="leave_one_out", backbone="sft")
    assert roles.value is None and roles.reward is not None
    assert roles.reward.model is roles.reference.model and roles.reward.adapter == roles.reference.adapter


def test_full_fine_tuning_takes_copies_that_train_in_float32(
    tiny_model_dir: Path, stages: dict[str, Path], batch: SequenceBatch
) -> None:
    for dtype in ("float32", "bfloat16"):
        config = Config(model=ModelConfig(dtype=dtype), rl=RlConfig(advantage="gae"))  # type: ignore[arg-type]
        folder = stages["float32"]
        roles = load_roles(config, folder / "sft" / "model", folder / "reward", "sft", "cpu")
        assert roles.value is not None and (roles.reward is roles.reference) == (dtype == "float32")
        models = [roles.policy.model, roles.reference.model, roles.value.model]
        assert len({id(model) for model in models}) == 3
        assert all({p.dtype for p in model.parameters()} == {torch.float32} for model in models)
        expected = logprobs(roles.reference, batch)
        assert torch.equal(logprobs(roles.policy, batch), expected)
        stir(roles.policy)
        assert torch.equal(logprobs(roles.reference, batch), expected)
        assert not roles.reference.trainable() and len(roles.policy.trainable()) == len(list(models[0].parameters()))
        assert load_roles(config, folder / "sft" / "model", folder / "reward", "own", "cpu").reward is None


def test_fresh_adapters_depend_on_the_seed_and_the_name_alone(tiny_model_dir: Path) -> None:
    def adapter(drawn_before: int, seed: int, name: str) -> list[Tensor]:
        torch.manual_seed(drawn_before)
        state = torch.get_rng_state()
        config = model_config(tiny_model_dir, "float32")
        role = SharedBase(load_causal_lm(tiny_model_dir, config), config).add(name, seed)
        assert torch.equal(torch.get_rng_state(), state), "nothing else may draw otherwise because of the adapters"
        return [value.detach() for key, value in role.trainable().items() if "lora_A" in key]

    first, again = adapter(1, 0, "policy"), adapter(2, 0, "policy")
    assert first and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (adapter(1, 5, "policy"), adapter(1, 0, "value")):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_what_is_saved_is_the_role_merged_and_nothing_in_memory_moves(
    tiny_model_dir: Path, stages: dict[str, Path], batch: SequenceBatch, tmp_path: Path, kind: str
) -> None:
    roles = roles_of(tiny_model_dir, stages[kind], kind)
    policy = stir(roles.policy)
    before = logprobs(policy, batch)
    weights = {name: value.clone() for name, value in policy.model.named_parameters()}
    dtype = model_config(tiny_model_dir, kind).dtype
    (tmp_path / "saved").mkdir()
    save_model(policy.model, load_tokenizer(tiny_model_dir), tmp_path / "saved", dtype, policy.adapter)
    assert not list((tmp_path / "saved").glob("adapter*")) and not list((tmp_path / "saved").glob("*.bin"))
    assert all(torch.equal(value, weights[name]) for name, value in policy.model.named_parameters())
    assert torch.equal(logprobs(policy, batch), before)
    plain, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(notes[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), notes
    assert plain.dtype == getattr(torch, dtype) and not hasattr(plain.config, "quantization_config")
    saved = logprobs(Role(plain), batch)
    assert (saved - logprobs(roles.reference, batch)).abs().max() > 1e-2, "the adapter changed nothing"
    # bfloat16 has 8 bits: merged weights are rounded once more than a base and its adapter apart
    torch.testing.assert_close(saved.float(), before.float(), atol=0.15 if kind == "bfloat16" else 1e-4, rtol=0)


def test_merging_adds_the_scaled_product(tiny_model_dir: Path) -> None:
    config = model_config(tiny_model_dir, "float32")
    base = SharedBase(load_causal_lm(tiny_model_dir, config), config)
    stir(base.add("other", 1), 2)
    weights = stir(base.add("policy", 0)).trainable()
    plain = load_causal_lm(tiny_model_dir, config).state_dict()
    merged = merged_state(base.model, torch.float32, "policy")
    assert merged.keys() == plain.keys()
    for name, value in merged.items():
        stem = name.removesuffix(".weight")
        delta = torch.zeros(())
        if name.split(".")[-2] in LAYERS:
            delta = 2.0 * weights[f"{stem}.lora_B.policy.weight"] @ weights[f"{stem}.lora_A.policy.weight"]
        torch.testing.assert_close(value, plain[name] + delta, atol=1e-6, rtol=0)
    untouched = merged_state(base.model, torch.float32)
    assert all(torch.equal(untouched[name], plain[name]) for name in plain)


def test_a_saved_folder_needs_nothing_of_ours(tiny_model_dir: Path, stages: dict[str, Path], kind: str) -> None:
    folder = stages[kind] / "sft" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == load_template("cerebrum")
    model = AutoModelForCausalLM.from_pretrained(folder)
    greedy = model.generation_config
    assert (greedy.do_sample, greedy.eos_token_id, greedy.pad_token_id) == (False, 2, 3)
    ids = torch.tensor([encode_prompt(tokenizer, CHAT)])
    first, second = (model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4) for _ in range(2))
    assert torch.equal(first, second)


def test_an_adapter_that_cannot_be_read_is_a_users_error(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = replace(model_config(tiny_model_dir, "float32"))
    base = SharedBase(load_causal_lm(tiny_model_dir, config), config)
    with pytest.raises(UserError, match=r"adapter .*nowhere: cannot be read .*run that stage again"):
        base.load("reward", tmp_path / "nowhere")
