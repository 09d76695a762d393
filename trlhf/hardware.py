"""Which machine this is, and which ``hardware=`` file goes with it. No torch here: configuration errors come first."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trlhf.config import Config

GIB = 2**30
LARGE = 70.0  # GiB from which a card is taken for one of 80 GB
SMALLEST = 20.0  # GiB that gpu-24gb needs
QUERY = ("--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits")
NOMINAL = {"gpu-24gb": 22.0, "gpu-80gb": 79.0, "multi-gpu": 79.0}  # GiB, as their files say


@dataclass(frozen=True)
class Card:
    """A graphics card: its name and its memory in GiB."""

    name: str
    memory: float


@dataclass(frozen=True)
class Choice:
    """The name of a ``hardware=`` file, and why it was chosen. ``auto``: none fits what is known."""

    name: str
    reason: str


@cache
def cards() -> tuple[Card, ...] | None:
    """Return the NVIDIA cards that this process may use, as nvidia-smi and ``CUDA_VISIBLE_DEVICES`` say.

    None: there are some, but not with a memory of their own that could be compared (slices of one card, say).
    """
    if shutil.which("nvidia-smi") is None:
        return ()
    try:
        done = subprocess.run(["nvidia-smi", *QUERY], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return visible_cards(done.stdout, os.environ.get("CUDA_VISIBLE_DEVICES"))


def visible_cards(listing: str, visible: str | None) -> tuple[Card, ...] | None:
    """Read nvidia-smi's list (index, uuid, name, MiB) and keep what an environment variable leaves visible.

    CUDA's rule: names are read in order, and the first that matches no card ends the list.
    """
    rows = [[cell.strip() for cell in line.split(",")] for line in listing.splitlines() if line.count(",") == 3]
    if visible is not None:
        wanted, chosen = [name.strip() for name in visible.split(",")], []
        if any(name.startswith("MIG-") for name in wanted):
            return None
        for name in wanted:
            found = [row for row in rows if name and (row[0] == name or row[1].startswith(name))]
            if not found:
                break
            chosen.append(found[0])
        rows = chosen
    if any(not row[3].isdigit() for row in rows):  # "[N/A]": memory shared with the processor
        return None
    return tuple(Card(row[2], int(row[3]) / 1024) for row in rows)


def torch_build() -> str:
    """Return what the installed torch computes on beside the CPU: ``cuda``, ``hip`` or ``cpu`` (nothing else)."""
    spec = find_spec("torch")  # which finds the file and does not load it
    path = Path(spec.origin).parent / "version.py" if spec and spec.origin else None
    text = path.read_text(encoding="utf-8") if path and path.is_file() else ""
    for kind in ("cuda", "hip"):
        if re.search(rf"^{kind}\b[^=]*=\s*['\"]", text, re.MULTILINE):
            return kind
    return "cpu"


def choose(found: tuple[Card, ...] | None, build: str) -> Choice:
    """Choose the ``hardware=`` file for the cards of a machine and the build of torch."""
    if build == "hip":
        return Choice("auto", "torch is built for ROCm, whose cards are not looked at")
    if found is None:
        return Choice("auto", "nvidia-smi does not say how much memory is to be had; choose one with hardware=NAME")
    if not found:
        return Choice("cpu", "no NVIDIA card was found")
    least = min(found, key=lambda card: card.memory)
    seen = f"{least.name}, {least.memory:.1f} GiB" + (f", the smallest of {len(found)}" if len(found) > 1 else "")
    if build == "cpu":
        return Choice("cpu", f"{seen}, but this torch is built without CUDA")
    if least.memory >= LARGE:
        return Choice("multi-gpu" if len(found) > 1 else "gpu-80gb", seen)
    note = "; less than it is made for: see dry_run=true" if least.memory < SMALLEST else ""
    return Choice("gpu-24gb", seen + note)


def look() -> Choice:
    """Choose the ``hardware=`` file for this machine."""
    return choose(cards(), torch_build())


def say(config: Config) -> str:
    """Return in one line what a run takes the machine for, and whether anybody said so."""
    name, found = config.hardware.name, look()
    if config.hardware.automatic:
        reason = found.reason if found.name == name else f"hardware.device={config.hardware.device}"
        return f"hardware: {name}, chosen automatically ({reason}); hardware=NAME chooses another"
    return f"hardware: {name}, as given" if name != "auto" else f"hardware: auto, torch decides ({found.reason})"


def memory_of(config: Config) -> float | None:
    """Return the bytes that one card (or the machine, for the CPU) has, or is said to have; None: not known."""
    hardware = config.hardware
    if hardware.name in NOMINAL:
        found = cards() if hardware.automatic else ()
        return min(card.memory for card in found) * GIB if found else (hardware.memory or NOMINAL[hardware.name]) * GIB
    if hardware.memory is not None:
        return hardware.memory * GIB
    return machine_memory() if hardware.name == "cpu" or hardware.device == "cpu" else None


def machine_memory() -> float | None:
    """Return the bytes of main memory that this process may use; None where the system does not say."""
    try:
        total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (OSError, ValueError, AttributeError):
        return None
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with_limit = Path(path)
        text = with_limit.read_text().strip() if with_limit.is_file() else ""
        if text.isdigit():
            total = min(total, float(text))
    return total
