"""The runs behind ``failure_modes.py``: arms, worlds, and what is measured of a run beyond accuracy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from failure_worlds import OddTask, World, length_biased, length_lover, living_in
from label_arms import ARMS, COMMON, SCHEDULE, Arm, Cell
from label_cells import Grid, answer_test, make_reward, make_sft, run_cell

from trlhf.config import Config
from trlhf.evaluation.answers import same_answer
from trlhf.files import new_directory, read_json, read_jsonl
from trlhf.ledger import Ledger
from trlhf.run import CHECKPOINTS, RunDirectory, StageDirectory
from trlhf.types import Label

if TYPE_CHECKING:
    from trlhf.evaluation.evaluate import Evaluation

# Half the steps of label_efficiency.py, so that all rows take about an hour of one core.
SIZE = (*COMMON, *SCHEDULE, "rl.steps_per_round=4")
# Nothing but the reward model's mean decides, and nothing holds the policy back.
_BELIEVED = (
    *("targeting=uniform", "rl.unverified_share=1", "rl.unverified_reward=reward_model", "rl.uncertainty_penalty=0"),
    *("rl.kl_coef=0", "rl.anchor_coef=0", "rl.max_kl=null"),
)
MODE_ARMS: Mapping[str, Arm] = {
    **{name: ARMS[name] for name in ("sft", "full", "uniform_ppo", "scrambled")},
    "dpo": Arm("DPO as it comes", ("rl=dpo", "rl.open_share=0.1")),
    "believed": Arm("the reward model alone, no guard", (*_BELIEVED, "rl.held_out_patience=0")),
    "guarded": Arm("the reward model alone, held-out accuracy watched", (*_BELIEVED, "rl.held_out_patience=2")),
}
EVERY_ROUND = 100  # rl.save_total_limit of runs whose accuracy is measured at every checkpoint
# All labels are bought first, so that few candidates are sampled in the rounds.
_LONG = (
    *("rl.rounds=8", "rl.steps_per_round=4", "rl.save_steps=4"),
    *("reward.samples_per_prompt=4", "targeting.candidates=16", f"rl.save_total_limit={EVERY_ROUND}"),
)
_ASKING = ("rl.rounds=6", "rl.steps_per_round=1")  # many rounds of labels, hardly a step
WORLDS: Mapping[str, World] = {
    "clean": World(),
    "with_taste": World(("targeting.preference_share=0.3", "rl.open_share=0.2")),  # the defaults of both
    "junk": World(junk=True),
    **{f"noise_{share}": World((f"labeler.noise=0.{share}",)) for share in (10, 20, 30)},
    "length_biased": World(person=length_biased),
    "length_lover": World(("targeting.preference_share=0.5", "rl.open_share=0.5"), person=length_lover),
    "all_at_once": World(_LONG, first=int),
    "asking": World(_ASKING),
    "noisy_trust": World(_ASKING, noisy_trust=True),
}


@dataclass(frozen=True)
class Site:
    """A cell in a world."""

    world: str
    arm: str
    budget: int
    seed: int

    @property
    def name(self) -> str:
        """Return what it is called in results."""
        return f"{self.world}/{Cell(self.arm, self.budget, self.seed).name}"

    @property
    def cell(self) -> Cell:
        """Return the cell in its world's grid."""
        return Cell(self.arm, self.budget, self.seed)


def grid_of(folder: Path, site: Site, overrides: tuple[str, ...], commit: str) -> Grid:
    """Return the grid of a site's world; the clean world's is the folder itself.

    Args:
        folder: of all worlds.
        site: whose grid it is.
        overrides: of every run in every world, after the world's own.
        commit: of the code.
    """
    world = WORLDS[site.world]
    place = folder if site.world == "clean" else folder / "worlds" / site.world
    grid = Grid(place, (*SIZE, *world.overrides, *overrides), commit=commit, arms=MODE_ARMS)
    return grid if world.first is None else replace(grid, first=world.first)


def prepare(folder: Path, site: Site, overrides: tuple[str, ...], commit: str) -> None:
    """Make what a site's cell begins with: its seed's SFT model, which all worlds share, and its first labels."""
    grid = grid_of(folder, site, overrides, commit)
    make_sft(replace(grid, folder=folder), site.seed)
    if not grid.source(site.seed).exists():
        with new_directory(grid.source(site.seed)) as fresh:
            shutil.copytree(folder / "sources" / f"seed-{site.seed}" / "sft", fresh / "sft")
    budget = grid.budget_of_source(site.cell)
    if budget is not None:
        with living_in(WORLDS[site.world]):
            make_reward(grid, site.seed, budget)


def run_site(folder: Path, site: Site, overrides: tuple[str, ...], commit: str) -> dict[str, Any]:
    """Run a site's cell, whose beginnings are there, and return its figures."""
    grid = grid_of(folder, site, overrides, commit)
    before = _labels(grid.run(site.cell)) or _labels(grid.source(site.seed, grid.budget_of_source(site.cell)))
    with living_in(WORLDS[site.world]) as loaded, _keeping_checkpoints():
        more = partial(measure, loaded=loaded, asked_before=len(before))
        return run_cell(replace(grid, more=more), site.cell)


