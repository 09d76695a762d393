"""Where a result comes from: command, commit, machine. Every results file carries it."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CODE = ("trlhf", "sft", "reward", "conf")  # what a result depends on; documents and results may change


def commit() -> str:
    """Return the short commit, with ``-dirty`` when the code differs from it; ``unknown`` outside git."""
    head = _git("rev-parse", "--short=12", "HEAD").strip()
    return head + ("-dirty" if _git("status", "--porcelain", "--", *CODE).strip() else "") if head else "unknown"


def from_root(path: Path) -> str:
    """Return a path as seen from the repository where it lies inside, so that results name no foreign folders."""
    return str(path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path)


def provenance() -> dict[str, Any]:
    """Return the command line, the commit, the time and the machine with its load now."""
    command = " ".join(["python", *map(shlex.quote, map(public, sys.argv))])
    return {
        "command": command,
        "commit": commit(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "hardware": {
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "load_average": list(os.getloadavg()),
            "threads": os.environ.get("OMP_NUM_THREADS", "default"),
            "system": platform.platform(),
        },
    }


def public(argument: str) -> str:
    """Return an argument of the command line without the folders above the repository, or above what lies elsewhere."""
    key, separator, value = argument.rpartition("=")
    path = Path(value)
    if not value or not (path.is_absolute() or path.exists()):
        return argument
    inside = path.resolve().is_relative_to(ROOT)
    return key + separator + (from_root(path) if inside else f"…/{path.name}")


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
