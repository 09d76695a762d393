"""Randomness: one seed, and for every use a generator of its own that depends on nothing but that seed and a name.

Nothing has to be saved for a resume: the generator of round 3, step 5 is the same in every process.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed for a named use, such as ``derive_seed(config.seed, "rl", "rollouts", 3)``."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def python_rng(seed: int, *names: str | int) -> random.Random:
    """Return a Python generator for a named use."""
    return random.Random(derive_seed(seed, *names))


def numpy_rng(seed: int, *names: str | int) -> np.random.Generator:
    """Return a NumPy generator for a named use."""
    return np.random.default_rng(derive_seed(seed, *names))


def torch_generator(seed: int, *names: str | int) -> torch.Generator:
    """Return a CPU torch generator for a named use."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, *names))
