"""Fit a reward model to labels: the heads first, then, if asked, the backbone with them."""

from __future__ import annotations

from collections.abc import Sequence

from trlhf.config import Config
from trlhf.data import LabelledPair, LabelledResponse
from trlhf.errors import UserError
from trlhf.reward.finetune import Data, FitSettings, Log, finetune
from trlhf.reward.model import Calibration, RewardModel
from trlhf.reward.solve import fit_heads, pose
from trlhf.reward.table import bootstrap_weights, tabulate


def fit(
    model: RewardModel,
    labelled: Sequence[LabelledResponse],
    pairs: Sequence[LabelledPair],
    settings: FitSettings,
    log: Log | None = None,
) -> RewardModel:
    """Fit a reward model to labels, in place, from wherever its backbone stands; all heads in one pass.

    First the heads are solved for on the features of the backbone as it is (see :mod:`trlhf.reward.solve`); that is all
    with ``finetune="frozen"``. With ``lora`` or ``full`` the backbone then learns too (see
    :mod:`trlhf.reward.finetune`). The calibration goes back to none: :func:`calibrate` comes next.

    Returns:
        The model; ``model.fitted`` says which spread and which epoch were chosen.

    Raises:
        UserError: there are no labels.
    """
    if not labelled and not pairs:
        raise UserError("reward model: there are no labels to learn from; raise reward.labels or give data.labels")
    device = model.device
    table, prompts, responses = tabulate(labelled, pairs)
    samples = model.encode(prompts, responses)
    lengths = [sample.response_length for sample in samples]
    pooled = model.pool_samples(samples)
    weights = bootstrap_weights(table.groups, model.heads.heads, settings.seed)
    model.heads.cpu()
    model.heads.standardise_on(pooled, lengths)
    spread = fit_heads(
        model.heads, pose(model.heads, pooled, lengths, table, settings.flip_rate), weights, settings.seed
    )
    model.heads.to(device)
    epoch = 0
    if log is not None:
        log(0, {"spread": spread})
    if settings.finetune != "frozen":
        epoch = finetune(model, Data(samples, table, weights), settings, log)
    model.calibration = Calibration()
    model.fitted = {"spread": spread, "kept_epoch": epoch}
    return model


def fit_settings(config: Config) -> FitSettings:
    """Return the settings of :func:`fit` that a configuration asks for."""
    reward = config.reward
    return FitSettings(
        finetune=reward.finetune,
        epochs=reward.epochs,
        learning_rate=reward.learning_rate,
        batch_size=reward.batch_size,
        microbatch_size=reward.microbatch_size,
        weight_decay=reward.weight_decay,
        seed=config.seed,
        model=config.model,
    )
