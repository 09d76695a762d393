"""One cell of ``label_efficiency.py``: the rl stage on its labels, from stages that all arms share; then evaluation."""

from __future__ import annotations

import gc
import shutil
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from label_arms import ARMS, BUDGETS, Arm, Cell, first_labels
from upper_bound import buy_everything, with_values

import trlhf
from trlhf.compose import compose
from trlhf.config import Config
from trlhf.errors import UserError
from trlhf.files import new_directory, read_json, write_json
from trlhf.ledger import Ledger
from trlhf.pipeline import run_pipeline
from trlhf.run import RunDirectory

if TYPE_CHECKING:
    from torch import Tensor

    from trlhf.evaluation.evaluate import Evaluation

NOTHING_TO_LEARN = "rl: no prompt can be learned from"  # how the rl stage begins to say so


@dataclass(frozen=True)
class Grid:
    """Where cells live, and what they share.

    Attributes:
        folder: of this grid: ``cells/`` (one JSON file each), ``sources/`` and ``runs/`` (run directories).
        overrides: of every run.
        keep: whether a finished cell's models stay on disk.
        commit: of the code.
        arms: by name.
        first: how many labels of a budget the reward stage buys.
        more: figures of a cell beside the usual ones, from its configuration, its responses to the test prompts and its
            run directory, whose models are still there.
    """

    folder: Path
    overrides: tuple[str, ...]
    keep: bool = False
    commit: str = "unknown"
    arms: Mapping[str, Arm] = field(default_factory=lambda: ARMS)
    first: Callable[[int], int] = first_labels
    more: Callable[[Config, Evaluation, Path], dict[str, Any]] | None = None

    def file(self, cell: Cell) -> Path:
        """Return where a finished cell's figures are."""
        return self.folder / "cells" / f"{cell.name}.json"

    def run(self, cell: Cell) -> Path:
        """Return a cell's run directory."""
        return self.folder / "runs" / cell.name

    def source(self, seed: int, budget: int | None = None) -> Path:
        """Return the run directory with a seed's sft stage or, with a budget, also the reward stage that is its."""
        return self.folder / "sources" / (f"seed-{seed}" if budget is None else f"seed-{seed}-{budget}")

    def found(self, cell: Cell) -> dict[str, Any] | None:
        """Return a finished cell's figures, None where it is not finished.

        Raises:
            UserError: it was made with other overrides.
        """
        if not self.file(cell).exists():
            return None
        record: dict[str, Any] = read_json(self.file(cell))
        if record["overrides"] != self.overrides_of(cell):
            raise UserError(f"{self.file(cell)}: was made with other overrides; give another --folder, or delete it")
        return record

    def budget_of_source(self, cell: Cell) -> int | None:
        """Return the budget whose reward stage a cell begins with; None where it needs no more than the sft stage."""
        if self.arms[cell.arm].model != "rl":
            return None
        return cell.budget if cell.budget > 0 else BUDGETS[0]

    def overrides_of(self, cell: Cell) -> list[str]:
        """Return every override of a cell's run except its folder."""
        budget = self.budget_of_source(cell)
        return [*self.overrides, *self.arms[cell.arm].overrides, *self.of_source(cell.seed, budget or BUDGETS[0])]

    def of_source(self, seed: int, budget: int) -> tuple[str, ...]:
        """Return the overrides of a reward stage, which are also those of the cells that begin with it."""
        return (f"seed={seed}", f"targeting.budget={budget}", f"reward.labels={self.first(budget)}")


def make_sft(grid: Grid, seed: int) -> None:
    """Do a seed's sft stage where it is not done."""
    path = grid.source(seed)
    if not RunDirectory(path).stage("sft").done:
        trlhf.run([*grid.overrides, "stage=sft", f"seed={seed}", f"run.dir={path}"])


def make_reward(grid: Grid, seed: int, budget: int) -> None:
    """Do the reward stage of a seed and a budget, which buys the first labels, where it is not done."""
    path = grid.source(seed, budget)
    if RunDirectory(path).stage("reward").done:
        return
    if not path.exists():
        with new_directory(path) as fresh:
            shutil.copytree(grid.source(seed) / "sft", fresh / "sft")
    trlhf.run([*grid.overrides, *grid.of_source(seed, budget), "stage=reward", f"run.dir={path}"])


def run_cell(grid: Grid, cell: Cell) -> dict[str, Any]:
    """Run a cell whose sources are there, write its file, delete what is heavy, and return its figures."""
    begun = time.monotonic()
    arm = grid.arms[cell.arm]
    config = compose([*grid.overrides_of(cell), f"run.dir={grid.run(cell)}"]).configs[0]
    figures: dict[str, Any] = {"labels": {"spent": 0.0}, "stopped": None}
    model: Path | None = None
    if arm.model == "sft":
        model = grid.source(cell.seed) / "sft" / "model"
    elif arm.model == "rl":
        figures |= _train(grid, cell, config)
        model = grid.run(cell) / ("sft" if figures["unlearnable"] else "rl") / "model"
    answered, seconds = answer_test(model, config)
    figures |= assess(answered, config) | {"eval_seconds": seconds}
    if grid.more is not None:
        figures |= grid.more(config, answered, grid.run(cell))
    record = {
        **{"arm": cell.arm, "budget": cell.budget, "seed": cell.seed, "commit": grid.commit},
        "overrides": grid.overrides_of(cell),
        **figures,
        "seconds": round(time.monotonic() - begun, 1),
    }
    write_json(grid.file(cell), record)
    if not grid.keep:
        lighten(grid.run(cell))
    return record


