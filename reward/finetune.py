"""Train the backbone together with the heads, from where the frozen fit left them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trlhf.config import ModelConfig
from trlhf.distributed import share, sum_counts, sum_gradients
from trlhf.errors import UserError
from trlhf.reward.features import FeatureStore, Pooled, Sample, collate
from trlhf.reward.model import RewardModel
from trlhf.reward.table import LabelTable
from trlhf.roles import REWARD_ADAPTER, Role, SharedBase
from trlhf.seeding import torch_generator

Log = Callable[[int, dict[str, float]], None]
MAX_GRAD_NORM = 1.0
MAX_BAD_STEPS = 3  # in a row
WARMUP_SHARE = 0.1
VALIDATION_SHARE = 0.2  # of the training prompts, to choose the epoch to keep
MIN_VALIDATION_LABELS = 10
MEANS = ("accuracy", "margin")  # of a step's verdicts, and of its preferences


@dataclass(frozen=True)
class FitSettings:
    """How a reward model learns from labels; the fields of ``RewardConfig`` that matter once the labels are there.

    Attributes:
        finetune: ``frozen`` fits the heads only; ``lora`` and ``full`` go on with the backbone.
        epochs: passes over the labels, of the backbone.
        learning_rate: AdamW's peak, of the backbone and the heads.
        batch_size: labels per optimizer step.
        microbatch_size: labels per forward pass.
        weight_decay: of the backbone's matrices; the heads' own penalty is chosen by cross-validation.
        flip_rate: assumed chance that a label is wrong.
        seed: of bootstrap weights, folds and data order.
        model: says what an adapter is, for ``lora``, and whether it stays one: it does where the rl stage has adapters
            too (``model.lora.enabled``), on one base with the others; else it is merged when done.
    """

    finetune: Literal["frozen", "lora", "full"] = "frozen"
    epochs: float = 4.0
    learning_rate: float = 2e-4
    batch_size: int = 16
    microbatch_size: int = 16
    weight_decay: float = 0.01
    flip_rate: float = 0.02
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)


@dataclass(frozen=True)
class Data:
    """Encoded samples, the labels on them and each head's weight of each label."""

    samples: Sequence[Sample]
    table: LabelTable
    weights: Float[Tensor, "M K"]

    def select(self, labels: Int[Tensor, " m"]) -> Data:
        """Return some of the labels, with only the samples that they use."""
        table, labels = self.table.select(labels)
        table, rows = table.compact()
        return Data([self.samples[int(row)] for row in rows], table, self.weights[labels])


def finetune(model: RewardModel, data: Data, settings: FitSettings, log: Log | None = None) -> int:
    """Minimise the likelihood's negative logarithm over backbone and heads, and keep the best epoch.

    The heads start at their optimum on the frozen features (linear probe, then fine-tune: Kumar et al. 2022,
    https://arxiv.org/abs/2202.10054). AdamW, linear warm-up and decay to 0, dropout off. A fifth of the training
    prompts is left out of the gradient; after each epoch the negative log-likelihood on them decides which epoch is
    kept, epoch 0 (the frozen fit) included, so that few labels cannot make the model worse than not training it.

    Args:
        model: changed in place; its heads are already fitted.
        data: training labels.
        settings: ``finetune`` is ``lora`` or ``full``.
        log: receives (optimizer step, metrics).

    Returns:
        The epoch that was kept; 0 is the frozen fit.

    Raises:
        UserError: the third gradient in a row that is not finite.
    """
    training, validation = _split(data, settings.seed)
    kept, model.features = model.features, None  # they are about to change
    parameters = _learning(model, settings)
    optimizer, schedule = _optimizer(parameters, settings, len(training.table))
    best_loss, best_epoch, best = _mean_loss(model, validation, settings), 0, _copy(parameters)
    step = bad = 0
    for epoch, batches in enumerate(_epochs(len(training.table), settings), start=1):
        for labels in batches:
            loss, metrics = _backward(model, training, labels, settings)
            sum_gradients(list(parameters.values()))
            norm = nn.utils.clip_grad_norm_(list(parameters.values()), MAX_GRAD_NORM)
            bad = 0 if torch.isfinite(norm) else bad + 1
            if bad == MAX_BAD_STEPS:
                raise UserError(
                    f"reward model: the gradient was not finite {bad} steps in a row; lower reward.learning_rate="
                    f"{settings.learning_rate}, or use reward.finetune=frozen or model.dtype=float32"
                )
            if bad:
                optimizer.zero_grad(set_to_none=True)  # so that this step changes nothing
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if log is not None:
                log(step, {"epoch": float(epoch), "loss": loss, "gradient_norm": float(norm), **metrics})
        held_out = _mean_loss(model, validation, settings)
        if log is not None:
            log(step, {"epoch": float(epoch), "validation_loss": held_out})
        if held_out < best_loss:
            best_loss, best_epoch, best = held_out, epoch, _copy(parameters)
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(best[name])
    _settle(model, settings)
    model.features = None if kept is None else FeatureStore()
    return best_epoch


