"""The end between reference and policy: which share, on which prompts, and the weights that come of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from trials import LORA, Trial, sharp_model, stir

from trlhf.config import ModelConfig, RlConfig, build_config
from trlhf.knowledge import Knowledge
from trlhf.logprobs import pad_sequences, response_logprobs
from trlhf.merging import merged_state
from trlhf.rl.checkpoint import Progress
from trlhf.rl.interpolate import blend, blended, choose_share, interpolate
from trlhf.rl.round import RlInputs, Round
from trlhf.roles import Role, SharedBase
from trlhf.run import RunDirectory
from trlhf.types import Label, Prompt, Rollout

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
NAMES = [f"h{i}" for i in range(10)]


def rates(*values: float) -> dict[str, float]:
    return dict(zip(NAMES, values, strict=False))


def test_the_best_share_is_taken_where_it_is_clearly_better() -> None:
    worse, better = rates(*[0.5] * 10), rates(*[0.75] * 10)
    assert choose_share({0.5: better, 1.0: worse})[0] == 0.5
    assert choose_share({0.5: worse, 1.0: better})[0] == 1.0
    assert choose_share({0.25: worse, 0.5: better, 0.75: better, 1.0: worse})[0] == 0.75  # the largest of equals


def test_ties_and_what_is_within_a_standard_error_go_to_the_whole_update() -> None:
    flat = rates(*[0.5] * 10)
    assert choose_share({0.25: flat, 1.0: flat})[0] == 1.0
    one = rates(1.0, *[0.5] * 9)  # d = 0.05, sd 0.158, standard error 0.05: just not more
    share, why = choose_share({0.5: one, 1.0: flat})
    assert share == 1.0 and "within a standard error (5.0%)" in why
    two = rates(1.0, 1.0, *[0.5] * 8)  # d = 0.1, standard error 0.067
    share, why = choose_share({0.5: two, 1.0: flat})
    assert share == 0.5 and "60.0% right, 50.0% with all of it, more than a standard error (6.7%) better" in why


def test_one_prompt_chooses_nothing() -> None:
    assert choose_share({0.5: {"a": 1.0}, 1.0: {"a": 0.0}})[0] == 1.0
    with pytest.raises(ValueError, match="choose_share: no pass rates for λ = 1"):
        choose_share({0.5: {"a": 1.0}})


def whole(path: Path) -> tuple[Role, Role]:
    policy, reference = Role(sharp_model(path)), Role(sharp_model(path)).frozen()
    return stir(policy, 1), reference


def adapters(path: Path) -> tuple[Role, Role]:
    model = ModelConfig(lora=LORA)
    base = SharedBase(sharp_model(path, model), model)
    return stir(base.add("policy", 0), 1), base.role(None)


def weights(role: Role) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in merged_state(role.model, torch.float32, role.adapter).items()}


@pytest.mark.parametrize("layout", [whole, adapters])
def test_what_is_saved_lies_between_reference_and_policy(tiny_model_dir: Path, layout: Any) -> None:
    policy, reference = layout(tiny_model_dir)
    start, end = weights(reference), weights(policy)
    blend(policy, reference, 0.25)
    for name, value in weights(policy).items():
        torch.testing.assert_close(value, start[name] + 0.25 * (end[name] - start[name]), atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(start[name], end[name]) for name in start)


@pytest.mark.parametrize("layout", [whole, adapters])
def test_a_trial_leaves_the_policy_as_it_was(tiny_model_dir: Path, layout: Any) -> None:
    policy, reference = layout(tiny_model_dir)
    batch = pad_sequences([(1, 50, 60)], [(70, 80, 2)], 3)

    def logprobs(role: Role) -> torch.Tensor:
        with torch.no_grad(), role.acting() as model:
            return response_logprobs(model, batch)

    before = {name: value.clone() for name, value in policy.trainable().items()}
    with blended(policy, reference, 0.0):
        torch.testing.assert_close(logprobs(policy), logprobs(reference))
    assert not torch.allclose(logprobs(policy), logprobs(reference), atol=1e-3)
    assert all(torch.equal(before[name], value) for name, value in policy.trainable().items())


def test_a_reference_that_is_an_adapter_is_refused(tiny_model_dir: Path) -> None:
    policy, _ = adapters(tiny_model_dir)
    with pytest.raises(ValueError, match="blend: the reference is the adapter 'sft'; only a policy over the bare base"):
        blend(policy, Role(policy.model, policy.base, "sft"), 0.5)


# ---- in the stage ----


def ready(tmp_path: Path, trial: Trial, held: int, **rl: Any) -> Round:
    pool = [Prompt(name, ({"role": "user", "content": "?"},)) for name in NAMES[:held]]
    labels = [Label("verdict", prompt.id, ("5",), "5", "right", "me", 1.0, "", 0) for prompt in pool]
    ledger, roles = SimpleNamespace(labels=lambda: labels), SimpleNamespace(reference=trial.reference)
    rest = cast("Any", (roles, ledger, None, None, None))
    inputs = RlInputs(pool, tmp_path, *rest, held_out=frozenset(prompt.id for prompt in pool))
    stage = RunDirectory(tmp_path).stage("rl")
    config = build_config({"rl": {"interpolate": True, **rl}})
    trainer = Round(config, stage, inputs, trial.policy, cast("Any", None), Progress())
    trainer.knowledge = Knowledge(labels)
    return trainer


@pytest.fixture
def trial(tiny_model_dir: Path) -> Trial:
    return Trial(tiny_model_dir, RlConfig())


def right_below(monkeypatch: pytest.MonkeyPatch, trial: Trial, most: float) -> None:
    """Let a policy be right where it went at most this share of the way."""
    name, value = next(iter(trial.policy.trainable().items()))
    start = dict(trial.reference.model.named_parameters())[name].detach().clone()
    whole_way = (value.detach() - start).norm()

    def sample(_model: Any, _tokenizer: Any, prompts: Sequence[Prompt], *_: Any) -> list[list[Rollout]]:
        gone = float((value.detach() - start).norm() / whole_way)
        answer = "5" if gone <= most + 1e-3 else "6"
        return [[Rollout(p.id, "", (1,), (0.0,), True, answer)] for p in prompts]

    monkeypatch.setattr("trlhf.rl.interpolate.sample_as", sample)


def test_the_stage_goes_back_as_far_as_held_out_prompts_ask(
    tmp_path: Path, trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    right_below(monkeypatch, trial, 0.5)
    start, end = weights(trial.reference), weights(trial.policy)
    found = interpolate(ready(tmp_path, trial, 10))
    assert found is not None and found["share"] == 0.5 and found["prompts"] == 10
    assert found["accuracy"] == {"0.25": 1.0, "0.5": 1.0, "0.75": 0.0, "1": 0.0}
    for name, value in weights(trial.policy).items():
        torch.testing.assert_close(value, start[name] + 0.5 * (end[name] - start[name]), atol=1e-6, rtol=1e-5)


def test_a_policy_that_is_best_as_it_is_stays_to_the_bit(
    tmp_path: Path, trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    right_below(monkeypatch, trial, 1.0)
    before = trial.weights()
    found = interpolate(ready(tmp_path, trial, 10))
    assert found is not None and found["share"] == 1.0
    assert all(torch.equal(before[name], value) for name, value in trial.weights().items())


def test_too_few_prompts_are_said_and_nothing_is_done(
    tmp_path: Path, trial: Trial, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("trlhf"), "propagate", True)
    right_below(monkeypatch, trial, 0.5)
    trainer = ready(tmp_path, trial, 7)
    assert len(trainer.pool) == 7, "they are trained on: nothing else needs them"
    assert "rl.interpolate: the stage will end without it, since 7 held-out prompts were verified" in caplog.text
    assert interpolate(trainer) is None
    assert interpolate(ready(tmp_path, trial, 10, interpolate=False)) is None


def test_prompts_are_held_out_for_it(tmp_path: Path, trial: Trial) -> None:
    assert len(ready(tmp_path, trial, 10).held_out) == 10 and ready(tmp_path, trial, 10).pool == []
    assert ready(tmp_path, trial, 10, interpolate=False).held_out == []
