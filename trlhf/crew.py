"""One process leads, the others follow: it alone decides and writes, and calls all to what is worth sharing.

The leader (rank 0) runs the program as if there were no other process. `together` calls a function on every process,
with the leader's arguments; `keep` makes an object on every process that may be such an argument from then on, each
process meaning its own. In one process both are plain calls. Nothing heavy is imported before there are several.
"""

from __future__ import annotations

import atexit
import dataclasses
import gc
import io
import json
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

from trlhf import preemption
from trlhf.console import hush
from trlhf.errors import UserError
from trlhf.processes import launched

T = TypeVar("T")
WORKING = timedelta(minutes=30)  # that a process waits for the others inside of what they do together
WAITING = timedelta(days=90)  # that the followers wait for the leader, who may be waiting for people's labels
LAST_WORDS = 10.0  # seconds that a process which failed leaves the leader to say so
ENDED, FAILED, GONE, ARGUMENTS = "ended", "failed", "gone", "arguments"  # keys of the store that all processes share
ABOUT_OTHERS = ("onnection", "roken pipe", "ocket", "gloo")  # in the messages of what happens when one leaves
LEFT = "another of the {} processes has gone without a word (killed, out of memory?): {}; the same command continues"
OVER, QUIT = "over", "quit"


class LeaderEnded(BaseException):
    """End a follower because the leader has ended, who has said why; it is no ``Exception``, as `Preempted` is none."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the leading process ended with status {status}")
        self.status = status


class Crew:
    """The processes of one launch.

    Attributes:
        rank: of this one; 0 leads.
        size: how many there are.
        inside: whether all run the same function now.
    """

    def __init__(self, rank: int, size: int) -> None:
        import torch
        from torch import distributed
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        if distributed.is_initialized():
            raise UserError("torch.distributed was initialised before trlhf, which does so itself; leave it to trlhf")
        # A model of accelerate's FSDP is to be read by one process and sent to the others, which load zeros.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        backend = "gloo"
        if torch.cuda.is_available():
            backend = "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(_card(torch.cuda.device_count()))
        store, _, _ = next(iter(rendezvous("env://", rank, size, timeout=WORKING)))
        work = PrefixStore("work", store)
        distributed.init_process_group(backend, store=work, rank=rank, world_size=size, timeout=WORKING)
        self.rank, self.size, self.inside = rank, size, False
        self._torch, self._distributed = torch, distributed
        self._store = PrefixStore("trlhf", store)
        self._control: Any = distributed.new_group(backend="gloo", timeout=WAITING)
        self._kept: list[Any] = []
        self._places: dict[int, tuple[int, str | None]] = {}

    def call(self, function: Callable[..., T], arguments: tuple[Any, ...], here: dict[str, Any], kept: bool) -> T:
        """Call a function on all processes, as their leader; SIGTERM waits until all are out of it."""
        with preemption.shielded():
            try:
                self._send((function, arguments, kept))
                self.inside = True
                result = function(*arguments, **here)
            except RuntimeError as error:
                if told := self._told_of_failure(error):
                    raise UserError(told) from error
                raise
            finally:
                self.inside = False
            if kept:
                self._register(result)
        return result

    def follow(self) -> Any:
        """Do what the leader calls to, until a run is over; return its result, or `QUIT` at the end of all."""
        with preemption.shielded():
            while True:
                message = self._receive()
                if message == QUIT or message[0] == OVER:
                    return message if message == QUIT else message[1]
                function, arguments, kept = message
                self.inside = True
                result = function(*arguments)
                self.inside = False
                if kept:
                    self._register(result)
                del function, arguments, result, message

    def dismiss(self, result: Any) -> None:
        """Tell the followers that a run is over."""
        self._send((OVER, result))

    def let_go(self) -> None:
        """Forget what `keep` made in this process."""
        self._kept.clear()
        self._places.clear()
        gc.collect()
        if self._torch.cuda.is_available():
            self._torch.cuda.empty_cache()

    def kept(self, number: int, field: str | None) -> Any:
        """Return what `keep` made in this process at its n-th call, or one of its fields."""
        found = self._kept[number]
        return found if field is None else getattr(found, field)

    def compare(self, arguments: list[str]) -> None:
        """Compare with what the others were started with, which nobody would read.

        Raises:
            UserError: on the leader, where another process has other arguments.
        """
        if self.rank > 0:
            self._store.set(f"{ARGUMENTS}{self.rank}", json.dumps(arguments))
            return
        for rank in range(1, self.size):
            theirs = json.loads(self._store.get(f"{ARGUMENTS}{rank}"))
            if theirs != arguments:
                odd = [text for text in (*arguments, *theirs) if (text in arguments) != (text in theirs)]
                raise UserError(
                    f"process {rank} of {self.size} was started with other arguments than this one, which leads "
                    f"({' '.join(odd) or 'in another order'}); give the same command on every machine"
                )

    def end(self, status: int) -> None:
        """Leave, as the leader, with an exit status; the followers leave too."""
        self._store.set(ENDED, str(status))
        if status == 0:
            self._send(QUIT)
        self.part()
        if status:  # the store may live in this process: let them read why
            self._said([f"{GONE}{rank}" for rank in range(1, self.size)], LAST_WORDS)

    def serve(self) -> int:
        """Follow to the end of all; return this process's exit status. The leader speaks for all, if it still can."""
        try:
            with preemption.watch():
                while self.follow() != QUIT:
                    self.let_go()
        except BaseException as error:
            status = self._failed(error)
            with suppress(Exception):
                self._store.set(f"{GONE}{self.rank}", "")
            return status
        self.part()
        return 0

    def part(self) -> None:
        """Close the connections; they stay open as long as anything here knows the group."""
        self._control = None
        if self._distributed.is_initialized():
            self._distributed.destroy_process_group()
        gc.collect()

    def _failed(self, error: BaseException) -> int:
        ended = self._status_of_leader()
        if ended is not None or isinstance(error, (LeaderEnded, KeyboardInterrupt)):
            return ended or 1
        if isinstance(error, preemption.Preempted) or preemption.requested():
            return preemption.EXIT_STATUS
        left = self._is_about_others(error)
        known = left or isinstance(error, UserError)
        told = LEFT.format(self.size, str(error).partition("\n")[0]) if left else str(error)
        if not known:
            told = f"{type(error).__name__}: {error}"
        if not left:
            with suppress(Exception):
                self._store.set(FAILED, f"process {self.rank} of {self.size}: {told}")
        if not known:
            traceback.print_exception(error)
        self.part()  # so that nobody waits for this one
        if self._status_of_leader(LAST_WORDS) is None and known:
            print(f"trlhf: process {self.rank} of {self.size}: {told}", flush=True)
        return 2 if known else 1

    def _status_of_leader(self, seconds: float = 0.5) -> int | None:
        """Return with which status the leader has ended; None if it has not, or nobody can tell any more."""
        return int(self._store.get(ENDED)) if self._said([ENDED], seconds) else None

    def _told_of_failure(self, error: RuntimeError) -> str | None:
        """Return why another process left, if that is what an error of ours is about."""
        left = self._is_about_others(error)
        if self._said([FAILED], LAST_WORDS / 2 if left else 0):
            return self._store.get(FAILED).decode()
        return LEFT.format(self.size, str(error).partition("\n")[0]) if left else None

    def _is_about_others(self, error: BaseException) -> bool:
        """Say whether an error of ours comes of another process that has left."""
        if not isinstance(error, RuntimeError):
            return False
        return isinstance(error, self._distributed.DistError) or any(word in str(error) for word in ABOUT_OTHERS)

    def _said(self, keys: list[str], seconds: float) -> bool:
        """Wait for keys in the store; False if they do not come, or nobody can tell any more."""
        until = time.monotonic() + seconds
        with suppress(Exception):  # torch raises kinds of its own, by version
            while not self._store.check(keys):
                if time.monotonic() > until:
                    return False
                time.sleep(0.02)
            return True
        return False

    def _register(self, made: Any) -> None:
        number = len(self._kept)
        self._kept.append(made)
        if made is None:
            return
        self._places.setdefault(id(made), (number, None))
        if dataclasses.is_dataclass(made) and not isinstance(made, type):
            for field in dataclasses.fields(made):
                value = getattr(made, field.name)
                if type(value).__module__ != "builtins":
                    self._places.setdefault(id(value), (number, field.name))

    def _send(self, message: Any) -> None:
        file = io.BytesIO()
        _Packer(file, self._places, self._torch.nn.Module).dump(message)
        data = self._torch.frombuffer(file.getbuffer(), dtype=self._torch.uint8)
        self._distributed.broadcast(self._torch.tensor([len(data)]), src=0, group=self._control)
        self._distributed.broadcast(data, src=0, group=self._control)

    def _receive(self) -> Any:
        length = self._torch.zeros(1, dtype=self._torch.int64)
        self._distributed.broadcast(length, src=0, group=self._control)
        data = self._torch.empty(int(length), dtype=self._torch.uint8)
        self._distributed.broadcast(data, src=0, group=self._control)
        return pickle.loads(data.numpy().tobytes())


