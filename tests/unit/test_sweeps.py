"""Sweeps: through Hydra's own launcher, those for Slurm and Ray where they are installed, and never inside of one."""

from __future__ import annotations

from argparse import Namespace

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_module

import trlhf.__main__ as command_line
from trlhf.compose import compose, register_schema
from trlhf.errors import ConfigError, UserError

SWEEP = ["seed=0,1", "rl=ppo,dpo"]
LAUNCHERS = {
    "submitit_slurm": (
        "hydra_plugins.hydra_submitit_launcher",
        ["hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=4", "hydra.launcher.tasks_per_node=4"],
        ("SlurmLauncher", {"partition": "gpu", "gpus_per_node": 4, "tasks_per_node": 4}),
    ),
    "submitit_local": (
        "hydra_plugins.hydra_submitit_launcher",
        ["hydra.launcher.timeout_min=600"],
        ("LocalLauncher", {"timeout_min": 600}),
    ),
    "ray": (
        "hydra_plugins.hydra_ray_launcher",
        ["+hydra.launcher.ray.remote.num_gpus=1"],
        ("RayLauncher", {"ray": {"init": {"address": None}, "remote": {"num_gpus": 1}}}),
    ),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_sweep_composes_with_a_launcher(launcher: str) -> None:
    plugin, options, (target, expected) = LAUNCHERS[launcher]
    pytest.importorskip(plugin, reason=f"{plugin.rpartition('.')[2].replace('_', '-')} is not installed")
    overrides = [f"hydra/launcher={launcher}", *options]
    composed = compose([*overrides, *SWEEP], multirun=True)
    assert [(c.seed, c.rl.algorithm) for c in composed.configs] == [(0, "ppo"), (0, "dpo"), (1, "ppo"), (1, "dpo")]
    assert list(composed.overrides[: len(overrides)]) == overrides
    register_schema()
    with initialize_config_module("trlhf.conf", version_base="1.3"):
        chosen = hydra_compose("config", overrides=overrides, return_hydra_config=True).hydra.launcher
    assert str(chosen._target_).endswith(f".{target}")
    assert {name: chosen[name] for name in expected} == expected


def test_a_launcher_that_is_not_installed_is_named() -> None:
    with pytest.raises(ConfigError, match=r"hydra/launcher=nobody: .*Could not find 'hydra/launcher/nobody'"):
        compose(["hydra/launcher=nobody", *SWEEP], multirun=True)


def flags(*overrides: str, multirun: bool = True) -> Namespace:
    return Namespace(overrides=list(overrides), multirun=multirun)


def test_a_launcher_is_refused_among_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    command_line._check_launcher(flags("hydra/launcher=ray"))
    several = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in several.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"hydra/launcher=ray starts processes of its own .* python -m trlhf --m"):
        command_line._check_launcher(flags("seed=0,1", "hydra/launcher=ray"))
    command_line._check_launcher(flags("hydra/launcher=basic"))
    command_line._check_launcher(flags("seed=0,1"))
    command_line._check_launcher(flags("hydra/launcher=ray", multirun=False))
