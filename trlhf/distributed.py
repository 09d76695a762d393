"""Several processes, one piece of work: every rank knows the whole, computes its share, and sums or gathers.

Denominators are those of the whole optimizer step, so sums of gradients, not means, are what one process would have.
Where a leader works alone meanwhile (`trlhf.crew`), it has no others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from trlhf.crew import leads_alone

T = TypeVar("T")


def world() -> tuple[int, int]:
    """Return this process's rank and the number of processes that do what it does now; (0, 1) where it is alone."""
    if leads_alone() or not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def share(items: Sequence[T]) -> list[T]:
    """Return this rank's part of a list that all ranks have in the same order; together they have every item once."""
    rank, size = world()
    return list(items[rank::size])


def gather(part: T) -> list[T]:
    """Return every rank's part, by rank, on all of them; parts are plain values, or tensors on the CPU."""
    _, size = world()
    if size == 1:
        return [part]
    parts: list[Any] = [None] * size
    dist.all_gather_object(parts, part)
    return parts


def any_rank(flag: bool) -> bool:
    """Say whether a flag is set on any rank; all get the same answer."""
    return any(gather(bool(flag)))


def barrier() -> None:
    """Wait until all ranks are here."""
    if world()[1] > 1:
        dist.barrier()


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
    total: Counter[str] = Counter()
    for one in gather(dict(counts)):
        total.update(one)
    return dict(total)
