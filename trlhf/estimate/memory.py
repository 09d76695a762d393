"""The memory of each stage, phase by phase and part by part; a stage's peak is that of its largest phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trlhf.config import Config
from trlhf.estimate.lengths import Lengths
from trlhf.estimate.shape import BYTES, Shape

PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "KV cache", "other")


@dataclass(frozen=True)
class Job:
    """Everything that the memory of a run depends on.

    Attributes:
        config: of the run.
        shape: of the model.
        lengths: of its sequences.
        device: ``cpu`` or ``cuda``.
        processes: how many share the work, each on a card of its own.
    """

    config: Config
    shape: Shape
    lengths: Lengths
    device: str = "cpu"
    processes: int = 1

    @property
    def full(self) -> bool:
        """Whether every weight learns."""
        return not self.config.model.lora.enabled

    @property
    def loaded(self) -> str:
        """Type of the weights of a role that learns or is compared with one that does."""
        return "float32" if self.full else self.config.model.dtype

    @property
    def value(self) -> int:
        """Bytes of a value of that type."""
        return BYTES[self.loaded]

    @property
    def whole(self) -> float:
        """Bytes of all weights in that type."""
        return float(self.shape.parameters * self.value)

    @property
    def base(self) -> float:
        """Bytes of the base that a stage works with: whole, or as adapters stand on it."""
        return self.whole if self.full else self.shape.base_bytes(self.config.model)

    @property
    def adapter(self) -> float:
        """Bytes of one set of adapters, always float32."""
        return 0.0 if self.full else float(self.shape.adapter_parameters(self.config.model) * 4)

    @property
    def learned(self) -> float:
        """Bytes of what one role learns with, in float32."""
        return float(self.shape.parameters * 4) if self.full else self.adapter

    @property
    def largest(self) -> float:
        """Bytes of the largest matrix of what learns, in float32."""
        shape = self.shape
        if self.full:
            return 4.0 * shape.hidden * max(shape.vocabulary, shape.intermediate)
        return 4.0 * self.config.model.lora.r * max(shape.hidden, shape.intermediate)


@dataclass(frozen=True)
class Phase:
    """What is held at once in one part of a stage, in bytes by part."""

    stage: str
    name: str
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Return the sum of the parts."""
        return float(sum(self.parts.values()))


def peak(phases: Sequence[Phase], stage: str) -> Phase:
    """Return the largest phase of a stage."""
    return max((phase for phase in phases if phase.stage == stage), key=lambda phase: phase.total)


def peaks(phases: Sequence[Phase]) -> dict[str, Phase]:
    """Return the largest phase of every stage."""
    return {stage: peak(phases, stage) for stage in dict.fromkeys(phase.stage for phase in phases)}
