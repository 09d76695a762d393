"""SFT without padding: the loss, gradients and metrics of TRL's trainer, for whole weights and adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.sft_trainer import SFTTrainer

from trlhf.config import build_config
from trlhf.models import MICRO_BASE, load_causal_lm, load_tokenizer
from trlhf.run import StageDirectory
from trlhf.sft import train, unpadded
from trlhf.sft.encode import EncodedDemonstration
from trlhf.sft.report import StageCallback

# peft asks for what TRL renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
START = tuple(range(30, 42))
ROWS = [
    EncodedDemonstration((*START, 50, 51, 60, 61, 2), (0,) * 14 + (1,) * 3),
    EncodedDemonstration((*START, 52, 70, 2, 53, 54, 71, 72, 73, 2), (0,) * 13 + (1, 1, 0, 0) + (1,) * 4),  # two turns
    EncodedDemonstration((*START, 55, 56, 57, 58, 59, 2), (0,) * 17 + (1,)),
    EncodedDemonstration((40, 41, 80, 2), (0, 0, 1, 1)),
]


def trainer_of(kind: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, **values: Any) -> SFTTrainer:
    config = build_config({"hardware": {"device": "cpu"}, "sft": {"batch_size": 4, "microbatch_size": 4}} | values)
    monkeypatch.setattr(train, "UnpaddedTrainer", kind)
    callback = StageCallback(StageDirectory(folder / "sft", folder))
    torch.manual_seed(0)
    model = load_causal_lm(MICRO_BASE, config.model)
    return train.make_trainer(model, ROWS, load_tokenizer(MICRO_BASE), config, folder / "checkpoints", callback)


def step(trainer: Any, rows: Sequence[int], items: int | None) -> tuple[float, dict[str, torch.Tensor], dict[str, Any]]:
    """Return loss, gradients and metrics of one microbatch."""
    trainer.model.train()
    trainer.model.zero_grad()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in rows])
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients, {name: list(values) for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("values", [{}, {"model": {"lora": {"enabled": True, "dropout": 0.0}}}], ids=["full", "lora"])
@pytest.mark.parametrize(("rows", "items"), [((0, 1, 2), 20), ((0, 1, 2, 3), None), ((1,), 7)])
def test_loss_gradients_and_metrics_are_trls(
    values: dict[str, Any],
    rows: tuple[int, ...],
    items: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = step(trainer_of(SFTTrainer, tmp_path, monkeypatch, **values), rows, items)
    called: list[int] = []
    original = unpadded.label_logprobs
    monkeypatch.setattr(unpadded, "label_logprobs", lambda *given: called.append(1) or original(*given))  # type: ignore[func-returns-value]
    ours = step(trainer_of(unpadded.UnpaddedTrainer, tmp_path, monkeypatch, **values), rows, items)
    assert called == [1]
    assert ours[0] == pytest.approx(theirs[0], abs=2e-6)
    assert ours[1].keys() == theirs[1].keys() and max(float(g.abs().max()) for g in ours[1].values()) > 1e-3
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, theirs[1][name], atol=2e-6, rtol=1e-4)
    assert ours[2].keys() == theirs[2].keys()
    for name, noted in ours[2].items():
        assert noted == pytest.approx(theirs[2][name], abs=1e-5)


@pytest.mark.parametrize("values", [{"model": {"gradient_checkpointing": True}}, {"model": {"attention": "eager"}}])
def test_trl_computes_what_attention_of_ours_cannot(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer: Any = trainer_of(unpadded.UnpaddedTrainer, tmp_path, monkeypatch, **values)
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[0]])
    ours = trainer._ours(trainer.model, batch) is not None
    assert ours == ("attention" in values["model"])  # eager is computed by ours, recomputed layers are not
    packed = {name: value for name, value in batch.items() if name != "attention_mask"}
    assert trainer._ours(trainer.model, packed) is None and trainer._ours(torch.nn.Linear(1, 1), batch) is None


def test_only_what_a_label_counts_is_counted() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 0], [5, 6, 7, 8, 9]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, 7, 8, -100], [-100, 6, -100, 8, 9]])
    batch, counts = unpadded.unpadded(ids, mask, labels)
    assert batch.response_ids[counts].tolist() == [7, 8, 6, 8, 9]
    assert batch.response_mask.sum(1).tolist() == [2, 4]
    none, counts = unpadded.unpadded(ids[:1], mask[:1], torch.full((1, 5), -100))
    assert not counts.any() and none.response_mask.sum() == 3