def _split(data: Data, seed: int) -> tuple[Data, Data]:
    """Leave a fifth of the prompts out for validation; with too few labels, validate on the training labels."""
    groups = data.table.groups
    order = torch.randperm(int(groups.max()) + 1, generator=torch_generator(seed, "reward", "validation"))
    left_out = torch.isin(groups, order[: round(VALIDATION_SHARE * len(order))])
    if int(left_out.sum()) < MIN_VALIDATION_LABELS or int((~left_out).sum()) < MIN_VALIDATION_LABELS:
        return data, data
    return data.select(torch.where(~left_out)[0]), data.select(torch.where(left_out)[0])


def _learning(model: RewardModel, settings: FitSettings) -> dict[str, nn.Parameter]:
    """Choose what learns, by name: the heads with every weight of the backbone, or with an adapter of its own on it."""
    if settings.finetune == "lora":
        base = model.role.base or SharedBase(model.backbone, settings.model)
        model.role, model.stands_on = base.add(REWARD_ADAPTER, settings.seed), "adapter"
    else:
        model.backbone.requires_grad_(True)
        model.stands_on = "own"
    model.heads.requires_grad_(True)
    heads = {f"heads.{name}": value for name, value in model.heads.named_parameters()}
    return model.role.trainable() | heads


def _settle(model: RewardModel, settings: FitSettings) -> None:
    """Stop learning; merge an adapter that no shared base will carry."""
    if settings.finetune == "lora" and not settings.model.lora.enabled and model.role.base is not None:
        model.role, model.stands_on = Role(model.role.base.merge(REWARD_ADAPTER)), "own"
    elif model.role.base is not None:
        model.role.base.freeze(REWARD_ADAPTER)
    else:
        model.backbone.requires_grad_(False)
    model.heads.requires_grad_(False)


def _optimizer(
    parameters: dict[str, nn.Parameter], settings: FitSettings, labels: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return AdamW with decay on the backbone's matrices, and its schedule."""
    decayed = [value for name, value in parameters.items() if value.ndim > 1 and not name.startswith("heads.")]
    others = [value for name, value in parameters.items() if value.ndim <= 1 or name.startswith("heads.")]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate,
    )
    total = sum(len(batches) for batches in _epochs(labels, settings))
    warmup = max(1, round(WARMUP_SHARE * total))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (total - step) / max(1, total - warmup + 1), 1.0)
    )
    return optimizer, schedule


def _epochs(labels: int, settings: FitSettings) -> Iterator[list[Int[Tensor, " b"]]]:
    """Yield each epoch's batches of label numbers, reshuffled; the last epoch may be a part of one."""
    generator = torch_generator(settings.seed, "reward", "order")
    for epoch in range(math.ceil(settings.epochs)):
        share = min(1.0, settings.epochs - epoch)
        order = torch.randperm(labels, generator=generator)[: max(1, round(share * labels))]
        yield list(torch.split(order, settings.batch_size))


def _backward(
    model: RewardModel, data: Data, labels: Int[Tensor, " b"], settings: FitSettings
) -> tuple[float, dict[str, float]]:
    """Add up the gradient of one optimizer step in microbatches; denominator: labels x heads of the whole step."""
    denominator = float(len(labels) * model.heads.heads)
    sums: defaultdict[str, float] = defaultdict(float)
    own = torch.tensor(share(labels.tolist()), dtype=torch.long)
    for part in torch.split(own, settings.microbatch_size) if len(own) else ():
        chosen = data.select(part)
        with model.role.acting():  # also while the backward pass recomputes what was not kept
            loss, metrics = _loss(model, chosen, denominator, settings.flip_rate)
            loss.backward()
        sums["loss"] += float(loss.detach())
        for kind, targets in (("verdict", chosen.table.verdicts), ("preference", chosen.table.preferences)):
            decided = float((targets != 0.5).sum())  # the labels that a mean is over
            sums[kind] += decided
            for name in MEANS if decided else ():
                sums[f"{kind}_{name}"] += decided * metrics[f"{kind}_{name}"]
    totals = sum_counts(sums)
    kinds = [kind for kind in ("verdict", "preference") if totals[kind]]
    return totals["loss"], {
        f"{kind}_{name}": totals[f"{kind}_{name}"] / totals[kind] for kind in kinds for name in MEANS
    }


def _loss(
    model: RewardModel, data: Data, denominator: float, flip_rate: float
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    pooled = model.pooled(collate(data.samples, int(model.tokenizer.pad_token_id), model.device))
    return _head_loss(model, data, pooled, denominator, flip_rate)


@torch.no_grad()
def _mean_loss(model: RewardModel, data: Data, settings: FitSettings) -> float:
    """Return the mean negative log-likelihood of the labels over heads, every label with weight 1."""
    pooled = model.pool_samples(data.samples)
    pooled = Pooled(pooled.response.to(model.device), pooled.prompt.to(model.device))
    unweighted = Data(data.samples, data.table, torch.ones_like(data.weights))
    loss, _ = _head_loss(model, unweighted, pooled, float(data.weights.numel()), settings.flip_rate)
    return float(loss)


def _head_loss(
    model: RewardModel, data: Data, pooled: Pooled, denominator: float, flip_rate: float
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    heads = model.heads
    lengths = heads.standardised_lengths([sample.response_length for sample in data.samples])
    length_terms = heads.length_weight[:, None, :] * lengths[None, :, None]
    table = data.table.to(model.device)
    weights = data.weights.to(model.device)
    return table.loss(heads.scores(pooled), heads.intercepts(pooled), length_terms, weights, denominator, flip_rate)


def _copy(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in parameters.items()}
