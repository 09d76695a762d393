"""The claim that a run may be killed at any moment, measured: SIGKILL, the same command again, and the same end.

    python benchmarks/kill.py            PPO and DPO, 20 moments in all (half an hour on two idle cores)
    python benchmarks/kill.py --quick    the same on very small sizes, whose phases are too short to meet all of them

An undisturbed run of each algorithm tells what stands on disk when. Then two twins of each are killed five times in a
row, and once asked to stop with SIGTERM: in every phase at least once, the rest at random times. Phases are seen from
outside, on disk; where one was over before the signal came, it is tried again later. In the end every file is
compared, bit for bit but for times.
"""

from __future__ import annotations

import argparse
import random
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from provenance import RESULTS, ROOT, commit, from_root, provenance
from same_end import TIMES, differences, kept_labels, ledger_rows
from strike import POLL, Disk, Strike, Trigger, start, strike

from trlhf.files import read_jsonl, write_json

ALGORITHMS = ("ppo", "dpo")
QUICK = (
    *("data.sft_prompts=48", "data.pool_prompts=48", "data.test_prompts=12", "sft.epochs=1", "sft.batch_size=8"),
    *("sft.microbatch_size=8", "sft.save_steps=2", "reward.labels=10", "reward.samples_per_prompt=4", "rl.rounds=2"),
    *("rl.steps_per_round=4", "rl.save_steps=2", "rl.prompts_per_step=6", "rl.samples_per_prompt=4"),
    *("rl.minibatch_size=12", "rl.microbatch_size=12", "rl.max_new_tokens=16", "rl.unverified_share=0.3"),
    *("targeting.samples_per_prompt=4", "targeting.candidates=12", "targeting.budget=20"),
    *("evaluation.max_new_tokens=24", "labeler.noise=0.4"),
)
ANY = "any time"
# Phase → what stands on disk while it lasts, and which part of the time until the next state belongs to it.
PHASES = {
    "sft": (r"sft step \d+", 0.0, 1.0),
    "sft checkpoint": (r"writing sft/checkpoint-\d+", 0.0, 0.6),
    "reward samples": (r"reward/begun", 0.05, 0.6),
    "reward labels": (r"asking reward/.*", 0.0, 0.05),  # then the reward model is loaded
    "reward fit": (r"reward/split.jsonl", 0.05, 0.6),
    "rl candidates": (r"(?:rl/begun|rl step \d+)(?=\nrl/round_\d+_samples.jsonl)", 0.05, 0.6),
    "rl labels": (r"asking rl/.*", 0.0, 0.4),
    "rl update": (r"rl step \d+(?=\nrl step)", 0.6, 0.95),  # behind no checkpoint; a step samples first
    "rl checkpoint": (r"writing rl/checkpoint-\d+", 0.0, 0.6),
    "rl model": (r"writing rl/model", 0.0, 0.6),
    "eval": (r"eval/(?!done).*", 0.0, 0.6),
}
# The moments of two twins of each algorithm; together they meet every phase.
PLAN = {
    ("ppo", 1): ("sft", "reward labels", "rl candidates", "rl update", ANY, "SIGTERM rl update"),
    ("ppo", 2): ("reward samples", "reward fit", "rl checkpoint", "rl model", ANY),
    ("dpo", 1): ("sft checkpoint", "reward fit", "rl update", "eval", ANY, "SIGTERM sft"),
    ("dpo", 2): ("reward samples", "rl candidates", "rl labels", "rl checkpoint", ANY),
}
ATTEMPTS = 3  # at a phase that was over before the signal came
Timeline = Mapping[str, float]  # state → seconds after the start when it was first seen, in order


@dataclass(frozen=True)
class Moment:
    """When to strike.

    Attributes:
        at: seconds after the start, in the undisturbed run.
        state: what stands on disk by then.
        delay: seconds after that was seen.
        of_step: instead, a share of the time that the last step took: two runs need not meet the same load.
    """

    at: float
    state: str
    delay: float
    of_step: float | None = None


