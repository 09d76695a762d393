"""Native chain of thought and targeted RLHF for Mistral-7B, from few prompts and few labels.

Importing this package loads no torch; the public names below are loaded when they are first used.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Loaded now, because the function `run` below must be what `trlhf.run` means after this submodule has been imported.
import trlhf.run as _run_module  # noqa: F401

if TYPE_CHECKING:
    from trlhf.errors import ConfigError, UserError
    from trlhf.ledger import Ledger
    from trlhf.preemption import Preempted
    from trlhf.run import RunResult
    from trlhf.types import Label, Prompt, Rollout

__version__ = "0.1.0"
__all__ = ["ConfigError", "Label", "Ledger", "Preempted", "Prompt", "Rollout", "RunResult", "UserError"]
__all__ += ["__version__", "run"]

_HOMES = {
    "ConfigError": "trlhf.errors",
    "Label": "trlhf.types",
    "Ledger": "trlhf.ledger",
    "Preempted": "trlhf.preemption",
    "Prompt": "trlhf.types",
    "Rollout": "trlhf.types",
    "RunResult": "trlhf.run",
    "UserError": "trlhf.errors",
}


def run(overrides: Sequence[str] = ()) -> RunResult:
    """Do what ``python -m trlhf`` does with the same overrides, such as ``["rl=dpo", "targeting.budget=100"]``.

    Returns:
        The run's folder (``dir``) and the content of its ``summary.json`` (``summary``).

    Raises:
        ConfigError: with every problem of the configuration.
        UserError: anything else that the caller can mend.
        Preempted: SIGTERM came while this ran in the main thread; the same call goes on from what is on disk. It is a
            BaseException, as KeyboardInterrupt is. The caller's own handler of SIGTERM is back in place by then.
    """
    from trlhf.compose import compose
    from trlhf.console import setup_logging

    config = compose(overrides).configs[0]
    setup_logging()
    from trlhf.pipeline import run_pipeline

    return run_pipeline(config)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'trlhf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
