"""The anchors' own controller, alike for PPO and DPO."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trials import RL, Trial, sampled_groups, some_anchors

from trlhf.config import RlConfig, build_config
from trlhf.errors import ConfigError
from trlhf.rl import checkpoint
from trlhf.rl.checkpoint import Progress
from trlhf.run import RunDirectory

BOTH = {"ppo": RL, "dpo": replace(RL, algorithm="dpo")}


def after_one_update(path: Path, config: RlConfig) -> tuple[Trial, dict[str, float]]:
    trial = Trial(path, config)
    return trial, trial.update(sampled_groups(4), some_anchors(5))


@pytest.mark.parametrize("algorithm", BOTH)
def test_the_coefficient_follows_its_target(tiny_model_dir: Path, algorithm: str) -> None:
    """β·(1 ± 0.2·n/H): 4 groups make 2 steps (PPO) or 1 (DPO) of 3 anchors, where the KL is far from its target."""
    n = {"ppo": 6, "dpo": 3}[algorithm]
    for target, sign in ((1e-6, 1), (1e6, -1)):
        config = replace(BOTH[algorithm], anchor_kl_target=target, anchor_kl_horizon=20)
        trial, metrics = after_one_update(tiny_model_dir, config)
        assert metrics["anchor_coef"] == 0.3  # with which the update was made
        assert trial.learner.hold.coef == pytest.approx(0.3 * (1 + sign * 0.2 * n / 20))
    config = replace(config, anchor_kl_target=metrics["anchor_kl"] / 1.1)  # 10% above it
    trial, metrics = after_one_update(tiny_model_dir, config)
    assert trial.learner.hold.coef == pytest.approx(0.3 * (1 + 0.1 * n / 20))


@pytest.mark.parametrize("algorithm", BOTH)
def test_without_a_target_the_coefficient_stays(tiny_model_dir: Path, algorithm: str) -> None:
    trial, metrics = after_one_update(tiny_model_dir, BOTH[algorithm])
    assert metrics["anchor_kl"] > 0 and trial.learner.hold.coef == 0.3


def test_where_no_anchor_was_looked_at_the_coefficient_stays(tiny_model_dir: Path) -> None:
    gae = replace(RL, advantage="gae", anchor_kl_target=1e-6, anchor_kl_horizon=20)
    trial = Trial(tiny_model_dir, gae)
    metrics = trial.update(sampled_groups(4), some_anchors(3), warmup=True)
    assert "anchor_kl" not in metrics and trial.learner.hold.coef == 0.3
    trial.update(sampled_groups(4), ())
    assert trial.learner.hold.coef == 0.3


@pytest.mark.parametrize("algorithm", BOTH)
def test_the_coefficient_weighs_the_next_update(tiny_model_dir: Path, algorithm: str) -> None:
    """One that was adapted pulls as one that was set so."""
    adapted, fixed = Trial(tiny_model_dir, BOTH[algorithm]), Trial(tiny_model_dir, BOTH[algorithm])
    adapted.learner.hold.coef = 3.0
    trial = Trial(tiny_model_dir, replace(BOTH[algorithm], anchor_coef=3.0))
    for one in (adapted, fixed, trial):
        one.update(sampled_groups(4), some_anchors(3))
    same = [torch.equal(adapted.weights()[name], value) for name, value in trial.weights().items()]
    assert all(same)
    assert not all(torch.equal(fixed.weights()[name], value) for name, value in trial.weights().items())


@pytest.mark.parametrize("algorithm", BOTH)
def test_the_coefficient_lies_in_the_checkpoint(tiny_model_dir: Path, tmp_path: Path, algorithm: str) -> None:
    config = replace(BOTH[algorithm], anchor_kl_target=1e-6, anchor_kl_horizon=20)
    (trial, _), again = after_one_update(tiny_model_dir, config), Trial(tiny_model_dir, config)
    stage = RunDirectory(tmp_path).stage("rl")
    checkpoint.save(stage, trial.policy, trial.learner, Progress(step=1), keep=2)
    checkpoint.load(stage, again.policy, again.learner)
    assert again.learner.hold.coef == trial.learner.hold.coef > 0.3
    metrics = [
        one.learner.update(sampled_groups(4, 1), some_anchors(5), random.Random(1), 0.5) for one in (trial, again)
    ]
    assert metrics[0] == metrics[1] and trial.learner.hold.coef == again.learner.hold.coef


@pytest.mark.parametrize(
    ("rl", "message"),
    [
        (
            {"anchor_coef": 0, "anchor_kl_target": 0.01},
            "rl.anchor_kl_target=0.01 adapts rl.anchor_coef by factors, but",
        ),
        (
            {"anchor_kl_target": 0.01, "anchor_kl_horizon": 19},
            "rl.anchor_kl_horizon=19 is so short that one rollout batch, which looks at anchors 96 times, could take "
            "rl.anchor_coef to 0 or below; try 480 or more",
        ),
        (  # 32 prompts of 4 pairs are 4 steps, twice, of 12 anchors
            {"anchor_kl_target": 0.01, "anchor_kl_horizon": 19, "algorithm": "dpo"},
            "rl.anchor_kl_horizon=19 is so short that one rollout batch, which looks at anchors 96 times",
        ),
    ],
)
def test_a_controller_that_cannot_work_is_refused(rl: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_config({"rl": rl})


def test_a_controller_that_can_work_is_not() -> None:
    assert build_config({"rl": {"anchor_kl_target": 0.01, "anchor_kl_horizon": 20}}).rl.anchor_kl_horizon == 20
