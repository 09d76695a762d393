"""What the measurements of `throughput.py` share: model shapes, texts of GSM8K's lengths, alternating runs, peaks."""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM, PreTrainedTokenizerBase

from trlhf.models import MICRO_BASE, encode_prompt
from trlhf.types import Prompt

# Tokens of question and solution of 64 problems drawn at random from GSM8K's training set: characters / 3.6 and / 3.1
# (calculator marks taken out), about what Mistral's tokenizer makes of them. https://github.com/openai/grade-school-math
GSM8K_LENGTHS = (
    (63, 63), (119, 124), (113, 77), (101, 68), (150, 146), (146, 115), (120, 95), (78, 40), (69, 82), (66, 65),
    (127, 128), (51, 52), (83, 68), (99, 94), (51, 80), (55, 126), (131, 175), (40, 65), (78, 56), (56, 228),
    (41, 84), (86, 99), (64, 58), (47, 27), (41, 43), (101, 98), (59, 70), (56, 76), (103, 114), (64, 58),
    (86, 65), (39, 85), (65, 77), (24, 94), (41, 26), (50, 76), (39, 58), (83, 55), (102, 110), (58, 81),
    (35, 70), (56, 49), (34, 51), (69, 70), (24, 49), (71, 106), (129, 144), (69, 66), (125, 98), (54, 42),
    (67, 71), (34, 75), (73, 55), (47, 81), (106, 107), (29, 51), (56, 103), (46, 99), (45, 46), (43, 36),
    (110, 140), (62, 31), (71, 73), (51, 36),
)  # fmt: skip
WORDS = ("Ann", "has", "12", "red", "apples", "buys", "7", "more", "boxes", "of", "pens", "then", "gives", "3", "away")
MEAN_RESPONSE = 80  # tokens; random weights end a sampled response with probability 1 / MEAN_RESPONSE at every token


@dataclass(frozen=True)
class Shape:
    """Sizes of a Mistral."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 640  # the embedded tokenizer's
    positions: int = 1024


SHAPES = {
    "tiny": Shape(64, 128, 2, 4, 2),  # stands in for the next ones in a smoke test
    "micro": Shape(128, 384, 4, 4, 2),  # the embedded base
    "25m": Shape(512, 1408, 8, 8, 4),
    "mistral-7b": Shape(4096, 14336, 32, 32, 8, 32_000, 32_768),
}


@dataclass(frozen=True)
class Setting:
    """How a measurement runs.

    Attributes:
        model: a key of `SHAPES`; weights are random.
        device: ``cpu`` or ``cuda``.
        repeats: runs of every arm, which take turns.
        quick: sizes of a smoke test, whose figures mean nothing.
        folder: where models that have to be on disk are kept between runs.
    """

    model: str = "micro"
    device: str = "cpu"
    repeats: int = 3
    quick: bool = False
    folder: Path = Path("runs/throughput")

    def size(self, full: int, large: int, quick: int) -> int:
        """Return a size of the measurement of the embedded shape, of a larger one, or of the smoke test."""
        return quick if self.quick else full if self.model == "micro" else large


def tokenizer() -> PreTrainedTokenizerBase:
    """Return the embedded tokenizer, with its chat template."""
    return AutoTokenizer.from_pretrained(MICRO_BASE)


def build(setting: Setting, ends: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """Return a Mistral of the setting's shape with random weights, dropout off.

    Args:
        setting: shape and device.
        ends: give the head a bias towards EOS, so that sampled responses end as `MEAN_RESPONSE` says.
        dtype: of the weights.
    """
    shape, ids = SHAPES[setting.model], tokenizer()
    config = MistralConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        sliding_window=None,
        **{name: getattr(ids, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(setting.device):
            model = MistralForCausalLM(config).eval()
            if ends:
                bias = torch.zeros(shape.vocabulary)
                bias[ids.eos_token_id] = torch.tensor((shape.vocabulary - 1) / (MEAN_RESPONSE - 1)).log()
                model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    finally:
        torch.set_default_dtype(before)
    return model


def endless(model: Any) -> Any:
    """Let a model of `build` never end a response by itself, so that all are as long as the limit says."""
    bias = torch.zeros(model.config.vocab_size, dtype=model.dtype, device=model.device)
    bias[model.config.eos_token_id] = -1e4
    model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return model


def lengths(count: int) -> list[tuple[int, int]]:
    """Return tokens of ``count`` prompts and responses, GSM8K's over and over."""
    return [GSM8K_LENGTHS[i % len(GSM8K_LENGTHS)] for i in range(count)]


def prompts(count: int, ids: PreTrainedTokenizerBase) -> list[Prompt]:
    """Return different prompts that are, template and all, about as long as GSM8K's questions."""
    rng = random.Random(0)
    template = len(encode_prompt(ids, ({"role": "user", "content": ""},)))
    return [
        Prompt(f"p{i}", ({"role": "user", "content": words(f"{i}", length - template, rng, ids)},))
        for i, (length, _) in enumerate(lengths(count))
    ]


