"""Gradient checkpointing where dropout is off: layers keep their inputs only and compute again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Let the layers marked by ``model.gradient_checkpointing`` drop their activations while the block runs forward.

    transformers checkpoints a layer only in training mode, which would switch dropout on inside it. So the layer alone
    is told that it trains, none of the modules in it, and only for the forward pass: the backward pass calls the
    layer's computation directly (Chen et al. 2016, https://arxiv.org/abs/1604.06174). Whatever decided the forward
    pass, the adapter that is on above all, must be the same when ``backward`` is called.
    """
    if not recomputes(model):
        yield
        return
    marked = _marked(model)
    before = [module.training for module in marked]
    for module in marked:
        module.training = True
    try:
        yield
    finally:
        for module, training in zip(marked, before, strict=True):
            module.training = training


def recomputes(model: nn.Module) -> bool:
    """Say whether a forward pass of now would be computed again in the backward pass."""
    return torch.is_grad_enabled() and bool(_marked(model))


def _marked(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
