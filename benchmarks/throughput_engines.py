"""Which of transformers' own ways to generate is the best, and how ours compares: not part of the table, run once.

    python benchmarks/throughput.py --only engines --models micro

Dynamic cache, static cache, static cache with a compiled forward pass, and continuous batching, on the same prompts and
lengths. What compiling costs is reported beside the rate and not counted in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from throughput_rollouts import BATCH, LIMIT, SAMPLES, our_arm
from throughput_setting import Arm, Done, Setting, alternate, build, compared, prompts, tokenizer
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

from trlhf.models import encode_prompt
from trlhf.types import Prompt

SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def measure_engines(setting: Setting) -> dict[str, Any]:
    """Measure every way that runs here; one that does not is named with what it says."""
    ids = tokenizer()
    asked = sorted(
        prompts(setting.size(BATCH // SAMPLES, 8, 2), ids), key=lambda prompt: len(encode_prompt(ids, prompt.messages))
    )
    limit = setting.size(LIMIT, LIMIT // 2, 6)
    model = build(setting, ends=True)
    compiled = CompileConfig()
    compiled._compile_all_devices = True  # else transformers compiles on GPUs alone
    ways: dict[str, Callable[[], Callable[[], Done]]] = {
        "dynamic cache": lambda: batched(model, ids, asked, limit),
        "static cache": lambda: batched(model, ids, asked, limit, cache_implementation="static", disable_compile=True),
        "static cache, compiled": lambda: batched(
            model, ids, asked, limit, cache_implementation="static", compile_config=compiled
        ),
        "continuous batching": lambda: continuous(build(setting, ends=True), ids, asked, limit),
    }
    arms, failed, first = [our_arm(model, ids, asked, limit=limit)], {}, {}
    for name, prepare in ways.items():
        begun = time.perf_counter()
        try:
            prepare()()
        except Exception as error:  # what a way that cannot run here raises is its own affair
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        first[name] = round(time.perf_counter() - begun, 1)
        arms.append(Arm(name, prepare))
    return compared("tokens/s", alternate(arms, setting), {}) | {"failed": failed, "first_run_s": first}


def batched(model: Any, ids: Any, asked: Sequence[Prompt], limit: int, **how: Any) -> Callable[[], Done]:
    """Return ``model.generate`` on one padded batch."""
    encoded = [encode_prompt(ids, prompt.messages) for prompt in asked]
    width, pad, eos = max(map(len, encoded)), int(ids.pad_token_id), int(ids.eos_token_id)
    tokens = torch.tensor([[pad] * (width - len(row)) + row for row in encoded])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded])
    config = GenerationConfig(
        **SAMPLED, max_new_tokens=limit, num_return_sequences=SAMPLES, eos_token_id=eos, pad_token_id=pad, **how
    )

    def work() -> Done:
        torch.manual_seed(0)
        with torch.no_grad():
            rows = model.generate(tokens, attention_mask=mask, generation_config=config)[:, width:].tolist()
        return Done(sum(row.index(eos) + 1 if eos in row else len(row) for row in rows), {"responses": len(rows)})

    return work


def continuous(model: Any, ids: Any, asked: Sequence[Prompt], limit: int) -> Callable[[], Done]:
    """Return ``model.generate_batch``, with as many pages as all responses need at once."""
    encoded = [encode_prompt(ids, prompt.messages) for prompt in asked for _ in range(SAMPLES)]
    page = 32
    pages = sum((len(row) + limit) // page + 1 for row in encoded)
    pool = ContinuousBatchingConfig(page_size=page, num_blocks=pages, max_batch_tokens=max(512, 2 * len(encoded)))
    config = GenerationConfig(
        **SAMPLED, max_new_tokens=limit, eos_token_id=int(ids.eos_token_id), pad_token_id=int(ids.pad_token_id)
    )

    def work() -> Done:
        torch.manual_seed(0)
        found = model.generate_batch(encoded, generation_config=config, continuous_batching_config=pool, warmup=False)
        return Done(sum(len(row.generated_tokens) for row in found.values()), {"responses": len(found)})

    return work
