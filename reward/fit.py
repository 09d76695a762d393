"""Fit a reward model to labels: the heads first, then, if asked, the backbone with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trlhf.config import Config
from trlhf.crew import keep
from trlhf.data import LabelledPair, LabelledResponse
from trlhf.errors import UserError
from trlhf.reward.finetune import Data, FitSettings, Log, finetune
from trlhf.reward.heads import EnsembleHeads
from trlhf.reward.model import Calibration, RewardModel
from trlhf.reward.solve import fit_heads, pose
from trlhf.reward.table import bootstrap_weights, tabulate
from trlhf.roles import Role


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
        heads = model.heads
        sizes = (heads.weight.shape[1], heads.intercept_weight.shape[1], heads.heads, heads.prior_scale)
        state = {name: value.detach().cpu() for name, value in heads.state_dict().items()}
        done = keep(
            _finetune,
            *(model.role, model.tokenizer, model.max_length, sizes, state, Data(samples, table, weights), settings),
            model=model,
            log=log,
        )
        epoch = done.epoch
    model.calibration = Calibration()
    model.fitted = {"spread": spread, "kept_epoch": epoch}
    return model


@dataclass(frozen=True)
class Finetuned:
    """Who plays the backbone now, and the epoch that was kept."""

    role: Role
    epoch: int


def _finetune(
    role: Role,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    sizes: tuple[int, int, int, float],
    state: Mapping[str, Tensor],
    data: Data,
    settings: FitSettings,
    model: RewardModel | None = None,
    log: Log | None = None,
) -> Finetuned:
    """Fine-tune the leader's model or, on the other processes, one like it."""
    if model is None:
        heads = EnsembleHeads(*sizes, seed=0)
        heads.load_state_dict(state)
        model = RewardModel(role, tokenizer, heads.to(role.device), max_length)
    epoch = finetune(model, data, settings, log)
    return Finetuned(model.role, epoch)


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
