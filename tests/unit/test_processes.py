"""What launchers say in the environment, and what one process makes of code for several."""

from __future__ import annotations

import crew_cases
import pytest

from trlhf.crew import keep, leads_alone, release, together
from trlhf.errors import UserError
from trlhf.processes import launched, sharding

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
