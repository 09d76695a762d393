"""The state of the rl stage between two steps: everything that a continued run needs, in one folder a step."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from trlhf import files
from trlhf.crew import together
from trlhf.distributed import barrier
from trlhf.errors import UserError
from trlhf.rl.anchors import Anchor
from trlhf.rl.health import Health, new_health, protected
from trlhf.roles import Role
from trlhf.run import CHECKPOINTS, StageDirectory
from trlhf.sharding import SHARES, hollow, is_share, put, read_shares, write_shares
from trlhf.targeting.pass_rates import Look, fit_prior

STATE = "state.pt"
REGULAR, EXTRA = "checkpoint", "stopped"  # of the steps where each run saves; of the one where this run was stopped
_log = logging.getLogger("trlhf")


class Learner(Protocol):
    """What PPO and DPO have in common for the loop."""

    def state_dict(self) -> dict[str, Any]:
        """Return the learner's state beside the policy's weights."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up that state."""
        ...


@dataclass
class Progress:
    """Where the loop stands.

    Attributes:
        round: number of the round that is under way, from 1.
        step: optimizer batches done in the whole stage.
        planned: whether this round's labels are bought and its samples archived.
        pass_rates: prompt id → last known pass rate.
        anchors: found in round 1; fewer as labels find some of their answers wrong.
        last: metrics of the last step.
        health: what the rules that stop the stage early remember.
        outlook: prompt id → what is expected of a prompt that no label decides: its pass rate, and the largest trust in
            the advantage of one of its samples.
        looks: prompt id → what its samples have shown of its pass rate.
        prior: coefficients of its label-free prior.
        drift: nats a response that the updates have moved the policy by, added up.
        liking: open prompt → probability that two of its samples are told apart, and mean trust in the advantages.
    """

    round: int = 1
    step: int = 0
    planned: bool = False
    pass_rates: dict[str, float] = field(default_factory=dict)
    anchors: list[Anchor] = field(default_factory=list)
    last: dict[str, float] = field(default_factory=dict)
    health: Health = field(default_factory=new_health)
    outlook: dict[str, tuple[float, float]] = field(default_factory=dict)
    looks: dict[str, Look] = field(default_factory=dict)
    prior: list[float] = field(default_factory=lambda: fit_prior(()))
    drift: float = 0.0
    liking: dict[str, tuple[float, float]] = field(default_factory=dict)


def folder_of(stage: StageDirectory, step: int, kind: str = REGULAR) -> Path:
    """Return where the checkpoint of a step is."""
    return stage.path / CHECKPOINTS / f"{kind}-{step}"


def save(
    stage: StageDirectory, policy: Role, learner: Learner, progress: Progress, keep: int, kind: str = REGULAR
) -> None:
    """Write the checkpoint of a step; once it is whole, those that are no longer needed go.

    Args:
        stage: the rl stage.
        policy: whose trainable weights are saved.
        learner: the rest of what learns.
        progress: where the loop stands.
        keep: how many regular ones stay, the newest; the protected ones stay beside them.
        kind: ``EXTRA`` for a step that another run would not save; it is only there to go on from, once.
    """
    anchors = [(a.prompt_id, list(a.prompt_ids), list(a.response_ids), a.answer) for a in progress.anchors]
    state = hollow(_weights(policy, learner)) | {"progress": {**vars(progress), "anchors": anchors}}
    with stage.new_directory(str(folder_of(stage, progress.step, kind).relative_to(stage.path))) as folder:
        if any(map(is_share, policy.trainable().values())):
            together(_write_shares, folder / SHARES, policy, learner)
        torch.save(state, folder / STATE)
    prune(stage, progress, keep)


def prune(stage: StageDirectory, progress: Progress, keep: int) -> None:
    """Delete the checkpoints that are no longer needed, so that a stopped run has the same as one that went on."""
    for path in _newest_first(stage, EXTRA):
        if _step(path) < progress.step or folder_of(stage, progress.step).exists():
            shutil.rmtree(path, ignore_errors=True)
    found = {_step(path): path for path in _newest_first(stage)}
    for step in set(list(found)[keep:]) - protected(progress.health, list(found)):
        shutil.rmtree(found[step], ignore_errors=True)


def load(stage: StageDirectory, policy: Role, learner: Learner, at_most: int | None = None) -> Progress | None:
    """Take up the newest checkpoint that can be read, or the newest regular one up to step ``at_most``.

    Those newer than it, which cannot be read, are deleted. None if there is none at all.

    Raises:
        UserError: there are checkpoints, and none can be read.
    """
    found = [path for path in _newest_first(stage) if at_most is None or _step(path) <= at_most]
    if at_most is None:
        found = sorted([*found, *_newest_first(stage, EXTRA)], key=_step, reverse=True)
    problems: list[tuple[Path, str]] = []
    for path in found:
        try:
            progress = _read(path / STATE, policy, learner)
        except Exception as error:  # a torn or foreign file fails in many ways
            reason = (str(error).splitlines() or [""])[0][:120]
            problems.append((path, f"{type(error).__name__}: {reason}"))
            continue
        for broken, reason in problems:
            _log.warning("%s cannot be read (%s); going on from %s instead", broken, reason, path.name)
            shutil.rmtree(broken, ignore_errors=True)
        return progress
    if problems:
        path, reason = problems[0]
        raise UserError(
            f"{path / STATE}: this checkpoint cannot be read ({reason})"
            f"{', and none before it' if len(problems) > 1 else ''}; delete the folder {path.parent} to start the rl "
            "stage again (labels already bought are kept)"
        )
    return None


def _read(path: Path, policy: Role, learner: Learner) -> Progress:
    state = torch.load(path, map_location="cpu", weights_only=True)
    kept = state["progress"]
    anchors = [Anchor(name, tuple(p), tuple(r), answer) for name, p, r, answer in kept.pop("anchors")]
    progress = Progress(**kept, anchors=anchors)
    together(_take_up, path, policy, learner, state=state)
    return progress


def _take_up(path: Path, policy: Role, learner: Learner, state: Mapping[str, Any] | None = None) -> None:
    """Give policy and learner a state: the leader, who has read it, and the others, who read it too."""
    if state is None:
        state = torch.load(path, map_location="cpu", weights_only=True)
    weights = policy.trainable()
    state = read_shares(path.parent / SHARES, state, next(iter(weights.values())))
    for name, parameter in weights.items():
        put(parameter, state["policy"][name])
    learner.load_state_dict(state["learner"])
    barrier()  # the leader may delete the file next


def _weights(policy: Role, learner: Learner) -> dict[str, Any]:
    trainable = {name: parameter.detach() for name, parameter in policy.trainable().items()}
    return {"policy": trainable, "learner": learner.state_dict()}


def _write_shares(folder: Path, policy: Role, learner: Learner) -> None:
    write_shares(folder, _weights(policy, learner))


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _newest_first(stage: StageDirectory, kind: str = REGULAR) -> list[Path]:
    """Return the folders of all checkpoints of a kind, also one that a kill cut short in its deletion."""
    folder = stage.path / CHECKPOINTS
    for aside in folder.glob(f".{kind}-*.old"):
        files.recover(folder / aside.name.removeprefix(".").removesuffix(".old"))
    found = [path for path in folder.glob(f"{kind}-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=_step, reverse=True)
