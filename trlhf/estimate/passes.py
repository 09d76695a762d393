"""What the passes of all stages take beside the weights: decoding, reading hidden states, the language-model head."""

from __future__ import annotations

import math

from trlhf.config import ModelConfig
from trlhf.estimate.activations import (
    Forward,
    Layout,
    Packed,
    Rows,
    activation_bytes,
    forward_of,
    forward_temporaries,
    gradient_temporaries,
)
from trlhf.estimate.memory import Job
from trlhf.estimate.shape import BYTES

TRL_TOKENS, TRL_VOCABULARY = 4096, 32768  # of a tile of logits in TRL's fused head (trl.kernels.chunked_logprob)
POOLED_ROWS, POOLED_TOKENS, POOLED_LOGITS = 64, 8192, 1024  # at a time: trlhf.reward.model, trlhf.reward.features
ROW_TOKENS = 512  # of responses that share a prompt: trlhf.logprobs
LOGITS_AT_ONCE = 2**24  # numbers: trlhf.vocabulary
FIRST_CAPACITY = 64  # tokens of a response: trlhf.decoding


def decoding(job: Job, batch: int, samples: int, prompt: int, response: int, dtype: str) -> list[dict[str, float]]:
    """Return what decoding takes: reading the prompts of a batch, then writing its responses.

    Prompts are held once for all their samples, responses in room that doubles (`trlhf.decoding`), unless attention is
    flash-attention's own: then every row holds its prompt.

    Args:
        job: the run.
        batch: responses written together, whole groups.
        samples: of each prompt.
        prompt: tokens of the longest.
        response: tokens until which all of them are taken to go on.
        dtype: of the model.
    """
    shape, value = job.shape, BYTES[dtype]
    prompts = max(1, batch // samples)
    rows, laid = prompts * samples, float(prompts * prompt)
    if job.config.model.attention.startswith("flash"):
        read, attending = laid, laid * prompt * (1 + value)  # padded, with a mask
        cache = shape.cache_bytes(rows * (prompt + response), dtype)
    else:  # without padding; keys and values once more, for every head of queries, where attention lays them out
        lengths = job.lengths
        mean = min(float(prompt), prompt * lengths.mean_prompt / max(1, lengths.prompt))
        read = prompts * mean - (prompts - 1) * min(lengths.common, mean - 1)
        attending = 2 * laid * shape.queries * value
        room = FIRST_CAPACITY
        while room < response:
            room *= 2
        held = response if job.device == "cpu" else room  # on a CPU room that nobody wrote to takes no memory
        cache = shape.cache_bytes(laid + rows * held, dtype)
    scores = rows * shape.heads * (prompt + response) * (4.0 + 2 * value)
    logits = float(rows * shape.vocabulary * (value + 5 * 4))  # in float32: probabilities, noise, and both once more
    return [
        {
            "KV cache": shape.cache_bytes(read, dtype),
            "activations": forward_temporaries(shape, value, read) + attending,
            "logits": float(prompts * shape.vocabulary * value),
        },
        {"KV cache": cache * (1 + 1 / shape.layers), "activations": scores, "logits": logits},
    ]


def reading(job: Job, rows: int, length: int, dtype: str, adapted: bool = False) -> dict[str, float]:
    """Return what reading hidden states of all layers takes, without gradients: the reward model's features.

    Where the linear layers have adapters, what one of them adds is there beside what it is added to.
    """
    shape, value = job.shape, BYTES[dtype]
    tokens = float(min(min(POOLED_ROWS, rows) * length, max(POOLED_TOKENS, length)))
    states = tokens * (shape.layers - 1) * shape.hidden * value  # beside those of the last layer's pass
    pooled = tokens * shape.hidden * (3 * value + 2 * 4 * 2 + 2 * 4 + (0 if value == 4 else 2 * 2 + 4))
    masks = tokens * length * (1 + value)
    forks = float(min(POOLED_LOGITS, tokens) * shape.vocabulary * (value + 3 * 4))
    added = tokens * shape.intermediate * value if adapted else 0.0
    temporaries = max(forward_temporaries(shape, value, tokens) + added + masks, pooled)
    return {"activations": states + temporaries, "logits": forks}


def rows_of(prompt: int, response: int, responses: int, group: int, shared: bool) -> tuple[int, int]:
    """Return rows and their responses at most, as `trlhf.logprobs.pad_sequences` lays responses out.

    Args:
        prompt: tokens.
        response: tokens.
        responses: of a microbatch.
        group: those that follow one another with the same prompt.
        shared: whether attention takes a mask of our own.
    """
    together = min(group, responses, max(1, (ROW_TOKENS - prompt) // max(1, response))) if shared else 1
    groups, rest = divmod(responses, group)
    return groups * math.ceil(group / together) + math.ceil(rest / together), together


def of_responses(model: ModelConfig, prompt: int, response: int, responses: int, group: int) -> tuple[Forward, Layout]:
    """Return how our own losses compute a microbatch: packed, or in rows where layers are computed twice.

    Args:
        model: of the run.
        prompt: tokens.
        response: tokens.
        responses: of a microbatch.
        group: those that follow one another with the same prompt.
    """
    own_mask = not model.attention.startswith("flash")
    rows, together = rows_of(prompt, response, responses, group, own_mask)
    how = forward_of(model, training=False, masked=rows > 1 or together > 1, shared_mask=together > 1)
    if own_mask and not model.gradient_checkpointing:
        return how, Packed(rows, prompt, responses, response)
    return how, Rows(rows, prompt + together * response)


def fused_head(job: Job, how: Forward, tokens: int) -> float:
    """Return what TRL's fused head takes: logits of a tile, on a CPU seven more of their size, and a gradient."""
    shape, tile = job.shape, min(tokens, TRL_TOKENS)
    gradient = tokens * shape.hidden * 4.0
    if job.device == "cpu":  # only what is used of a tile is ever backed by memory
        return gradient + 8.0 * tile * shape.vocabulary * 4
    return gradient + float(tile * TRL_VOCABULARY * how.computed)


def own_head(job: Job, how: Forward, tokens: int, anchors: bool = False) -> float:
    """Return what the logits of response tokens take in our own losses, a part of them at a time.

    Of a sampled response: the scaled logits and three more of their size in the backward pass, in float32. Of an
    anchor: both distributions, their difference and product, and the logits of both in the model's type.
    """
    vocabulary = job.shape.vocabulary
    part = min(tokens, max(1, LOGITS_AT_ONCE // vocabulary)) * vocabulary
    hidden = tokens * job.shape.hidden * float(how.weight) * (2 if anchors else 1)
    if anchors:
        return hidden + part * (5.0 * 4 + 3 * how.weight)
    return hidden + part * (4.0 * 4 + (0 if how.weight == 4 else 2 * how.weight))


def backward(job: Job, how: Forward, layout: Layout, logits: float) -> dict[str, float]:
    """Return activations and logits at the height of a pass: at its head, or in the widest layer below it."""
    below = gradient_temporaries(job.shape, how, layout.tokens)
    if job.config.model.quantization != "none":  # a weight in 4 bits is made whole to compute with
        below += job.shape.hidden * job.shape.intermediate * how.computed
    kept = activation_bytes(job.shape, how, layout)
    return {"activations": kept + max(0.0, below - logits), "logits": logits}
