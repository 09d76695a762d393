"""The limit: what fraction of the machine's own matrix-product peak training reaches, and decoding of its bandwidth.

FLOPs of training are 6 a weight and token that goes through it (2 forward, 4 backward; 4 in all where the base is
frozen), and attention's (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B), of which causal masks
leave half. A decoding step has to read every weight, and the keys and values of every row, at least once. Both peaks
are measured here, by the same torch on the same thread: the largest of several shapes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch
from throughput_setting import (
    SHAPES,
    Arm,
    Done,
    Setting,
    Shape,
    alternate,
    build,
    endless,
    prompts,
    responses,
    tokenizer,
)

from trlhf.logprobs import pad_sequences, response_logprobs
from trlhf.models import encode_prompt
from trlhf.rollout import Sampling, sample_responses

ROWS, LIMIT = 16, 64  # rows of a training pass; tokens that every response gets
BATCHES = (1, 16, 128)  # responses decoded together


def timed(work: Callable[[], object], device: str, least: float = 0.3) -> float:
    """Return the shortest time of a repetition of some work, in seconds of this process on a CPU."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    work()
    best, begun = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - begun < least:
        start = clock()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, clock() - start)
    return best


def peak_flops(setting: Setting, dtype: torch.dtype) -> float:
    """Return the most FLOPs a second that a matrix product reaches."""
    sizes = [(256, 256, 256)] if setting.quick else [(512, 512, 512), (1024, 1024, 1024), (2048, 1024, 4096)]
    if setting.device == "cuda" and not setting.quick:
        sizes = [(4096, 4096, 4096), (8192, 8192, 8192), (8192, 4096, 14336)]
    rates = []
    for rows, inner, columns in sizes:
        left = torch.randn(rows, inner, device=setting.device, dtype=dtype)
        right = torch.randn(columns, inner, device=setting.device, dtype=dtype)
        work = lambda a=left, b=right: torch.nn.functional.linear(a, b)  # noqa: E731
        rates.append(2 * rows * inner * columns / timed(work, setting.device))
    return max(rates)


def peak_bandwidth(setting: Setting) -> float:
    """Return the most bytes a second that are read from memory, beyond every cache."""
    size = 2**22 if setting.quick else 2**28 if setting.device == "cpu" else 2**32  # bytes
    held = torch.ones(size // 4, device=setting.device)
    return size / timed(held.sum, setting.device)


def weights_of(shape: Shape) -> int:
    """Return the weights that every token is multiplied with: all but the embeddings, of which one row is read."""
    attention = shape.hidden * 2 * (shape.hidden + shape.hidden * shape.kv_heads // shape.heads)
    return shape.layers * (attention + 3 * shape.hidden * shape.intermediate) + shape.vocabulary * shape.hidden


def training_flops(shape: Shape, tokens: float, length: float, per_weight: int = 6) -> float:
    """Return the FLOPs of forward and backward passes over tokens of sequences of a mean length, causal."""
    attention = 2 * per_weight * shape.hidden * length / 2 * shape.layers  # half of the square is masked
    return tokens * (per_weight * weights_of(shape) + attention)


def decoding_bytes(shape: Shape, rows: int, length: float, value: int) -> float:
    """Return the bytes that one step reads: every weight once, keys and values of rows of a mean length."""
    cache = 2 * shape.layers * shape.hidden * shape.kv_heads // shape.heads
    return value * (weights_of(shape) + rows * length * cache)


def measure_limit(setting: Setting) -> dict[str, Any]:
    """Measure peaks, then our training pass and decoding; what is shared or left out still counts as work to do."""
    shape, dtype = SHAPES[setting.model], torch.bfloat16 if setting.device == "cuda" else torch.float32
    flops, bandwidth = peak_flops(setting, dtype), peak_bandwidth(setting)
    rows = [training_row(setting, shape, flops, dtype)]
    model = endless(build(setting, dtype=dtype))
    for batch in BATCHES[: setting.size(3, 3, 2)]:
        rows.append(decoding_row(setting, shape, model, batch, flops, bandwidth))
    return {"peak_gflops": flops / 1e9, "bandwidth_gb": bandwidth / 1e9, "limits": rows}


def training_row(setting: Setting, shape: Shape, flops: float, dtype: torch.dtype) -> dict[str, Any]:
    """Measure forward and backward passes over GSM8K's lengths."""
    ids = tokenizer()
    count = setting.size(ROWS, ROWS, 2)
    asked = [encode_prompt(ids, prompt.messages) for prompt in prompts(count, ids)]
    batch = pad_sequences(asked, responses(count, ids), int(ids.pad_token_id)).to(setting.device)
    model = build(setting, dtype=dtype).train()
    tokens = sum(map(len, asked)) + int(batch.response_mask.sum())

    def work() -> Done:
        model.zero_grad(set_to_none=True)
        response_logprobs(model, batch).sum().backward()
        return Done(tokens)

    found = alternate([Arm("trlhf", lambda: work)], setting)["trlhf"]
    reached = training_flops(shape, tokens, tokens / count) * found["per_second"] / tokens
    return {"what": f"training, {count} sequences", "per_second": found["per_second"], "of_flops": reached / flops}


def decoding_row(
    setting: Setting, shape: Shape, model: Any, batch: int, flops: float, bandwidth: float
) -> dict[str, Any]:
    """Measure decoding; the bound is the larger of the times that reading and multiplying take at the peaks."""
    ids = tokenizer()
    limit = setting.size(LIMIT, LIMIT // 2, 4)
    asked = prompts(batch, ids)
    draws = random.Random(0).randrange(2**31)

    def work(tokens: int) -> Callable[[], object]:
        how = Sampling(1.0, tokens, 1, batch)
        return lambda: sample_responses(model, ids, asked, how, torch.Generator().manual_seed(draws))

    device = setting.device
    steps = timed(work(limit), device) - timed(work(1), device)  # without reading the prompts
    value = 2 if model.dtype == torch.bfloat16 else 4
    prompt = sum(len(encode_prompt(ids, prompt.messages)) for prompt in asked) / batch
    reading = decoding_bytes(shape, batch, prompt + limit / 2, value) / bandwidth
    multiplying = training_flops(shape, batch, 2 * (prompt + limit / 2), per_weight=2) / flops
    took = steps / (limit - 1)
    return {
        "what": f"decoding, {batch} at a time",
        "per_second": batch / took,
        "of_bandwidth": reading / took,
        "of_flops": multiplying / took,
        "of_the_bound": max(reading, multiplying) / took,
    }
