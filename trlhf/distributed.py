"""Several processes, one update: every rank knows the whole batch, computes its share, and sums with the others.

Denominators are those of the whole optimizer step, so sums of gradients, not means, are what one process would have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

T = TypeVar("T")


def world() -> tuple[int, int]:
    """Return this process's rank and the number of processes; (0, 1) where there is no process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def share(items: Sequence[T]) -> list[T]:
    """Return this rank's part of a list that all ranks have in the same order; together they have every item once."""
    rank, size = world()
    return list(items[rank::size])


def sum_tensors(tensors: Iterable[Tensor]) -> None:
    """Replace tensors, of one type and shapes that all ranks agree on, by their sums over the ranks."""
    _, size = world()
    found = list(tensors)
    if size == 1 or not found:
        return
    flat = torch.cat([tensor.flatten() for tensor in found])
    dist.all_reduce(flat)
    for tensor, part in zip(found, flat.split([tensor.numel() for tensor in found]), strict=True):
        tensor.copy_(part.view_as(tensor))


def sum_gradients(parameters: Sequence[Parameter]) -> None:
    """Add up the gradients of all ranks; a rank whose share was empty adds zeros."""
    _, size = world()
    if size == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    sum_tensors(parameter.grad for parameter in parameters if parameter.grad is not None)


def sum_counts(counts: Mapping[str, float]) -> dict[str, float]:
    """Return the sums over the ranks of some named numbers; a name that a rank does not have counts as 0 there."""
    _, size = world()
    if size == 1:
        return dict(counts)
    gathered: list[dict[str, float]] = [{} for _ in range(size)]
    dist.all_gather_object(gathered, dict(counts))
    total: Counter[str] = Counter()
    for one in gathered:
        total.update(one)
    return dict(total)
