"""How a figure was measured, and in what two measurements differ. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Protocol:
    """How a figure was measured; None where its source does not say.

    Attributes:
        harness: whose code.
        metric: what is counted.
        shots: worked examples before each question; -1: they differ between the tasks of a mean.
        votes: responses whose majority answers; 1: one response.
        chat_template: whether questions are put through the model's chat template.
        temperature: of the responses; 0: greedy.
        tasks: whose mean it is; () for one task.
        note: anything else that a reader must know.
    """

    harness: str | None = None
    metric: str | None = None
    shots: int | None = None
    votes: int | None = None
    chat_template: bool | None = None
    temperature: float | None = 0.0
    tasks: tuple[str, ...] = ()
    note: str = ""

    def plain(self) -> dict[str, Any]:
        """Return what is known as plain values."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value not in (None, (), "")}

    @classmethod
    def joint(cls, parts: Sequence[Protocol], tasks: Sequence[str]) -> Protocol:
        """Return the protocol of a mean over tasks."""
        shots, metrics = {part.shots for part in parts}, list(dict.fromkeys(part.metric for part in parts))
        return cls(
            harness=parts[0].harness,
            metric=f"mean of {'/'.join(map(str, metrics))}",
            shots=shots.pop() if len(shots) == 1 else -1,
            votes=1,
            chat_template=parts[0].chat_template,
            tasks=tuple(tasks),
        )

    def differences(self, here: Protocol) -> str:
        """Say in what this figure was measured otherwise than one here: "8-shot, here zero-shot; …"."""
        return "; ".join(self._differences(here)) or "none that its source states"

    def _differences(self, here: Protocol) -> Iterator[str]:
        if self.tasks and set(self.tasks) != set(here.tasks):
            yield f"mean of {len(self.tasks)} tasks ({', '.join(self.tasks)}), here of {len(here.tasks) or 1}"
        if self.shots is None:
            yield f"shots not stated, here {_shots(here.shots)}"
        elif self.shots != here.shots:
            yield f"{_shots(self.shots)}, here {_shots(here.shots)}"
        own, other = _decoding(self), _decoding(here)
        if own is not None and own != other:
            yield f"{own}, here {other}"
        if self.metric is not None and self.metric != here.metric:
            yield f"{self.metric}, here {here.metric}"
        if self.chat_template is not None and self.chat_template != here.chat_template:
            yield "with chat template, here without" if self.chat_template else "no chat template, here with"
        if self.harness is not None and self.harness != here.harness:
            yield f"{self.harness}, here {here.harness}"
        if self.note or here.note:
            yield f"{self.note or 'not stated'}, here {here.note}" if here.note else self.note


def _shots(count: int | None) -> str:
    return {0: "zero-shot", -1: "shots by task", None: "?"}.get(count, f"{count}-shot")


def _decoding(protocol: Protocol) -> str | None:
    if protocol.votes is None:
        return None
    if protocol.votes > 1:
        return f"maj@{protocol.votes}"
    return f"one answer at temperature {protocol.temperature:g}" if protocol.temperature else "one greedy answer"
