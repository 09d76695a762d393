"""Which code made a run: versions of the packages, and the commit where it runs from a clone. No torch here."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

from trlhf import __version__

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "hydra-core", "scipy")
ROOT = Path(__file__).resolve().parents[1]
CODE = ("trlhf", "sft", "reward", "conf")


def versions() -> dict[str, str]:
    """Return the version of Python, of this library and of the packages that decide what a run computes."""
    found = {name: version for name in PACKAGES if (version := _version(name)) is not None}
    return {"python": platform.python_version(), "trlhf": __version__, **found}


def commit() -> str | None:
    """Return the short commit, with ``-dirty`` where the code differs from it; None for an installed library."""
    if not (ROOT / ".git").exists():  # else a repository around the environment would answer
        return None
    head = _git("rev-parse", "--short=12", "HEAD")
    changed = head is not None and _git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return f"{head}-dirty" if changed else head


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