def watch(run: Path, overrides: Sequence[str]) -> dict[str, float]:
    """Do an undisturbed run; return its timeline, which ends in ``end``."""
    disk, begun = Disk(run, time.time()), time.monotonic()
    process, timeline, before = start(run, overrides), {"start": 0.0}, set[str]()
    while process.poll() is None:
        states = disk.states()
        whole = {state.replace("writing", "wrote") for state in before - states if state.startswith("writing")}
        for state in (*sorted(whole), *sorted(states - timeline.keys())):
            timeline[state] = time.monotonic() - begun
        before = states
        time.sleep(POLL)
    write_json(run.with_name(f"{run.name}.timeline.json"), timeline)
    if process.returncode:
        sys.exit(f"{run}: the undisturbed run ended with status {process.returncode}; see {run}.txt")
    return {**timeline, "end": time.monotonic() - begun}


def moments(phase: str, timeline: Timeline, rng: random.Random) -> list[Moment]:
    """Return every place of a phase in the timeline, with a random delay each; for ``any time`` one random time."""
    pattern, low, high = PHASES.get(phase, ("", 0.0, 0.0))
    all_of_it = phase in ("sft checkpoint", "rl update", "rl checkpoint", "rl model")
    seen = [(state, at) for state, at in timeline.items() if all_of_it or not state.startswith(("writing", "wrote"))]
    if phase == ANY:
        at = rng.uniform(0, seen[-1][1])
        state, before = [entry for entry in seen if entry[1] <= at][-1]
        return [Moment(at, state, at - before)]
    found = []
    for (state, at), (following, then) in pairwise(seen):
        match = re.match(pattern, f"{state}\n{following}")
        if match and match[0] == state:
            share = rng.uniform(low, high)
            delay = share * (then - at)
            found.append(Moment(at + delay, state, delay, share if phase == "rl update" else None))
    return found


def reached(state: str, timeline: Timeline) -> Trigger:
    """Return what says whether a run has come to a state of the timeline, or beyond it."""
    order = {name: place for place, name in enumerate(timeline)}
    return lambda states: any(order.get(name, -1) >= order[state] for name in (*states, "start"))


