"""Details that PPO stands on: where reward and KL enter, order, rates, Adam's ε, dropout off in all four models."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trials import (
    ALGORITHMS,
    LAYOUTS,
    LORA,
    PAD,
    RL,
    SAMPLES,
    Trial,
    farthest,
    fit_reward,
    labels,
    sampled_groups,
    sharp_model,
    stir,
)

from trlhf.advantages import leave_one_out, whiten
from trlhf.config import ModelConfig, RlConfig, build_config
from trlhf.knowledge import Knowledge
from trlhf.labelling import Archive
from trlhf.logprobs import pad_sequences, response_logprobs
from trlhf.models import load_causal_lm
from trlhf.reward import finetune
from trlhf.rl import ppo
from trlhf.rl.critic import Critic
from trlhf.rl.experience import score_groups
from trlhf.rl.train import train_rl
from trlhf.roles import Role, Roles, SharedBase
from trlhf.run import RunDirectory
from trlhf.types import Prompt, Score

# peft asks transformers by a name that transformers has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ---- where the reward and the KL enter ----


def test_the_score_sits_on_the_last_token_and_returns_are_not_whitened(tiny_model_dir: Path) -> None:
    """With λ = 0 and a critic that says 0, as a new one does, a return is what the token itself was paid."""
    config = replace(ALGORITHMS["gae"], gae_lambda=0.0, kl_coef=0.0)
    policy, reference, value = (Role(sharp_model(tiny_model_dir)) for _ in range(3))
    learner = ppo.PpoLearner(stir(policy, 1), reference.frozen(), Critic(value), config, PAD)
    groups = sampled_groups(2)
    experience, _ = learner._collect(groups)
    rows = [(found, reward) for group in groups for found, reward in zip(group.rollouts, group.rewards, strict=True)]
    for number, (found, reward) in enumerate(rows):
        length = len(found.token_ids)
        assert experience.mask[number].sum() == length
        assert experience.returns[number, :length].tolist() == [0.0] * (length - 1) + [reward]
    whitened = experience.advantages[experience.mask]
    assert float(whitened.mean()) == pytest.approx(0, abs=1e-5)
    assert float(whitened.std(correction=0)) == pytest.approx(1, abs=1e-5)


def test_advantages_do_not_depend_on_the_rewards_scale(tiny_model_dir: Path) -> None:
    trial = Trial(tiny_model_dir, ALGORITHMS["leave_one_out"])
    assert isinstance(trial.learner, ppo.PpoLearner)
    groups = sampled_groups(2)
    other = [replace(group, rewards=tuple(8 * reward - 0.7 for reward in group.rewards)) for group in groups]
    found, scaled = (trial.learner._collect(batch)[0].advantages for batch in (groups, other))
    assert found.abs().max() > 0.5
    torch.testing.assert_close(scaled, found, atol=1e-5, rtol=0)


def test_trust_weighs_advantages_before_they_are_whitened(tiny_model_dir: Path) -> None:
    trial = Trial(tiny_model_dir, ALGORITHMS["leave_one_out"])
    assert isinstance(trial.learner, ppo.PpoLearner)
    groups = sampled_groups(2)
    size = len(groups[0].rewards)
    trust = tuple(n / size for n in range(size))
    trusted = [replace(groups[0], trust=trust), *groups[1:]]
    experience, _ = trial.learner._collect(trusted)
    weights = torch.tensor([weight for group in trusted for weight in group.weights])
    scores = torch.tensor([group.rewards for group in trusted])
    expected = (leave_one_out(scores).flatten() * weights)[:, None].expand(experience.mask.shape)
    torch.testing.assert_close(experience.advantages, whiten(expected, experience.mask))
    assert not replace(groups[0], trust=(0.0,) * size).mixed and replace(groups[0], trust=trust).mixed


@pytest.mark.parametrize("advantage", ["leave_one_out", "gae"])
@pytest.mark.parametrize("where", ["reward", "loss"])
def test_the_kl_enters_once(tiny_model_dir: Path, advantage: Any, where: Any) -> None:
    advantages, gradients = [], []
    for during, after in ((0.1, 0.1), (5.0, 0.1), (0.1, 5.0)):
        trial = Trial(tiny_model_dir, replace(ALGORITHMS[advantage], kl_in=where))
        assert isinstance(trial.learner, ppo.PpoLearner)
        trial.learner.kl_coef = during
        experience, _ = trial.learner._collect(sampled_groups(2))
        advantages.append(experience.advantages)
        if during == 0.1:
            trial.learner.kl_coef = after
            trial.learner._step(experience, experience.groups, (), defaultdict(float), False)
            gradients.append({name: value for name, value in trial.gradients().items() if name.startswith("policy")})
    assert torch.equal(advantages[0], advantages[1]) == (where == "loss")
    assert (farthest(gradients[1], gradients[0]) == 0) == (where == "reward")


@pytest.mark.parametrize("name", ["leave_one_out", "dpo"])
def test_every_pass_has_an_order_of_its_own(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    seen: list[tuple[Any, ...]] = []

    def step(*arguments: Any) -> None:
        chosen, sums = (arguments[0], arguments[2]) if name == "dpo" else (arguments[1], arguments[3])
        seen.append(tuple(map(str, chosen)))
        sums |= dict.fromkeys(("steps", "tokens", "seen"), 1.0)

    config = replace(ALGORITHMS[name], epochs=3, pairs_per_step=2, pairs_per_prompt=1)
    learner = Trial(tiny_model_dir, config).learner
    monkeypatch.setattr(learner, "_step", step)
    learner.update(sampled_groups(6), (), random.Random(0), 1.0)
    passes = [seen[start : start + 3] for start in (0, 3, 6)]  # three steps, each of two whole groups or two pairs
    assert len(seen) == 9 and len(set(map(tuple, passes))) == 3
    assert len({frozenset(one for step in steps for one in step) for steps in passes}) == 1
    assert all(len({one for step in steps for one in step}) == 6 for steps in passes)


@pytest.mark.parametrize("name", ["leave_one_out", "dpo"])
def test_responses_that_never_end_are_counted(tiny_model_dir: Path, name: str) -> None:
    metrics = Trial(tiny_model_dir, ALGORITHMS[name]).update(sampled_groups(3))
    assert metrics["truncated"] == 1 / SAMPLES  # the first of every group


def test_a_score_is_clipped_before_it_becomes_a_reward() -> None:
    class Certain:
        def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Score]:
            return [Score(sign * 1e6, 0.0) for sign in (1, -1)]

    (group,) = sampled_groups(1)
    rollouts = group.rollouts[1:3]
    (scored,) = score_groups([replace(group.prompt, task="open")], [[1]], [rollouts], Knowledge(), Certain(), RL)
    assert scored.rewards == pytest.approx([1 / (1 + math.exp(-10)), 1 / (1 + math.exp(10))], rel=1e-6)


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
        "trlhf.rl.train.buy_labels", lambda self: self.stage.write_json(f"round_{self.state.round:02d}.json", {})
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


def test_dropout_is_off_in_policy_reference_and_value(tiny_model_dir: Path, tmp_path: Path, layout: str) -> None:
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
