"""What launchers say in the environment, and what one process makes of code for several."""

from __future__ import annotations

import json
from pathlib import Path

import crew_cases
import pytest

from trlhf.config import build_config
from trlhf.crew import keep, leads_alone, release, together
from trlhf.errors import UserError
from trlhf.launch import check_launch, warn_of_launch
from trlhf.processes import launched, sharding, zero_stage

SEVERAL = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def test_alone_it_is_a_plain_call() -> None:
    assert together(crew_cases.total, [1.0, 2.0]) == 3.0 and not leads_alone()
    pair = keep(crew_cases.make, 2, note="mine")
    assert pair.names == ["mine of 0"]
    release()


def test_a_launcher_says_which_process_this_is() -> None:
    assert launched({}) == launched({"WORLD_SIZE": "1", "RANK": "0"}) == (0, 1)
    assert launched(SEVERAL) == (1, 2)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"RANK": ""},
            "WORLD_SIZE=2 says that this is one of 2 processes, but RANK is not set; start trlhf with torchr",
        ),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "MASTER_ADDR, MASTER_PORT is not set; .* or unset WORLD_SIZE"),
        ({"RANK": "2"}, "RANK=2 must be in 0 … 1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' must be a number"),
    ],
)
def test_leftovers_of_a_launcher_are_refused(changes: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        launched(SEVERAL | changes)


def test_accelerate_on_a_cpu_starts_one_process_whatever_it_is_asked_for() -> None:
    left_by_accelerate = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    with pytest.raises(UserError, match=r"accelerate launch --cpu starts one process alone.*use torchrun"):
        launched(left_by_accelerate)
    assert launched({"ACCELERATE_USE_CPU": "True"}) == (0, 1)


def test_how_accelerate_divides_models() -> None:
    assert sharding({}) == sharding({"ACCELERATE_USE_FSDP": "false"}) == "none"
    assert sharding({"ACCELERATE_USE_FSDP": "true"}) == "fsdp1"
    assert sharding({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}) == "fsdp2"
    assert sharding({"ACCELERATE_USE_DEEPSPEED": "true"}) == "deepspeed"


def test_which_zero_stage_deepspeed_has(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    assert zero_stage({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none"}) == 1
    assert zero_stage({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}) == 3
    file.write_text("zero")
    with pytest.raises(UserError, match=r"zero.json .*cannot be read"):
        zero_stage({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    ("environment", "values", "told"),
    [
        (DEEPSPEED, {}, r"DeepSpeed .*stage=all cannot run under it, since the updates of reward and rl"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {"stage": "sft"}, "ZeRO 3 .*use zero_stage: 2"),
        (
            {"ACCELERATE_USE_FSDP": "true"},
            {"stage": "sft"},
            "FSDP 1 .*write distributed_type: FSDP with fsdp_version: 2",
        ),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "Megatron-LM .*or distributed_type: MULTI_GPU"),
        (FSDP2, {"reward": {"finetune": "full"}}, "reward.finetune=full trains a whole copy in every process"),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params: true .*set it to false"),
        (
            {},
            {"sft": {"batch_size": 5, "microbatch_size": 1}},
            "sft.batch_size=5 must be divisible by .* processes, 2.*=4",
        ),
    ],
)
def test_what_a_launch_cannot_do_is_said_first(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], values: dict[str, object], told: str
) -> None:
    for name, value in (SEVERAL | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told):
        check_launch(build_config(values))


def test_what_a_launch_can_do_passes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name, value in (SEVERAL | FSDP2).items():
        monkeypatch.setenv(name, value)
    check_launch(build_config({"hardware": {"device": "cpu"}}))
    warn_of_launch(build_config({"hardware": {"device": "cpu"}}))
    assert "in sft every process holds the whole model; rl divides them" in caplog.text
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    for name, value in DEEPSPEED.items():
        monkeypatch.setenv(name, value)
    check_launch(build_config({"stage": "sft"}))
