"""Scaling: time and memory of ours against sequence length, batch, prompts of the pool and labels of the ledger."""

from __future__ import annotations

import random
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from throughput_setting import Setting, Watch, build, endless, peak, prompts, reset_peak, tokenizer

from trlhf.ledger import Ledger, question_key
from trlhf.ledger_store import answer_table, question_row, question_table
from trlhf.logprobs import pad_sequences, response_logprobs
from trlhf.rl.checkpoint import Progress
from trlhf.rl.frontier import describe_frontier, draw_candidates, posterior_of, refit_prior
from trlhf.rollout import Sampling, sample_responses
from trlhf.targeting import training_weights
from trlhf.types import Prompt, Question

Work = Callable[[], object]
CANDIDATES, PER_STEP, GROUP, ASKED = 256, 16, 8, 32  # of a round; of a step; samples of a prompt; labels bought at once
PER_PROMPT = 4  # labels of the ledger about one prompt
LINEAR = 1.3  # most that time may grow by, over what size does, from the smallest size to the largest


def measure_scaling(setting: Setting) -> dict[str, Any]:
    """Measure every series; pool and ledger, which no model touches, with the first shape only."""
    rows = [*training(setting), *rollouts(setting)]
    if setting.model == "micro":
        rows += [*pool(setting), *ledger(setting)]
    return {"rows": rows, "worse_than_linear": worse(rows)}