def _train(grid: Grid, cell: Cell, config: Config) -> dict[str, Any]:
    """Do a cell's rl stage, and say what it was.

    Where no verdict found a right answer, the stage refuses to go on; such a cell is worth what SFT is.
    """
    run, labels = RunDirectory(grid.run(cell)), grid.arms[cell.arm].labels
    source = grid.source(cell.seed, grid.budget_of_source(cell))
    if run.path.exists() and not run.stage("sft").done:  # what a finished cell, whose file was deleted, left behind
        shutil.rmtree(run.path)
    if not run.path.exists():
        with new_directory(run.path) as fresh:
            _copy(source, fresh, with_ledger=labels == "budget")
    if labels == "all":
        bought = buy_everything(config, source, run.path)
        config = with_values(config, [f"targeting.budget={bought['spent']:.0f}"])  # so that the rounds buy nothing
    if labels == "none":  # the reward stage had some; nothing of it is used, and its ledger is not copied
        config = replace(config, targeting=replace(config.targeting, budget=0))
    unlearnable = False
    try:
        run_pipeline(replace(config, stage="rl"))
    except UserError as error:
        if not str(error).startswith(NOTHING_TO_LEARN):
            raise
        unlearnable = True
    with Ledger(run.ledger, float(10**9)) as ledger:
        given = ledger.labels()
        figures = {
            "labels": {
                "spent": ledger.spent,
                "first": sum(label.cost for label in given if label.round == 0 and label.kind == "verdict"),
                "verdicts": sum(label.kind == "verdict" for label in given),
                "right": sum(label.outcome == "right" for label in given),
                "gold": sum(label.kind == "gold" for label in given),
                "verifiable_prompts": len(ledger.knowledge().verifiable_prompts()),
            },
            "unlearnable": unlearnable,
        }
    metrics = {} if unlearnable else run.stage("rl").metrics()
    return figures | {"stopped": metrics.get("stopped"), "rl_seconds": run.summary().get("seconds", {}).get("rl")}


def _copy(source: Path, target: Path, *, with_ledger: bool) -> None:
    """Copy the stages that a cell begins with, and the labels that were bought in them."""
    for name in ("sft", "reward"):
        shutil.copytree(source / name, target / name)
    if with_ledger:
        with (
            closing(sqlite3.connect(source / "ledger.sqlite")) as old,
            closing(sqlite3.connect(target / "ledger.sqlite")) as new,
        ):
            old.backup(new)


def answer_test(
    folder: Path | None, config: Config, weights: Mapping[str, Tensor] | None = None
) -> tuple[Evaluation, float]:
    """Answer the test prompts with a saved model, as the eval stage does, and return the seconds that it took too.

    Args:
        folder: of the model; None: the base.
        config: of the cell.
        weights: that take the place of the model's own.

    Returns:
        The prompts are in the order of the test set, those that leave no room for a response included.
    """
    from trlhf.evaluation.evaluate import Evaluation, evaluate
    from trlhf.fitting import fit_task
    from trlhf.models import choose_device, load_causal_lm, load_tokenizer, model_path
    from trlhf.roles import Role
    from trlhf.sft.templates import apply_template
    from trlhf.tasks import load_task

    begun = time.monotonic()
    path = str(folder) if folder is not None else model_path(config.model.name)
    tokenizer = load_tokenizer(path)
    if folder is None:
        tokenizer = apply_template(tokenizer, config.template)
    whole = load_task(config)
    task = fit_task(whole, config, tokenizer, ["eval"])
    model = load_causal_lm(path, config.model, choose_device(config))
    if weights is not None:
        model.load_state_dict(dict(weights), strict=False)
    answered = evaluate(Role(model), tokenizer, task.test, task.test_answers, config.evaluation)
    answered = answered.with_unanswered(task.too_long, task.test_answers)
    del model
    gc.collect()
    found = {rollout.prompt_id: rollout for rollout in answered.rollouts}
    ordered = Evaluation(whole.test, [found[prompt.id] for prompt in whole.test], answered.correct)
    return ordered, round(time.monotonic() - begun, 1)


def assess(answered: Evaluation, config: Config) -> dict[str, Any]:
    """Return the figures of the responses to the test prompts.

    Returns:
        ``correct`` and ``plain``: whether the answer is right for each reasoning and each plain test prompt with an
        answer, in the order of the test set; ``by_kind``, shares of plans, and the mean length of reasoning responses.
    """
    from trlhf.evaluation.evaluate import describe

    description = describe(answered, config.evaluation, config.seed)
    asked = [prompt for prompt in answered.prompts if prompt.id in answered.correct]
    lengths = {rollout.prompt_id: len(rollout.token_ids) for rollout in answered.rollouts}
    correct = [answered.correct[prompt.id] for prompt in asked if prompt.reasoning]
    plain = [answered.correct[prompt.id] for prompt in asked if not prompt.reasoning]
    tokens = [lengths[prompt.id] for prompt in asked if prompt.reasoning]
    return {
        "accuracy": sum(correct) / len(correct),
        "plain_accuracy": sum(plain) / len(plain) if plain else None,
        "by_kind": {kind: entry["value"] for kind, entry in description["by_kind"].items()},
        "plans": {name: entry and entry["value"] for name, entry in description["plans"].items()},
        "response_tokens": sum(tokens) / len(tokens),
        "correct": correct,
        "plain": plain,
    }


def lighten(run: Path) -> None:
    """Delete a finished cell's models and samples; its ledger, log and metrics stay."""
    for name in ("sft", "reward", "rl/model", "rl/checkpoints"):
        shutil.rmtree(run / name, ignore_errors=True)
    for path in run.glob("rl/*samples*.jsonl"):
        path.unlink()
