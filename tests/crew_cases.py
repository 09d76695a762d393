"""What a few processes do together, well or badly; `unit/test_crew.py` starts them and looks.

RANK=… WORLD_SIZE=… MASTER_ADDR=… MASTER_PORT=… LOCAL_RANK=0 python tests/crew_cases.py CASE
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import trlhf.__main__ as command_line
from trlhf import preemption
from trlhf.crew import keep, leads_alone, release, together
from trlhf.distributed import any_rank, gather, share, sum_counts, world
from trlhf.errors import UserError


@dataclass
class Pair:
    """Two things that live in every process."""

    model: torch.nn.Linear
    names: list[str]

    def rank_and_name(self, name: str) -> list[Any]:
        self.names.append(name)
        return gather((world()[0], self.names))


def make(size: int, note: str = "the default") -> Pair:
    return Pair(torch.nn.Linear(size, 1), [f"{note} of {world()[0]}"])


def total(numbers: list[float]) -> float:
    return sum_counts({"sum": sum(share(numbers))})["sum"]


def shape_of(model: torch.nn.Linear) -> list[Any]:
    return gather(tuple(model.weight.shape))


def nested(numbers: list[float]) -> float:
    assert not leads_alone()
    return together(total, numbers) + together(total, numbers)


def count_kept() -> list[int]:
    from trlhf import crew

    assert crew._crew is not None
    return gather(len(crew._crew._kept))


def fail_on(rank: int, error: BaseException) -> None:
    if world()[0] == rank or rank < 0:
        raise error
    gather(None)  # the others wait for it


def die_on(rank: int) -> None:
    if world()[0] == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    gather(None)


def works() -> None:
    assert world() == (0, 1) and leads_alone()
    assert together(total, [1.0, 2.0, 3.0]) == 6.0
    pair = keep(make, 3, note="the leader's")
    assert together(pair.rank_and_name, "x") == [(0, ["the leader's of 0", "x"]), (1, ["the default of 1", "x"])]
    assert together(shape_of, pair.model) == [(1, 3), (1, 3)]
    assert together(nested, [1.0, 2.0]) == 6.0
    assert together(any_rank, False) is False and together(count_kept) == [1, 1]
    try:
        together(shape_of, torch.nn.Linear(2, 1))
    except TypeError as error:
        assert "Linear is in this process alone; make it with trlhf.crew.keep" in str(error)
    else:
        raise AssertionError("a model was sent")
    release()
    assert together(count_kept) == [0, 0]
    print("all is well")


def sleeps_through_sigterm(seconds: float) -> list[bool]:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(seconds)
    return gather(preemption.requested())


def stopped() -> None:
    """SIGTERM comes while all are at work: they finish it, and then the leader stops."""
    with preemption.watch():
        print(together(sleeps_through_sigterm, 0.1))
        print("never reached")


def told_to_stop() -> None:
    """SIGTERM comes while all are at work, in a loop that saves before it stops."""
    with preemption.watch(), preemption.patient():
        print("both:", together(sleeps_through_sigterm, 0.1))
        raise preemption.Preempted.at("rl", 3)


CASES: dict[str, Callable[[], object]] = {
    "works": works,
    "the leader alone fails": lambda: together(total, [1.0]) and (_ for _ in ()).throw(UserError("the leader's error")),
    "all fail alike": lambda: together(fail_on, -1, UserError("the same error")),
    "the other fails": lambda: together(fail_on, 1, UserError("the other's error")),
    "the leader fails among all": lambda: together(fail_on, 0, UserError("the leader's error")),
    "the other has a bug": lambda: together(fail_on, 1, ValueError("a bug")),
    "the other is killed": lambda: together(die_on, 1),
    "stopped": stopped,
    "told to stop": told_to_stop,
}

if __name__ == "__main__":
    case = CASES[sys.argv[1]]
    command_line._main = lambda _arguments: case()
    command_line.main()