def words(start: str, length: int, rng: random.Random, ids: PreTrainedTokenizerBase) -> str:
    """Return random words behind some text, about ``length`` tokens together."""
    text = start
    while len(ids(text, add_special_tokens=False)["input_ids"]) < length:
        text += " " + rng.choice(WORDS)
    return text


def responses(count: int, ids: PreTrainedTokenizerBase, seed: int = 0) -> list[list[int]]:
    """Return random tokens, EOS last, as many as GSM8K's solutions have."""
    rng, first = random.Random(seed), max(ids.all_special_ids) + 1
    size = len(ids)
    return [
        [rng.randrange(first, size) for _ in range(length - 1)] + [int(ids.eos_token_id)]
        for _, length in lengths(count)
    ]


@dataclass
class Done:
    """What one timed run did.

    Attributes:
        units: of work, for the rate.
        facts: what is compared between arms, or reported beside the rate.
        took: seconds and this process's CPU seconds of the work alone, where the arm could not do all set-up before;
            else it is timed from outside.
    """

    units: float
    facts: dict[str, Any] = field(default_factory=dict)
    took: tuple[float, float] | None = None


class Watch:
    """Seconds, and CPU seconds of this process, since it was made."""

    def __init__(self) -> None:
        self._begun = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Return both."""
        return time.perf_counter() - self._begun[0], time.process_time() - self._begun[1]


@dataclass(frozen=True)
class Arm:
    """One way to do the work: ``prepare`` does what is not timed and returns what is."""

    name: str
    prepare: Callable[[], Callable[[], Done]]


def alternate(arms: Sequence[Arm], setting: Setting) -> dict[str, dict[str, Any]]:
    """Run every arm ``setting.repeats`` times, in turn, forwards and backwards, and return medians.

    Returns:
        By arm: ``per_second`` (median), ``seconds`` and ``cpu_seconds`` of each run, ``units``, ``peak_mb`` above what
        was held before (largest; on a CPU that of the first run, before which freed memory is handed back), and the
        last run's facts.
    """
    found: dict[str, list[tuple[Done, float]]] = {arm.name: [] for arm in arms}
    for repeat in range(setting.repeats):
        for arm in arms if repeat % 2 == 0 else reversed(arms):
            release(setting.device)  # the last arm's models, before the next one's are there
            work = arm.prepare()
            gc.collect()
            held, watch = reset_peak(setting.device, trim=repeat == 0), Watch()
            done = work()
            if setting.device == "cuda":
                torch.cuda.synchronize()
            done.took = done.took or watch.read()
            found[arm.name].append((done, peak(setting.device) - held))
            del work
    return {name: summary(runs) for name, runs in found.items()}


def release(device: str) -> None:
    """Let go of what nobody uses any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def summary(runs: Sequence[tuple[Done, float]]) -> dict[str, Any]:
    """Return the runs of one arm as they are reported."""
    took = [done.took for done, _ in runs if done.took is not None]
    return {
        "per_second": statistics.median(
            done.units / seconds for (done, _), (seconds, _) in zip(runs, took, strict=True)
        ),
        "seconds": [round(seconds, 4) for seconds, _ in took],
        "cpu_seconds": [round(cpu, 4) for _, cpu in took],
        "units": runs[-1][0].units,
        "peak_mb": round(max(memory for _, memory in runs), 1),
        **runs[-1][0].facts,
    }


def reset_peak(device: str, trim: bool = False) -> float:
    """Begin to watch memory anew; return the megabytes held now.

    Args:
        device: ``cpu`` or ``cuda``.
        trim: hand back to the system what was freed and kept (`trlhf.allocator`): else a peak below an earlier one
            cannot be seen, but what comes next pays for fresh pages.
    """
    if trim and device != "cuda":
        gc.collect()
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e6
    with suppress(OSError):  # not Linux: peaks are then of the whole process
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _resident("VmRSS")


def peak(device: str) -> float:
    """Return the most megabytes held since `reset_peak`."""
    return torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else _resident("VmHWM")


def _resident(name: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(name))


def ratios(measured: dict[str, dict[str, Any]], peers: Sequence[str], cpu: bool = False) -> dict[str, float]:
    """Return how many times as fast as its peers ``trlhf`` is.

    Args:
        measured: arms, ``trlhf`` among them.
        peers: names of the others.
        cpu: by CPU seconds instead of seconds: other processes matter less to them.
    """

    def rate(arm: dict[str, Any]) -> float:
        return float(arm["units"] / statistics.median(arm["cpu_seconds"]) if cpu else arm["per_second"])

    return {peer: round(rate(measured["trlhf"]) / rate(measured[peer]), 3) for peer in peers}


def compared(unit: str, measured: dict[str, dict[str, Any]], marks: dict[str, float]) -> dict[str, Any]:
    """Return a cell of the results: arms, how many times as fast ours is, and how many it should be at least."""
    peers = [name for name in measured if name != "trlhf"]
    by_cpu = ratios(measured, peers, cpu=True)
    return {"unit": unit, "arms": measured, "ratios": ratios(measured, peers), "ratios_cpu": by_cpu, "marks": marks}