def twin(algorithm: str, number: int, folder: Path, overrides: Sequence[str], timeline: Timeline) -> dict[str, Any]:
    """Strike a run at its moments, one after the other, let it end, and compare it with the undisturbed one."""
    rng = random.Random(f"{algorithm} {number}")
    run = folder / f"{algorithm}-{number}"
    aims = [(name, moments(name.removeprefix("SIGTERM "), timeline, rng)) for name in PLAN[algorithm, number]]
    planned = [(rng.choice(places[: len(places) // 2 + 1]), name) for name, places in aims if places]  # some are left
    strikes: list[tuple[Strike, dict[str, Any]]] = []
    for moment, name in sorted(planned, key=lambda entry: entry[0].at):
        strikes += _meet(run, overrides, timeline, name, moment, rng)
    status = start(run, overrides).wait()
    end = ledger_rows(run / "ledger.sqlite")
    kept = [kept_labels(struck.ledger, end) for struck, _ in strikes]
    files = differences(run, folder / algorithm) if status == 0 else {"all": f"the last process ended with {status}"}
    record = {
        "algorithm": algorithm,
        "twin": number,
        "signals": [record for _, record in strikes],
        "status": status,
        "labels_lost": sum(lost for lost, _ in kept),
        "labels_asked_twice": sum(again for _, again in kept),
        "identical": not any(files.values()),
        "files": {name: difference or "identical" for name, difference in files.items()},
    }
    print(f"{algorithm} twin {number}: {len(strikes)} signals, identical: {record['identical']}", flush=True)
    return record


def _meet(
    run: Path, overrides: Sequence[str], timeline: Timeline, name: str, moment: Moment, rng: random.Random
) -> list[tuple[Strike, dict[str, Any]]]:
    """Strike at a moment, and again at a later place of its phase where the phase was over before the signal came."""
    phase = name.removeprefix("SIGTERM ")
    sent = signal.SIGKILL if phase == name else signal.SIGTERM
    order = {state: place for place, state in enumerate(timeline)}
    done = []
    for _ in range(ATTEMPTS):
        struck = strike(run, overrides, reached(moment.state, timeline), partial(_delay, run, moment), sent)
        newest = max((state for state in struck.states if state in order), key=order.__getitem__, default="start")
        met = struck.sent is not None and (sent == signal.SIGTERM or _is_in(phase, moment, struck.states, order))
        done.append((struck, _record(name, moment, struck, met)))
        print(f"{run.name}: {name} at {moment.state}{'' if met else ', not met'}", flush=True)
        later = [place for place in moments(phase, timeline, rng) if order[place.state] > order[newest]]
        if met or struck.sent is None or not later:
            break
        moment = later[0]
    return done


def _delay(run: Path, moment: Moment) -> float:
    steps = read_jsonl(run / "rl" / "metrics.jsonl") if moment.of_step is not None else []
    return moment.delay if moment.of_step is None or not steps else moment.of_step * float(steps[-1]["seconds"])


def _is_in(phase: str, moment: Moment, states: set[str], order: Mapping[str, int]) -> bool:
    """Say whether a killed run had not yet left a phase."""
    if phase == ANY or moment.state.startswith("writing"):
        return phase == ANY or moment.state in states
    return not any(order.get(x, -1) > order[moment.state] for x in states if not x.startswith("writing"))


def _record(name: str, moment: Moment, struck: Strike, met: bool) -> dict[str, Any]:
    stopped = struck.sent == signal.SIGTERM
    return {
        "phase": name,
        "signal": struck.sent.name if struck.sent else None,
        "met": met,
        "waited_for": moment.state,
        "delay": round(struck.delay, 4),
        "seconds_into_process": round(struck.seconds, 2),
        "status": struck.status,
        **({"seconds_to_end": round(struck.seconds_to_end, 2), "said": struck.output[-1:]} if stopped else {}),
        "disk": struck.disk,
    }


def summarise(twins: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the claim comes to: kills, phases met, and whether all ended the same and no label was lost."""
    signals = [record for one in twins for record in one["signals"]]
    kills = [record for record in signals if record["signal"] == "SIGKILL"]
    stops = [record for record in signals if record["signal"] == "SIGTERM"]
    met = {phase: sum(record["met"] for record in kills if record["phase"] == phase) for phase in (*PHASES, ANY)}
    summary = {
        "kills": len(kills),
        "phases_met": met,
        "phases_missed": [phase for phase, times in met.items() if not times],
        "identical": all(one["identical"] for one in twins),
        "labels_lost": sum(one["labels_lost"] for one in twins),
        "labels_asked_twice": sum(one["labels_asked_twice"] for one in twins),
        "sigterm_status": [record["status"] for record in stops],
    }
    passed = summary["identical"] and not summary["labels_lost"] and not summary["labels_asked_twice"]
    return summary | {"passed": passed and set(summary["sigterm_status"]) <= {128 + signal.SIGTERM}}


def main() -> int:
    """Parse the command line, do the runs and write the results; 1 when a run did not end the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="very small sizes")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, on one thread each")
    parser.add_argument("--folder", type=Path, help="of the runs, a new one (default: runs/kill/<commit>)")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/kill.json, with --quick in the folder")
    parser.add_argument("overrides", nargs="*", help="further overrides of every run, after --")
    arguments = parser.parse_args()
    folder = (arguments.folder or ROOT / "runs" / "kill" / commit()).resolve()
    output = arguments.output or (folder if arguments.quick else RESULTS) / "kill.json"
    overrides = [*(QUICK if arguments.quick else ()), "hardware.threads=1", "hardware.device=cpu", *arguments.overrides]
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder}: holds something; delete it, or give another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {**provenance(), "overrides": overrides, "left_out": sorted(TIMES)}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        each = {name: [f"rl={name}", *overrides] for name in ALGORITHMS}
        undisturbed = {name: pool.submit(watch, folder / name, each[name]) for name in ALGORITHMS}
        timelines = {name: future.result() for name, future in undisturbed.items()}
        results["undisturbed_seconds"] = {name: round(timeline["end"], 1) for name, timeline in timelines.items()}
        waiting = [pool.submit(twin, name, n, folder, each[name], timelines[name]) for name, n in PLAN]
        results["twins"] = [future.result() for future in waiting]
    results = {**results, **summarise(results["twins"])}
    write_json(output, results)
    shown = {name: results[name] for name in summarise([])}
    print("\n".join(f"{name}: {value}" for name, value in shown.items()) + f"\nwritten to {from_root(output)}")
    return 0 if results["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