class _Packer(pickle.Pickler):
    """Write what was kept as its place, and refuse models that were not."""

    def __init__(self, file: io.BytesIO, places: dict[int, tuple[int, str | None]], refused: type) -> None:
        super().__init__(file, protocol=5)
        self._places, self._refused = places, refused

    def reducer_override(self, value: Any) -> Any:
        place = self._places.get(id(value))
        if place is not None:
            return _kept, place
        if isinstance(value, self._refused):
            raise TypeError(f"{type(value).__name__} is in this process alone; make it with trlhf.crew.keep")
        return NotImplemented


_crew: Crew | None = None


def connect() -> Crew | None:
    """Join the other processes of this launch, once; None where there are no others.

    Raises:
        UserError: the launcher's variables do not fit together.
    """
    global _crew
    rank, size = launched()
    if _crew is None and size > 1:
        _crew = Crew(rank, size)
        atexit.register(_crew.part)
        if rank > 0:
            hush()
    return _crew


def run_as_one(command: Callable[[], None]) -> None:
    """Run a program in this process if it leads, else follow the one that does; exits with the program's status."""
    crew = connect()
    if crew is None:
        command()
        return
    if crew.rank > 0:
        crew.compare(sys.argv[1:])
        sys.exit(crew.serve())
    status: Any = 1
    try:
        crew.compare(sys.argv[1:])
        command()
        status = 0
    except SystemExit as error:
        status = error.code or 0
        raise
    finally:
        crew.end(status if isinstance(status, int) else 1)


