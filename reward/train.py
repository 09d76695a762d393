"""Stage 2 in the order in which it happens: split, fit, calibrate, assess, save, reload, compare."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from trlhf.allocator import let_go
from trlhf.config import Config
from trlhf.console import progress
from trlhf.crew import keep, release
from trlhf.data import LabelledPair, LabelledResponse
from trlhf.errors import UserError
from trlhf.models import choose_device
from trlhf.reward.calibration import calibrate
from trlhf.reward.finetune import FitSettings
from trlhf.reward.fit import fit, fit_settings
from trlhf.reward.model import Calibration, RewardModel, backbone_of
from trlhf.reward.report import assess, describe_labels, summarise
from trlhf.reward.split import Label, Labels, split_by_prompt, write_split
from trlhf.reward.table import tabulate
from trlhf.roles import Role, reward_role, shared_base
from trlhf.run import StageDirectory
from trlhf.types import Prompt

logger = logging.getLogger("trlhf")
RELOAD_TOLERANCE = 1e-5  # of a score, in logits
COMPARED = 64  # responses


def train_reward(
    labelled: Sequence[LabelledResponse],
    pairs: Sequence[LabelledPair],
    config: Config,
    stage: StageDirectory,
    backbone: Path,
) -> dict[str, Any]:
    """Train, calibrate, assess and save a reward model in a stage's folder.

    The same labels, configuration and backbone give the same bytes; the stage is short, so a killed one starts again.
    The stage calls itself complete only after what it saved was loaded again and scored as before.

    Args:
        labelled: verdicts.
        pairs: preferences.
        config: ``reward``, ``model``, ``hardware``, ``evaluation.confidence`` and ``seed`` matter.
        stage: receives ``model/``, ``heads.safetensors``, ``reward.json``, ``split.jsonl``, ``samples.jsonl`` and
            ``metrics.jsonl``.
        backbone: folder of the SFT model.

    Returns:
        The report: labels by kind, what was chosen, held-out measures (see :func:`trlhf.reward.report.assess`), notes.

    Raises:
        UserError: no labels, an unreadable backbone, a disk that is full.
        RuntimeError: the saved model, loaded again, scores differently.
    """
    report, probe = _fit_and_save(Labels(labelled, pairs), config, stage, backbone)
    release()  # the model itself is gone by now: the two need not fit in memory together
    let_go()
    check_saved(stage.path, config, probe, backbone)
    stage.complete(report)
    for line in summarise(report):
        logger.info(line)
    return report


@dataclass(frozen=True)
class Probe:
    """What a reward model says about a few responses when it is saved, and has to say when it is loaded again."""

    prompts: Sequence[Prompt]
    responses: Sequence[str]
    logits: Float[Tensor, "B K"]
    calibration: Calibration


def _fit_and_save(given: Labels, config: Config, stage: StageDirectory, backbone: Path) -> tuple[dict[str, Any], Probe]:
    settings = fit_settings(config)
    whole = settings.finetune == "full"  # AdamW's small steps would vanish in bfloat16 weights
    model = RewardModel.from_backbone(
        backbone,
        replace(config.model, dtype="float32") if whole else config.model,
        heads=config.reward.heads,
        prior_scale=config.reward.prior_scale,
        seed=config.seed,
        device=choose_device(config),
    )
    training, held = split_by_prompt(usable(model, given), config.reward.holdout, config.seed)
    too_long = len(given) - len(training) - len(held)
    stage.rewind(-1)
    write_split(stage.path, training, held)
    with model.keep_features():
        _fit(model, training, settings, stage)
        notes = [*_warnings(training, too_long), *calibrate(model, held.responses, held.pairs)]
        measured = assess(model, held.responses, held.pairs, config.evaluation.confidence)
        stage.write_jsonl("samples.jsonl", _sample_rows(model, held))
    report = {
        "labels": {
            "train": describe_labels(training.responses, training.pairs),
            "held_out": describe_labels(held.responses, held.pairs),
            "too_long": too_long,
        },
        "fit": {"finetune": settings.finetune, "heads": model.heads.heads, **model.fitted},
        "held_out": measured,
        "notes": notes,
    }
    model.save(stage.path)
    _, prompts, responses = tabulate([*training.responses, *held.responses], [*training.pairs, *held.pairs])
    prompts, responses = prompts[:COMPARED], responses[:COMPARED]
    return report, Probe(prompts, responses, model.logits(prompts, responses), model.calibration)


def check_saved(directory: Path, config: Config, probe: Probe, sft: Path) -> None:
    """Load a saved reward model as the rl stage will, and compare every head's score of up to 64 labelled responses.

    Args:
        directory: folder of the reward stage.
        config: the whole configuration.
        probe: what it said before it was saved.
        sft: folder of the SFT model, which adapters stand on.

    Raises:
        RuntimeError: a score differs by more than 1e-5.
    """
    device = choose_device(config)
    role = keep(_saved_role, directory, config, sft, device) if config.model.lora.enabled else None
    again = RewardModel.load(directory, config.model, device, role)
    difference = float((probe.logits - again.logits(probe.prompts, probe.responses)).abs().max())
    if not difference <= RELOAD_TOLERANCE or again.calibration != probe.calibration:
        raise RuntimeError(
            f"reward model {directory}: loaded again, its scores differ by up to {difference:.3g} from those it was "
            f"saved with (at most {RELOAD_TOLERANCE} is allowed); do not use it, and report this"
        )


def _saved_role(directory: Path, config: Config, sft: Path, device: str) -> Role | None:
    return reward_role(shared_base(sft, config.model, device), directory, backbone_of(directory))


def usable(model: RewardModel, labels: Labels) -> Labels:
    """Return the labels whose responses fit into the context with their prompt.

    Raises:
        UserError: there are labels, and none of them does.
    """

    def fits(label: Label) -> bool:
        texts = [label.response] if isinstance(label, LabelledResponse) else [label.first, label.second]
        return all(model.fits(label.prompt, text) for text in texts)

    kept = labels.keep(fits)
    if len(labels) and not len(kept):
        raise UserError(
            f"reward model: none of the {len(labels)} labelled responses fits into "
            f"model.max_length={model.max_length} tokens with its prompt; raise it"
        )
    return kept


def _fit(model: RewardModel, training: Labels, settings: FitSettings, stage: StageDirectory) -> None:
    epochs = 0 if settings.finetune == "frozen" else math.ceil(settings.epochs)
    with progress("reward model: heads, then epochs of the backbone", 1 + epochs) as advance:

        def log(step: int, metrics: Mapping[str, float]) -> None:
            stage.log(step, **metrics)
            if step == 0 or "validation_loss" in metrics:
                advance(1)

        fit(model, training.responses, training.pairs, settings, log)


def _warnings(training: Labels, too_long: int) -> list[str]:
    notes = []
    outcomes = {label.right for label in training.responses}
    if len(outcomes) == 1:
        only = "right" if outcomes == {True} else "wrong"
        notes.append(f"every verdict in training is '{only}': nothing tells right from wrong, so scores mean little")
    if too_long:
        notes.append(f"{too_long} labels left out: longer than model.max_length together with their prompt")
    return notes


def _sample_rows(model: RewardModel, labels: Labels) -> list[dict[str, Any]]:
    """Return the held-out labels with what the model thinks of them."""
    rows: list[dict[str, Any]] = []
    table, prompts, responses = tabulate(labels.responses, labels.pairs)
    scores = model.score(prompts, responses)
    for number, label in zip(table.verdict_rows.tolist(), labels.responses, strict=True):
        rows.append(_row(label.prompt, label.response) | {"right": label.right, "score": vars(scores[number])})
    for number, pair in enumerate(labels.pairs):
        first, second = scores[int(table.first_rows[number])], scores[int(table.second_rows[number])]
        texts = {"first": pair.first, "second": pair.second, "preference": pair.preference}
        rows.append({"prompt": list(pair.prompt.messages), **texts, "scores": [vars(first), vars(second)]})
    return rows


def _row(prompt: Prompt, response: str) -> dict[str, Any]:
    return {"prompt": list(prompt.messages), "response": response}