def worse(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the series whose time grows faster than `LINEAR` says.

    Attention is quadratic, so the length of a sequence is not among them.
    """
    last = {row["series"]: row for row in rows}  # of each series, its largest size
    return [name for name, row in last.items() if row["linear"] and row["growth"] > LINEAR]


def series(
    name: str, sizes: Sequence[int], works: Callable[[int], Iterator[tuple[str, Work]]], setting: Setting, **how: Any
) -> Iterator[dict[str, Any]]:
    """Measure works of growing size.

    Args:
        name: of what grows.
        sizes: ascending.
        works: names and work of a size, as a generator that has set up what they need.
        setting: says how often each is run; the first run, whose memory is fresh, gives the peak.
        how: ``linear``, whether time should not grow faster than size; ``once``, for work that cannot be repeated.
    """
    first: dict[str, tuple[int, float]] = {}
    for size in sizes:
        for work_name, work in works(size):
            held = reset_peak(setting.device, trim=True)
            seconds = []
            memory = 0.0
            for repeat in range(1 if how.get("once") else max(2, setting.repeats)):
                watch = Watch()
                work()
                if setting.device == "cuda":
                    torch.cuda.synchronize()
                seconds.append(watch.read())
                memory = memory if repeat else peak(setting.device) - held
            took, cpu = (statistics.median(column) for column in zip(*seconds, strict=True))
            label = f"{name}: {work_name}"
            least, begun = first.setdefault(label, (size, cpu))
            yield {
                "series": label,
                "size": size,
                "seconds": took,
                "cpu_seconds": cpu,
                "peak_mb": round(memory, 1),
                "growth": round(cpu / max(begun, 1e-9) / (size / least), 3),
                "linear": bool(how.get("linear", True)),
            }


def training(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measure forward and backward passes of our losses: by tokens of a sequence, and by sequences."""
    model = build(setting).train()
    pad, size = int(tokenizer().pad_token_id), int(model.config.vocab_size)

    def step(rows: int, length: int) -> Work:
        rng = random.Random(0)
        texts = [[rng.randrange(8, size) for _ in range(length)] for _ in range(rows)]
        batch = pad_sequences([t[: length // 2] for t in texts], [t[length // 2 :] for t in texts], pad)
        batch = batch.to(setting.device)

        def work() -> None:
            model.zero_grad(set_to_none=True)
            response_logprobs(model, batch).sum().backward()

        return work

    few = setting.size(8, 2, 2)
    lengths = setting.size(1, 1, 0) * [128, 256, 512, 1024] or [16, 32]
    counts = setting.size(1, 1, 0) * [few, 4 * few, 16 * few] or [2, 4]
    yield from series(
        "tokens of a sequence", lengths, lambda n: iter([("training pass", step(few, n))]), setting, linear=False
    )
    yield from series("sequences of a pass", counts, lambda n: iter([("training pass", step(n, 128))]), setting)


def rollouts(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measure sampling, by responses decoded together: 8 of a prompt, cut at a length that all of them reach."""
    model, ids = endless(build(setting)), tokenizer()
    limit = setting.size(64, 32, 8)
    counts = setting.size(1, 1, 0) * [16, 64, 256] or [8, 16]

    def sampling(count: int) -> Work:
        asked = prompts(count // GROUP, ids)
        how = Sampling(1.0, limit, GROUP, count)
        return lambda: sample_responses(model, ids, asked, how, torch.Generator().manual_seed(0))

    yield from series("responses decoded together", counts, lambda n: iter([("rollout", sampling(n))]), setting)


def pool(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measure what a round does with its whole pool, every prompt of which has been sampled before."""

    def works(count: int) -> Iterator[tuple[str, Work]]:
        asked = [Prompt(f"p{i}", ({"role": "user", "content": f"{i}"},), kind=f"k{i % 7}") for i in range(count)]
        rng = np.random.default_rng(0)
        state = Progress(drift=0.3)
        for prompt, share, told in zip(asked, rng.uniform(0.2, 1, count), rng.uniform(size=count), strict=True):
            features = [float(share), float(1 - share), -0.3]
            counts = [8 * float(told), 8 - 8 * float(told)]
            state.looks[prompt.id] = {"features": features, "told": [0.5, 0.1], "counts": counts, "drift": 0.1}

        def draw() -> None:
            weights = training_weights(*posterior_of(state, asked), GROUP)
            np.random.default_rng(0).choice(len(asked), PER_STEP, replace=False, p=weights)

        yield "drawing candidates", lambda: draw_candidates(state, asked, CANDIDATES, random.Random(0), probe=True)
        yield "telling the frontier", lambda: describe_frontier(state, asked, GROUP)
        yield "drawing a step's prompts", draw
        yield "refitting the prior", lambda: refit_prior(state)

    sizes = [256, 512] if setting.quick else [1_000, 8_000, 64_000]
    yield from series("prompts of the pool", sizes, works, setting)


class Agreeing:
    """A labeller that finds everything right."""

    name = "agreeing"

    def answer(self, questions: Sequence[Question]) -> list[str]:
        """Return one outcome for each question."""
        return ["right"] * len(questions)


def question(number: int) -> Question:
    """Return a question about an answer; several are about one prompt."""
    prompt = Prompt(f"p{number // PER_PROMPT}", ({"role": "user", "content": f"How many, {number // PER_PROMPT}?"},))
    response = f"Plan: count them. Step: {number % PER_PROMPT} and none. The answer is {number % PER_PROMPT}."
    return Question("verdict", prompt, (response,), str(number % PER_PROMPT), why="uniform: drawn at random")


def fill(path: Path, count: int) -> None:
    """Write labels into a ledger as buying them would have, but in one transaction."""
    with Ledger(path, 10.0 * count + 1000) as ledger, ledger._store.writing() as connection:
        for start in range(0, count, 10_000):
            asked = [question(number) for number in range(start, min(start + 10_000, count))]
            keys = [question_key(one) for one in asked]
            rows = [{**question_row(q), "key": k, "cost": 1.0, "time": 0.0} for q, k in zip(asked, keys, strict=True)]
            connection.execute(question_table.insert(), rows)
            found = [{"question_key": key, "outcome": "wrong", "labeler": "agreeing", "time": 0.0} for key in keys]
            connection.execute(answer_table.insert(), found)


def ledger(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measure opening a ledger, buying labels, reading all of them, and what they say about answers."""
    folder = setting.folder.resolve() / "ledgers"
    shutil.rmtree(folder, ignore_errors=True)

    def works(count: int) -> Iterator[tuple[str, Work]]:
        path = folder / f"{count}.sqlite"
        fill(path, count)
        budget = 10.0 * count + 1000
        yield "opening", lambda: Ledger(path, budget).close()
        with Ledger(path, budget) as opened:
            bought = [count]

            def buy() -> None:
                opened.ask([question(bought[0] + i) for i in range(ASKED)], Agreeing())
                bought[0] += ASKED

            buy()  # the first one after a start looks at all that was ever spent
            yield f"buying {ASKED} labels", buy
            yield "reading all labels", lambda: opened.labels()
            yield "knowledge from all labels", lambda: _knowledge(path, budget)
            opened.knowledge()

            def learn() -> None:
                buy()
                opened.knowledge()

            yield f"buying {ASKED} and learning from them", learn

    sizes = [200, 400] if setting.quick else [1_000, 32_000, 1_000_000]
    yield from series("labels of the ledger", sizes, works, replace(setting, repeats=2))
    shutil.rmtree(folder, ignore_errors=True)


def _knowledge(path: Path, budget: float) -> None:
    with Ledger(path, budget) as opened:
        opened.knowledge()
