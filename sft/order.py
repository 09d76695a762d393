"""The order of demonstrations: steps are drawn at random, and within a step like lengths share a forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from accelerate.data_loader import SeedableRandomSampler  # type: ignore[import-untyped, unused-ignore]
from torch.utils.data import Sampler


class StepOrder(Sampler[int]):
    """The rows of every optimizer step as accelerate would draw them, each step's in order of length.

    A step's gradient is that of all its rows, so their order within it changes nothing but rounding; but a forward pass
    of like lengths holds little padding: of steps of 16 GSM8K demonstrations in passes of four, 9% instead of 38%.

    Args:
        lengths: tokens of every row.
        step: rows of an optimizer step, over all processes.
        seed: as accelerate's ``data_seed``; the order also depends on the epoch.
    """

    def __init__(self, lengths: Sequence[int], step: int, seed: int) -> None:
        self._lengths, self._step = lengths, step
        self._drawn = SeedableRandomSampler(range(len(lengths)), data_seed=seed)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        """Yield every row of an epoch once."""
        drawn = list(self._drawn)
        for start in range(0, len(drawn), self._step):
            yield from sorted(drawn[start : start + self._step], key=lambda row: self._lengths[row])

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next; the data loader does."""
        self._drawn.set_epoch(epoch)
