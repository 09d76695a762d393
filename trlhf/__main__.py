"""The command line: compose → check → dispatch. Exit status 0, 2 for a user's error, 130 after Ctrl-C, 143 SIGTERM."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from trlhf import __version__
from trlhf.errors import UserError
from trlhf.preemption import EXIT_STATUS, Preempted
from trlhf.processes import join_tasks, launched

if TYPE_CHECKING:
    from omegaconf import DictConfig


class _JobFailed(UserError):
    """End a sweep whose failed jobs have printed their messages."""


class _Stop(BaseException):
    """Carry a user's error through Hydra, which would print its own lines about an Exception."""

    def __init__(self, error: UserError) -> None:
        self.error = error


def main() -> None:
    """Run the command line and exit; of several processes one does, and the others follow it."""
    try:
        several = launched()[1] > 1
    except UserError as error:
        _fail(str(error))
    if not several:
        _command()
        return
    from trlhf.crew import run_as_one

    try:
        run_as_one(_command)
    except UserError as error:
        _fail(str(error))


def _command() -> None:
    try:
        _main(sys.argv[1:])
    except _Stop as stop:
        _fail(str(stop.error))
    except UserError as error:
        _fail(str(error))
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Preempted as stop:
        _report(str(stop))
        sys.exit(EXIT_STATUS)
    except KeyboardInterrupt:
        print("\ntrlhf: interrupted; the same command continues where it stopped", file=sys.stderr)
        sys.exit(130)


def _main(arguments: list[str]) -> None:
    if arguments == ["--version"]:
        print(f"trlhf {__version__}")
        return
    if arguments in (["--help"], ["-h"]):
        from trlhf.help_text import help_text

        print(help_text())
        return
    import hydra
    from hydra._internal.utils import get_args_parser

    from trlhf.compose import HYDRA_ERRORS, compose, register_schema

    flags: Namespace = get_args_parser().parse_args(arguments)
    if flags.config_path is not None or flags.config_name is not None:
        raise UserError("--config-path and --config-name are not used here; add a folder of your own with --config-dir")
    if not (flags.help or flags.hydra_help or flags.shell_completion):
        composed = compose(flags.overrides, multirun=_multirun(flags), config_dir=flags.config_dir)
        _check_launcher(flags)
        options = [text for text in arguments if text not in flags.overrides]
        sys.argv[1:] = [*options, *composed.overrides]
    register_schema()
    os.environ.setdefault(
        "HYDRA_FULL_ERROR", "1"
    )  # a bug shows its whole traceback; Hydra's own errors are caught here
    try:
        hydra.main(config_path="pkg://trlhf.conf", config_name="config", version_base="1.3")(job)()
    except HYDRA_ERRORS as error:
        raise UserError(" ".join(str(error).split())) from error


def job(values: DictConfig) -> None:
    """Do one run, as Hydra composed it; a sweep goes on with its other jobs after one has failed.

    Raises:
        _JobFailed: in a sweep, after the message was printed.
        _Stop: in a single run.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import open_dict

    from trlhf.compose import config_of
    from trlhf.console import setup_logging

    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if sweep and values.run.dir is None:
        with open_dict(values):
            values.run.dir = str(Path(HydraConfig.get().sweep.dir, HydraConfig.get().sweep.subdir))
    join_tasks()
    try:
        config = config_of(values)
        setup_logging()
        from trlhf.pipeline import run_pipeline

        run_pipeline(config)
    except UserError as error:
        if not sweep:
            raise _Stop(error) from error
        _report(f"job {HydraConfig.get().job.num}: {error}")
        raise _JobFailed("a job of this sweep failed; its message is above") from None


def _check_launcher(flags: Namespace) -> None:
    """Refuse a sweep's launcher among several processes: its jobs would take themselves for those."""
    chosen = [text.partition("=")[2] for text in flags.overrides if text.lstrip("+").startswith("hydra/launcher=")]
    if launched()[1] > 1 and _multirun(flags) and chosen and chosen[-1] != "basic":
        raise UserError(
            f"hydra/launcher={chosen[-1]} starts processes of its own for each job, but this command was started as "
            "several already (WORLD_SIZE); start the sweep with python -m trlhf --multirun …"
        )


def _multirun(flags: Namespace) -> bool:
    return bool(flags.multirun) or any(
        text.lstrip("+").replace(" ", "").lower() == "hydra.mode=multirun" for text in flags.overrides
    )


def _fail(message: str) -> None:
    _report(message)
    sys.exit(2)


def _report(message: str) -> None:
    """Print a message, and note it in the run's log file if there is one by now."""
    print(f"trlhf: {message}", file=sys.stderr)
    if "trlhf.console" in sys.modules:
        from trlhf.console import record

        record(message)


if __name__ == "__main__":
    main()