@contextmanager
def _keeping_checkpoints() -> Iterator[None]:
    """Leave a complete stage's checkpoints where they are: `measure` reads them, and the cell's end deletes them."""
    with mock.patch.object(StageDirectory, "tidy", lambda _: None):
        yield


def measure(
    config: Config, answered: Evaluation, run: Path, loaded: list[tuple[Config, OddTask]], asked_before: int
) -> dict[str, Any]:
    """Return what ``failure_modes.py`` needs of a cell beside what every cell has.

    Args:
        config: of the cell.
        answered: the responses to the test prompts.
        run: its directory; an arm without an rl stage has none.
        loaded: the tasks that its stages read.
        asked_before: labels in the ledger before the rl stage (of this process) began.
    """
    task = loaded[-1][1]
    assert task.taste is not None
    pairs = list(zip(answered.prompts, answered.rollouts, strict=True))
    figures: dict[str, Any] = {
        "tokens": [len(rollout.token_ids) for _, rollout in pairs],
        "kinds": [prompt.kind for prompt, _ in pairs],
        "right": [answered.correct.get(prompt.id) for prompt, _ in pairs],
        "taste": [task.taste(prompt, x.text) if prompt.task == "open" else None for prompt, x in pairs],
    }
    if not (run / "ledger.sqlite").exists():
        return figures
    labels = _labels(run)
    training = [known for other, known in loaded if other.stage == "rl"]
    figures |= {
        "label_errors": _errors(labels, dict.items(task._pool_answers)),
        "junk": _junk(labels),
        "rounds": _rounds(run),
        "steps": _steps(run),
        "calls": {
            "labels": len(labels) - asked_before,
            "labeler": sum(person.calls for known in training for person in known.given),  # type: ignore[attr-defined]
            "pool_answers_read": sum(known._pool_answers.reads for known in training),  # type: ignore[attr-defined]
            "test_answers_read": sum(known.test_answers.reads for known in training),  # type: ignore[attr-defined]
        },
    }
    if config.rl.save_total_limit == EVERY_ROUND:
        figures["curve"] = _curve(config, run)
    return figures


def _labels(run: Path) -> list[Label]:
    if not (run / "ledger.sqlite").exists():
        return []
    with Ledger(run / "ledger.sqlite", float(10**9)) as ledger:
        return ledger.labels()


def _errors(labels: list[Label], gold: Any) -> dict[str, float]:
    """Return how many verdicts there are, and how many say the opposite of the truth."""
    answers = dict(gold)
    verdicts = [label for label in labels if label.kind == "verdict"]
    wrong = sum((x.outcome == "right") != same_answer(x.answer or "", answers[x.prompt_id]) for x in verdicts)
    return {"verdicts": len(verdicts), "flipped": wrong, "share": wrong / max(1, len(verdicts))}


def _junk(labels: list[Label]) -> dict[str, float]:
    """Return how many verdicts of the rl stage there are, and how many are about junk, by kind."""
    bought = [label for label in labels if label.round and label.kind == "verdict"]
    kinds = [label.prompt_id.split("/")[1] for label in bought if label.prompt_id.startswith("junk/")]
    return {"verdicts": len(bought), "junk": len(kinds), **{kind: kinds.count(kind) for kind in sorted(set(kinds))}}


def _rounds(run: Path) -> list[dict[str, Any]]:
    """Return of each round what it decided and estimated."""
    kept = (
        *("round", "labels_bought", "budget_left", "trust_test", "fallback", "estimated_flip_rate"),
        *("repeated_verdicts", "refused_by_gate", "judged_with_trust", "labels_stopped"),
    )
    found = [read_json(path) for path in sorted(run.glob("rl/round_??.json"))]
    for number, entry in enumerate(found, 1):
        path = run / "rl" / f"round_{number:02d}_predictions.jsonl"
        rows = read_jsonl(path) if path.exists() else []
        entry["uniform_verdicts"] = sum(row["part"] == "uniform" for row in rows)
        entry["held_out_accuracy"] = (entry.get("held_out") or {}).get("accuracy")
    kept = (*kept, "uniform_verdicts", "held_out_accuracy")
    return [{name: entry.get(name) for name in kept} for entry in found]


def _steps(run: Path) -> list[dict[str, Any]]:
    """Return of each step what training saw of itself."""
    kept = ("step", "round", "reward", "kl_per_response", "chosen_log_ratio", "rejected_logprob", "chosen_logprob")
    path = run / "rl" / "metrics.jsonl"
    return [{name: row.get(name) for name in kept} for row in read_jsonl(path)] if path.exists() else []


def _curve(config: Config, run: Path) -> list[dict[str, Any]]:
    """Return the test accuracy of every checkpoint after the first step, with each prompt's result."""
    import torch

    stage = RunDirectory(run).stage("rl")
    found = []
    paths = {int(path.name.rpartition("-")[2]): path for path in stage.path.glob(f"{CHECKPOINTS}/checkpoint-*")}
    for step, path in sorted(paths.items()):
        if not step:
            continue
        weights = torch.load(path / "state.pt", map_location="cpu", weights_only=True)["policy"]
        answered, _ = answer_test(run / "sft" / "model", config, weights)
        right = answered.reasoning()
        found.append({"step": step, "accuracy": sum(right) / len(right), "correct": right})
    return found
