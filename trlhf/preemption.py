"""SIGTERM, the notice that a machine is about to be taken away: stop where the same command goes on. No torch here."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

EXIT_STATUS = 128 + signal.SIGTERM  # what shells and schedulers expect of a process that SIGTERM ended


class Preempted(BaseException):
    """Report that SIGTERM has ended a run; the same call goes on from what is on disk.

    It is no ``Exception``, since it can come up anywhere: nothing that handles errors may take it for one.
    """

    @classmethod
    def at(cls, stage: str, step: int) -> Preempted:
        """Return the report of a loop that has saved its state after a step."""
        return cls(f"stopped by SIGTERM at step {step} of the {stage} stage; the same command goes on from there")


@dataclass
class _Watch:
    received: bool = False
    patient: bool = False  # whether a loop asks ``requested`` after every step
    shields: int = 0  # blocks that must be left first


_watch: _Watch | None = None


@contextmanager
def watch() -> Iterator[None]:
    """Make SIGTERM raise `Preempted` while the block runs, at once or, inside `patient`, where the loop says.

    Signals reach Python's main thread only, so in another one this does nothing. The old handler comes back at the end.
    """
    global _watch
    old = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or _watch is not None or old is None:
        yield  # None: a handler that was not set from Python, which could not be put back
        return
    _watch = _Watch()
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
        _watch = None


@contextmanager
def patient() -> Iterator[None]:
    """Let a loop end the step that is under way: inside the block the first SIGTERM only makes `requested` true.

    The loop asks after every step, saves its state and raises ``Preempted.at(…)``. A SIGTERM that comes too late to be
    asked about stops on leaving the block, a second one at once.
    """
    watched = _watch
    if watched is None:
        yield
        return
    watched.patient = True
    try:
        yield
    finally:
        watched.patient = False
    if watched.received and not watched.shields:
        raise _stopped()


@contextmanager
def shielded() -> Iterator[None]:
    """Let a block end that others take part in: the first SIGTERM inside of it stops on leaving it, or as `patient`."""
    watched = _watch
    if watched is None:
        yield
        return
    watched.shields += 1
    try:
        yield
    finally:
        watched.shields -= 1
    if watched.received and not watched.patient and not watched.shields:
        raise _stopped()


def requested() -> bool:
    """Return whether SIGTERM has come."""
    return _watch is not None and _watch.received


def _on_sigterm(_number: int, _frame: FrameType | None) -> None:
    if _watch is None:
        return
    wait = (_watch.patient or _watch.shields > 0) and not _watch.received
    _watch.received = True
    if not wait:
        raise _stopped()


def _stopped() -> Preempted:
    return Preempted("stopped by SIGTERM; the same command goes on from what is on disk")
