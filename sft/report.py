"""The trainer's steps go to the progress bar and the stage's metrics; its checkpoints are sealed; SIGTERM stops it."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trlhf import preemption
from trlhf.console import Advance, progress
from trlhf.distributed import any_rank, barrier
from trlhf.errors import UserError
from trlhf.sft.checkpoints import seal

if TYPE_CHECKING:
    from trlhf.run import StageDirectory

_NAMES = {
    "loss": "loss",
    "mean_token_accuracy": "token_accuracy",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "epoch": "epoch",
}


class AllStepsDone(Exception):
    """Leave the trainer when it has loaded the checkpoint of the last step.

    It would begin the epoch of that step once more and, where the epoch is a part of one, take a step too many.
    """


class StageCallback(TrainerCallback):
    """Show every optimizer step, log it to ``metrics.jsonl``, and seal every checkpoint.

    A context: leaving it closes the progress bar.

    Args:
        stage: what is written to; None on a process that writes nothing.
    """

    def __init__(self, stage: StageDirectory | None) -> None:
        self._stage = stage
        self._advance: Advance | None = None
        self._open = ExitStack()
        # when the last step was logged; tokens until then, if known
        self._last: tuple[float, float | None] = (0.0, 0.0)

    def __enter__(self) -> StageCallback:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def begun(self) -> bool:
        """Whether everything was loaded and training has begun."""
        return self._advance is not None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the progress bar, at the step where training goes on.

        Raises:
            AllStepsDone: there is none.
        """
        self._advance = self._open.enter_context(progress("sft steps", state.max_steps))
        self._advance(state.global_step)
        if state.global_step >= state.max_steps:
            raise AllStepsDone

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Append a line; stop when the loss is no number any more."""
        if not logs or "loss" not in logs:  # the trainer's closing summary has another shape
            return
        found = {ours: logs[theirs] for theirs, ours in _NAMES.items() if theirs in logs}
        if self._stage is not None:
            self._stage.log(state.global_step, **found, **self._speed(logs))
        if self._advance is not None:
            self._advance(1, f"loss {logs['loss']:.3f}")
        if not math.isfinite(logs["loss"]):
            raise UserError(
                f"sft: the loss is {logs['loss']} at step {state.global_step}; try a smaller sft.learning_rate, or "
                "model.dtype=float32"
            )

    def _speed(self, logs: dict[str, float]) -> dict[str, float]:
        """Return how long the step took and, from the second step of a process on, its tokens in a second of it."""
        now, tokens = time.monotonic(), logs.get("num_tokens", 0.0)
        seconds, before = now - self._last[0], self._last[1]
        self._last = (now, tokens)
        return {"seconds": seconds} | ({} if before is None else {"tokens_per_second": (tokens - before) / seconds})

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock of the first step; the later ones begin where one ended."""
        if self._last[0] == 0.0:
            self._last = (time.monotonic(), None if state.global_step else 0.0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save and stop after the step in which SIGTERM came."""
        if any_rank(preemption.requested()):
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Seal the checkpoint that has just been written, by all processes."""
        barrier()
        if self._stage is not None:
            seal(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
