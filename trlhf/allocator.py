"""Memory that is freed: kept by the C library where that makes training faster, handed back between models."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc takes no more
_KEPT = 1 * 2**30  # bytes at the top of the heap that are not handed back


def keep_freed_memory() -> None:
    """Let glibc reuse freed tensors instead of handing them back to the system; elsewhere do nothing.

    By default every tensor beyond 128 KiB is a mapping of its own, and every forward pass pays for fresh zeroed pages:
    43% of SFT's time on the embedded base went there (benchmarks/LOG.md).
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)


def let_go() -> None:
    """Let go of models that nobody uses any more before others are loaded; their cycles would stay beside them."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
