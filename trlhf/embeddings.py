"""Room in a model for the tokens that a chat template adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def make_room(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Grow embedding and head by the tokens that the model has no row for, and return those tokens' ids.

    A new row is the mean of all old ones: then a new token is about as probable as the average one, where a row near 0
    would take most of the probability. Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html
    (transformers' own resizing adds a little noise to it, which would depend on the state of the random generator).
    """
    old = _weight(model.get_input_embeddings()).shape[0]
    size = len(tokenizer)
    if size <= old:  # models are often padded to more rows than their tokenizer has tokens
        return []
    means = [_weight(layer).float().mean(0) for layer in _layers(model)]
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for layer, mean in zip(_layers(model), means, strict=True):
            _weight(layer)[old:] = mean.to(_weight(layer).dtype)
    return list(range(old, size))


def rows_by_layer(model: PreTrainedModel, rows: Sequence[int]) -> dict[str, Sequence[int]]:
    """Return new rows by the name of each layer that has them, for adapters to train."""
    layers = {id(layer) for layer in _layers(model)}
    return {name: rows for name, module in model.named_modules() if rows and id(module) in layers}


def _layers(model: PreTrainedModel) -> list[Any]:
    return [model.get_input_embeddings(), model.get_output_embeddings()]


def _weight(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = layer.weight
    return weight
