"""One console that log lines, progress bars and tables share."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

CONSOLE = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
LIBRARIES = ("transformers", "datasets", "huggingface_hub", "trl", "accelerate", "peft")
QUIET_SECONDS = 10.0  # between two progress lines where there is no terminal
logger = logging.getLogger("trlhf")
_bars: Progress | None = None


class Advance(Protocol):
    """What :func:`progress` yields."""

    def __call__(self, amount: int = 1, note: str = "") -> None:
        """Move the bar; ``note`` is shown beside it (a loss, say)."""
        ...


class _LineHandler(logging.Handler):
    """One unwrapped line per record, for pipes and files."""

    def emit(self, record: logging.LogRecord) -> None:
        CONSOLE.out(self.format(record), highlight=False)


def setup_logging(run_dir: str | Path | None = None) -> None:
    """Send the log to the console and, once the run directory is known, also to ``run_dir/trlhf.log``.

    May be called again; it replaces what it set up before.
    """
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = []
    if CONSOLE.is_terminal:
        handlers.append(RichHandler(console=CONSOLE, show_path=False, markup=False, log_time_format="[%X]"))
    else:
        handlers.append(_LineHandler())
        handlers[0].setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    if run_dir is not None:
        from trlhf.files import writing

        path = Path(run_dir, "trlhf.log")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(logging.FileHandler(path, encoding="utf-8"))
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.disabled = False
    quiet_libraries()


def quiet_libraries() -> None:
    """Send the warnings of the Hugging Face libraries that are loaded by now to our handlers, and hide their bars.

    Each brings a handler of its own, which would print every line twice; it appears when the library is imported.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses an optional kernel as soon as peft imports it
    for name in LIBRARIES:
        if name in sys.modules:
            library = logging.getLogger(name)
            library.handlers[:] = logger.handlers
            library.propagate = False
            library.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft asks for it
    warnings.filterwarnings("ignore", "Setting `save_embedding_layers`", UserWarning)  # new tokens: as it should
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
    if "datasets" in sys.modules:
        import datasets

        datasets.disable_progress_bars()


def hush() -> None:
    """Say nothing in this process: another one speaks for it."""
    CONSOLE.quiet = True
    logger.handlers[:] = [logging.NullHandler()]
    logger.propagate = False
    warnings.simplefilter("ignore")
    quiet_libraries()


def record(message: str, level: int = logging.ERROR) -> None:
    """Write a line to the log file only; the user has been told already."""
    entry = logger.makeRecord("trlhf", level, "", 0, message, (), None)
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(entry)


@contextmanager
def progress(description: str, total: int) -> Iterator[Advance]:
    """Show how far a piece of work is: a bar on a terminal, now and then a log line elsewhere.

    Args:
        description: what is counted, such as ``rollouts``.
        total: how many there will be.
    """
    quiet_libraries()
    if CONSOLE.is_terminal:
        yield from _bar(description, total)
    else:
        yield from _lines(description, total)


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "", width: int | None = None
) -> None:
    """Print a table, also into the log file; columns but the first are aligned to the right, and long cells wrap.

    Args:
        title: above it.
        columns: their names.
        rows: cells of each row.
        caption: below it.
        width: characters that it has at least, so that title and caption need not wrap.
    """
    table = Table(title=title, title_justify="left", caption=caption or None, caption_justify="left", min_width=width)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    CONSOLE.print(table)
    written = Console(file=StringIO(), width=120)
    written.print(table)
    record("\n" + written.file.getvalue().rstrip(), logging.INFO)  # type: ignore[attr-defined]


def _bar(description: str, total: int) -> Iterator[Advance]:
    global _bars
    outermost = _bars is None
    if _bars is None:  # a bar inside a bar becomes one more line of the same display
        _bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=CONSOLE,
            transient=True,
        )
        _bars.start()
    bars = _bars
    task = bars.add_task(description, total=total, note="")

    def advance(amount: int = 1, note: str = "") -> None:
        bars.update(task, advance=amount, **({"note": note} if note else {}))  # type: ignore[arg-type]

    try:
        yield advance
    finally:
        bars.remove_task(task)
        if outermost:
            bars.stop()
            _bars = None


def _lines(description: str, total: int) -> Iterator[Advance]:
    begun = spoken = time.monotonic()
    done = 0

    def advance(amount: int = 1, note: str = "") -> None:
        nonlocal done, spoken
        done += amount
        now = time.monotonic()
        if now - spoken >= QUIET_SECONDS and done < total:
            spoken = now
            logger.info("%s: %d of %d%s", description, done, total, f" ({note})" if note else "")

    yield advance
    logger.info("%s: %d of %d in %.0f s", description, done, total, time.monotonic() - begun)
