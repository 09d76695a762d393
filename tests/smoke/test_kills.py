"""A whole run, killed three times and stopped once, as ``benchmarks/kill.py`` does it at full size: the same end."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import Popen

import pytest
from kill import QUICK
from same_end import differences, kept_labels, ledger_rows
from strike import Strike, start, strike

OVERRIDES = [*QUICK, "rl.advantage=gae", "rl.value_warmup_steps=1", "hardware.threads=1", "hardware.device=cpu"]


def comes(pattern: str) -> Callable[[set[str]], bool]:
    return lambda states: any(re.fullmatch(pattern, state) for state in states)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Popen[bytes]]]:
    """A run that nobody kills, beside the others."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    with start(run, OVERRIDES) as process:
        yield run, process
        process.kill()


@pytest.fixture(scope="module")
def struck(undisturbed: object, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Strike]]:
    """A twin of it, with what stood on its disk after each signal."""
    run = tmp_path_factory.mktemp("twin") / "run"
    kills = [
        strike(run, OVERRIDES, comes("writing sft/checkpoint-[2-4]")),
        strike(run, OVERRIDES, comes("asking rl/round_01.*")),
        strike(run, OVERRIDES, comes("rl step [3-7]"), lambda: 0.02),  # inside the next step
    ]
    kept = max(int(name.rpartition("-")[2]) for name in kills[-1].disk["checkpoints"] if "(" not in name)
    begun = comes(f"rl step [{kept + 1}-9]")  # a step of its own
    return run, [*kills, strike(run, OVERRIDES, begun, sent=signal.SIGTERM)]


def test_sigkill_met_it_on_the_way(struck: tuple[Path, list[Strike]]) -> None:
    _, (*kills, _) = struck
    assert [one.status for one in kills] == [-signal.SIGKILL] * 3
    assert [one.disk["complete"] for one in kills] == [[], ["sft", "reward"], ["sft", "reward"]]


def test_sigterm_lets_the_step_end_and_saves_it(struck: tuple[Path, list[Strike]]) -> None:
    _, (*_, stopped) = struck
    steps = stopped.disk["steps"]["rl"]
    told = f"trlhf: stopped by SIGTERM at step {steps} of the rl stage; the same command goes on from there"
    assert stopped.status == 143 and stopped.output[-1] == told
    saved = {f"rl/checkpoint-{steps}", f"rl/stopped-{steps}"}  # the second where no other run saves
    assert saved & set(stopped.disk["checkpoints"]) and not stopped.disk["half_written"]


def test_the_same_command_again_ends_the_same(
    struck: tuple[Path, list[Strike]], undisturbed: tuple[Path, Popen[bytes]]
) -> None:
    run, strikes = struck
    other, process = undisturbed
    assert start(run, OVERRIDES).wait() == process.wait() == 0
    compared = differences(run, other)
    assert {name: difference for name, difference in compared.items() if difference} == {}
    assert {"rl/model/model.safetensors", "rl/metrics.jsonl", "ledger.sqlite", "summary.json"} <= compared.keys()
    after = ledger_rows(run / "ledger.sqlite")
    assert len(after["answers"]) == len(after["questions"]) == 20
    assert [kept_labels(one.ledger, after) for one in strikes] == [(0, 0)] * 4
