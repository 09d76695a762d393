"""Two processes of which one leads: what they do together, and that any error ends both with one clear message."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import crew_cases
import pytest

Ended = tuple[int, str, str]  # status, standard output, standard error


def launch(case: str, other: str | None = None) -> list[Ended]:
    """Run a case in two processes, as a launcher would start them; ``other`` is what the second is told instead."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(crew_cases.__file__).parents[1])}
    processes = [
        subprocess.Popen(
            [sys.executable, crew_cases.__file__, (other or case) if rank else case],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    ended = []
    for process in processes:
        output, errors = process.communicate(timeout=120)
        ended.append((process.returncode, output, "\n".join(x for x in errors.splitlines() if "[rank" not in x)))
    return ended


def test_two_processes_share_what_is_worth_it() -> None:
    leader, follower = launch("works")
    assert leader == (0, "all is well\n", "") and follower == (0, "", "")


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("the leader alone fails", "the leader's error"),
        ("all fail alike", "the same error"),
        ("the other fails", "process 1 of 2: the other's error"),
        ("the leader fails among all", "the leader's error"),
    ],
)
def test_one_message_is_printed_and_both_end(case: str, told: str) -> None:
    leader, follower = launch(case)
    assert leader == (2, "", f"trlhf: {told}") and follower == (2, "", "")


def test_other_arguments_are_refused() -> None:
    leader, follower = launch("works", other="stopped")
    told = "trlhf: process 1 of 2 was started with other arguments than this one, which leads (works stopped); give"
    assert leader[0] == 2 and leader[2].startswith(told) and follower[0] != 0


def test_a_bug_shows_its_traceback_and_where_it_was() -> None:
    leader, follower = launch("the other has a bug")
    assert leader == (2, "", "trlhf: process 1 of 2: ValueError: a bug")
    assert follower[0] == 1 and "Traceback" in follower[2] and follower[2].endswith("ValueError: a bug")


def test_a_process_that_is_killed_is_missed() -> None:
    leader, follower = launch("the other is killed")
    assert leader[0] == 2 and leader[2].startswith("trlhf: another of the 2 processes has gone without a word (killed")
    assert follower == (-9, "", "")


def test_sigterm_waits_for_what_all_do() -> None:
    leader, follower = launch("stopped")
    assert leader == (143, "", "trlhf: stopped by SIGTERM; the same command goes on from what is on disk")
    assert follower == (143, "", "")


def test_sigterm_lets_a_loop_save_in_both() -> None:
    leader, follower = launch("told to stop")
    told = "trlhf: stopped by SIGTERM at step 3 of the rl stage; the same command goes on from there"
    assert leader == (143, "both: [True, True]\n", told)
    assert follower == (143, "", "")
