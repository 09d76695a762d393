"""Rows that do not divide among processes: each is trained on once an epoch, and what fills the gap counts nothing.

accelerate would begin the epoch's first rows again, silently, where the last are too few for all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler
from trl.trainer.sft_trainer import SFTTrainer

UNTRAINED = -100  # label of a token that is not learned
FILLER_TOKENS = 2


class EvenSampler(Sampler[int]):
    """Yield all rows in a random order, the one that accelerate's seedable sampler has, and then the fillers.

    Args:
        rows: how many there are.
        fillers: rows behind them that count nothing.
        seed: of the order; each epoch has its own.
        epoch: how many epochs are done. A resumed trainer of several processes never tells the sampler.
    """

    def __init__(self, rows: int, fillers: int, seed: int, epoch: Callable[[], float]) -> None:
        self._rows, self._fillers, self._seed, self._epoch = rows, fillers, seed, epoch

    def __len__(self) -> int:
        """Return the number of rows, fillers included."""
        return self._rows + self._fillers

    def __iter__(self) -> Iterator[int]:
        """Yield one epoch."""
        generator = torch.Generator().manual_seed(self._seed + int(self._epoch() + 1e-6))
        yield from torch.randperm(self._rows, generator=generator).tolist()
        yield from range(self._rows, len(self))


class EvenTrainer(SFTTrainer):  # type: ignore[misc,unused-ignore]
    """TRL's trainer for several processes.

    Args:
        fillers: how many rows at the end of the data set count nothing.
        **arguments: TRL's.
    """

    def __init__(self, fillers: int, **arguments: Any) -> None:
        self.fillers = fillers
        super().__init__(**arguments)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EvenSampler:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        seed: Any = self.args.data_seed
        return EvenSampler(len(rows) - self.fillers, self.fillers, seed, lambda: float(self.state.epoch or 0))


def filled(dataset: Dataset, multiple: int, token: int) -> tuple[Dataset, int]:
    """Return the rows with so many fillers behind them that ``multiple`` divides them, and how many these are.

    Args:
        dataset: rows in tokens, packed or not.
        multiple: rows that all processes take at a time.
        token: any.
    """
    count = -len(dataset) % multiple
    if not count:
        return dataset, 0
    row = {"input_ids": [token] * FILLER_TOKENS, "labels": [UNTRAINED] * FILLER_TOKENS, "seq_lengths": [FILLER_TOKENS]}
    columns = {name: [row[name]] * count for name in dataset.column_names}
    return concatenate_datasets([dataset, Dataset.from_dict(columns, features=dataset.features)]), count
