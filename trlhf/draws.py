"""The random numbers that tokens are drawn with: the same for a response, however many processes draw the others."""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from trlhf.distributed import sum_tensors, world


class Draws(Protocol):
    """Where the decoding of one batch takes its random numbers from."""

    def __call__(self, rows: Tensor, size: int) -> Float[Tensor, "N V"]:
        """Return uniform numbers for the next token of each row that is still alive."""
        ...

    def follow(self, steps: int, size: int) -> None:
        """Go on without rows of one's own, for as many tokens as the others may still draw."""
        ...


class OwnDraws:
    """All rows of the batch are decoded here."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __call__(self, rows: Tensor, size: int) -> Float[Tensor, "N V"]:
        """Return the generator's next numbers."""
        return torch.rand((len(rows), size), generator=self._generator)

    def follow(self, steps: int, size: int) -> None:
        """Do nothing: there are no others."""


class SharedDraws:
    """The prompts of the batch are shared among the ranks: prompt p is decoded by rank p mod (number of ranks).

    One process draws, for each token, numbers for all rows that are alive at that time. So the ranks tell each other
    which are, every one draws the numbers of all, and uses those of its own rows.

    Args:
        generator: in the same state on all ranks.
        prompts: of the whole batch.
        samples: rows a prompt.
    """

    def __init__(self, generator: torch.Generator, prompts: int, samples: int) -> None:
        self._generator = generator
        rank, size = world()
        places = torch.arange(prompts)[rank::size]
        self._rows = (places[:, None] * samples + torch.arange(samples)).flatten()  # own rows in the whole batch
        self._total = prompts * samples

    def __call__(self, rows: Tensor, size: int) -> Float[Tensor, "N V"]:
        """Draw for all ranks' rows, and return those of ours; at the same step on every rank."""
        own = self._rows[rows.cpu()]
        return self._draw(own, size)[0]

    def follow(self, steps: int, size: int) -> None:
        """Draw on for the others, until none of their rows is alive or all tokens are drawn."""
        for _ in range(steps):
            if self._draw(self._rows[:0], size)[1] == 0:
                break

    def _draw(self, own: Tensor, size: int) -> tuple[Float[Tensor, "N V"], int]:
        alive = torch.zeros(self._total)
        alive[own] = 1
        sum_tensors([alive])
        before = alive.long().cumsum(0) - 1  # place of each row among those that are alive
        everyone = int(before[-1]) + 1
        return torch.rand((everyone, size), generator=self._generator)[before[own]], everyone
