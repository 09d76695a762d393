"""Every optimizer step has the rows that TRL's own trainer would have drawn; within it like lengths come together."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from trl.trainer.sft_trainer import SFTTrainer

from trlhf.config import build_config
from trlhf.models import MICRO_BASE, load_causal_lm, load_tokenizer
from trlhf.run import StageDirectory
from trlhf.sft import train
from trlhf.sft.encode import EncodedDemonstration
from trlhf.sft.order import StepOrder
from trlhf.sft.report import StageCallback

Row = tuple[int, ...]
ORDERED = train.UnpaddedTrainer


def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, microbatch: int) -> list[list[Row]]:
    """Return the rows of two epochs as the trainer's loader hands them out."""
    rng = random.Random(0)
    tokens = [tuple(rng.randrange(4, 600) for _ in range(rng.randrange(5, 40))) for _ in range(19)]
    rows = [EncodedDemonstration(ids, (0, 0) + (1,) * (len(ids) - 2)) for ids in tokens]
    values = {"epochs": 2, "batch_size": 8, "microbatch_size": microbatch}
    config = build_config({"seed": 5, "sft": values, "hardware": {"device": "cpu"}})
    monkeypatch.setattr(train, "UnpaddedTrainer", kind)
    callback = StageCallback(StageDirectory(tmp_path / "sft", tmp_path))
    model = load_causal_lm(MICRO_BASE, config.model)
    loader: Any = train.make_trainer(
        model, rows, load_tokenizer(MICRO_BASE), config, tmp_path / "checkpoints", callback
    ).get_train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches = [(batch["input_ids"], batch["attention_mask"].bool()) for batch in loader]
        assert all(len(ids) <= microbatch for ids, _ in batches)
        epochs.append([tuple(row[real].tolist()) for ids, mask in batches for row, real in zip(ids, mask, strict=True)])
    return epochs


def test_steps_hold_the_rows_that_trl_would_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = loaded(tmp_path, monkeypatch, SFTTrainer, 8)
    ordered = loaded(tmp_path, monkeypatch, ORDERED, 4)
    assert plain[0] != plain[1]
    for theirs, ours in zip(plain, ordered, strict=True):
        for start in range(0, 19, 8):
            step = ours[start : start + 8]
            assert sorted(step) == sorted(theirs[start : start + 8])
            assert [len(row) for row in step] == sorted(len(row) for row in step)


def test_an_epoch_has_every_row_once_and_its_own_order() -> None:
    order = StepOrder([7, 3, 9, 1, 5, 8, 2], 3, 0)
    epochs = []
    for epoch in range(2):
        order.set_epoch(epoch)
        epochs.append(list(order))
    assert len(order) == 7 and all(sorted(rows) == list(range(7)) for rows in epochs)
    assert {frozenset(epochs[0][:3]), frozenset(epochs[1][:3])} != {frozenset(epochs[0][:3])}
    order.set_epoch(0)
    assert list(order) == epochs[0]
