"""The state of the rl stage between two steps: everything that a continued run needs, in one folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from trlhf import files
from trlhf.errors import UserError
from trlhf.rl.anchors import Anchor
from trlhf.run import StageDirectory

NAME = "checkpoint"


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
    """

    round: int = 1
    step: int = 0
    planned: bool = False
    pass_rates: dict[str, float] = field(default_factory=dict)
    anchors: list[Anchor] = field(default_factory=list)


def save(stage: StageDirectory, policy: PreTrainedModel, learner: Learner, progress: Progress) -> None:
    """Write the checkpoint; it replaces the last one when it is complete."""
    trainable = {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}
    state = {
        "policy": trainable,
        "learner": learner.state_dict(),
        "progress": {
            "round": progress.round,
            "step": progress.step,
            "planned": progress.planned,
            "pass_rates": progress.pass_rates,
            "anchors": [(a.prompt_id, list(a.prompt_ids), list(a.response_ids), a.answer) for a in progress.anchors],
        },
    }
    with stage.new_directory(NAME) as folder:
        torch.save(state, folder / "state.pt")


def load(stage: StageDirectory, policy: PreTrainedModel, learner: Learner) -> Progress | None:
    """Take up the last checkpoint; None if there is none.

    Raises:
        UserError: it cannot be read.
    """
    files.recover(stage.path / NAME)
    path: Path = stage.path / NAME / "state.pt"
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location=policy.device, weights_only=True)
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(state["policy"][name])
        learner.load_state_dict(state["learner"])
        kept = state["progress"]
        anchors = [Anchor(name, tuple(p), tuple(r), answer) for name, p, r, answer in kept.pop("anchors")]
        return Progress(**kept, anchors=anchors)
    except Exception as error:  # a torn or foreign file fails in many ways
        raise UserError(
            f"{path}: this checkpoint cannot be read ({type(error).__name__}: {str(error).splitlines()[0][:120]}); "
            f"delete the folder {path.parent} to start the rl stage again (labels already bought are kept)"
        ) from error