def together(function: Callable[..., T], *arguments: Any, **here: Any) -> T:
    """Call a function on every process and return what it returns here.

    Args:
        function: of a module, or a method of what `keep` made; outside of it the leader is alone.
        *arguments: the leader's, for all: plain values, and what `keep` made.
        **here: of this process only; the others have the defaults.
    """
    if _crew is None or _crew.inside:
        return function(*arguments, **here)
    return _crew.call(function, arguments, here, kept=False)


def keep(function: Callable[..., T], *arguments: Any, **here: Any) -> T:
    """Do as `together`, and let what the function makes on each process be an argument until `release`.

    The fields of a dataclass may be arguments too.
    """
    if _crew is None or _crew.inside:
        return function(*arguments, **here)
    return _crew.call(function, arguments, here, kept=True)


def release() -> None:
    """Let every process forget what `keep` made; the leader's own variables are its own affair."""
    together(_let_go)


def leads_alone() -> bool:
    """Say whether this process leads others that wait meanwhile."""
    return _crew is not None and not _crew.inside


def follows() -> bool:
    """Say whether this process only does what another leads."""
    return _crew is not None and _crew.rank > 0


def _let_go() -> None:
    if _crew is not None:
        _crew.let_go()


def _kept(number: int, field: str | None) -> Any:
    assert _crew is not None
    return _crew.kept(number, field)


def _card(count: int) -> int:
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= count:
        raise UserError(
            f"LOCAL_RANK={local}: a process of its own for each card, but torch sees {count} here; start as many "
            "processes as there are cards"
        )
    return local
