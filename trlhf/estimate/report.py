"""The estimate in words and tables: memory by stage and part, whether it fits, what to change, and time."""

from __future__ import annotations

from trlhf.console import CONSOLE, print_table
from trlhf.estimate.memory import PARTS, Job, peaks
from trlhf.estimate.remedies import Remedy, needed, remedies
from trlhf.estimate.speed import machine_of, seconds_of
from trlhf.estimate.stages import phases_of
from trlhf.hardware import GIB, memory_of

SHOWN = 4  # remedies


def print_estimate(job: Job) -> None:
    """Print memory, what to change, and time."""
    largest = peaks(phases_of(job))
    used = [part for part in PARTS if any(phase.parts.get(part) for phase in largest.values())]
    small = max(phase.total for phase in largest.values()) < 2 * GIB
    unit, size, digits = ("MiB", 2**20, 0) if small else ("GiB", GIB, 2)
    rows = [
        [
            stage,
            phase.name,
            *(f"{value / size:.{digits}f}" for value in [*(phase.parts.get(part, 0.0) for part in used), phase.total]),
        ]
        for stage, phase in largest.items()
    ]
    card = " of each card" if job.config.hardware.name == "multi-gpu" else ""
    title = (
        f"Memory estimate in {unit}{card}, {job.shape.parameters / 1e9:.3f} billion parameters, {job.lengths.source}"
    )
    print_table(title, ["stage", "largest phase", *used, "sum"], rows)
    for line in (lengths_line(job), *fit_lines(job), time_line(job), TRUST):
        CONSOLE.print("  " + line, highlight=False, markup=False)


TRUST = (
    "exact: weights, adapters, gradients, optimizer, KV cache; derived and checked against autograd: activations; "
    "modelled: logits, other, time"
)


def lengths_line(job: Job) -> str:
    """Return the lengths that the estimate rests on."""
    lengths = job.lengths
    return (
        f"longest: demonstrations {lengths.demonstration} tokens, prompts {lengths.prompt}, responses "
        f"{lengths.response}, test prompts {lengths.test_prompt} ({lengths.source})"
    )


def fit_lines(job: Job) -> list[str]:
    """Return whether it fits, and what to change."""
    stage, most = needed(job)
    limit, found = memory_of(job.config), remedies(job)
    beside = "Python and its libraries" if job.device == "cpu" else "CUDA's context and holes between blocks"
    text = f"memory: stage {stage} needs most, {most / GIB:.1f} GiB with {beside}"
    if limit is None:
        lines = [f"{text}; what there is, is not known"]
    elif most <= limit:
        lines = [f"{text}; it fits into {limit / GIB:.1f} GiB"]
    else:
        lines = [f"{text}; it does NOT fit into {limit / GIB:.1f} GiB"]
    if found:
        shown = "; ".join(_said(remedy, most, limit) for remedy in found[:SHOWN])
        lines.append(f"what saves memory, most first: {shown}")
    return lines


def _said(remedy: Remedy, most: float, limit: float | None) -> str:
    fits = " (then it fits)" if limit is not None and remedy.needed <= limit < most else ""
    return f"{remedy.change} {remedy.saved / GIB:.1f} GiB{fits}"


def time_line(job: Job) -> str:
    """Return the seconds of each stage, and what they rest on."""
    machine = machine_of(job)
    seconds = seconds_of(job, machine)
    stages = ", ".join(f"{stage} {_duration(value)}" for stage, value in seconds.items())
    return f"time, modelled: {stages}; {machine.source}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
