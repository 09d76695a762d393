"""What autograd keeps of a Mistral layer until the backward pass, tensor by tensor. No torch here.

Derived from transformers' Mistral, peft's LoRA layers and bitsandbytes' 4-bit layers, and compared with torch's
saved-tensor hooks in the tests. Names: h hidden, q queries, k keys, i intermediate, T positions of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trlhf.config import ModelConfig
from trlhf.estimate.shape import BYTES, Shape, adapted


@dataclass(frozen=True)
class Forward:
    """How a forward pass computes that a backward pass will follow.

    Attributes:
        full: every weight learns; else adapters on a frozen base.
        weight: bytes of a value of the weights and of the residual stream.
        autocast: linear maps compute in bfloat16 whatever the weights are (SFT with ``model.dtype=bfloat16``).
        adapters: the linear maps of a layer that have one.
        rank: of the adapters.
        attention: how it is computed; ``flash`` stands for flash-attention's own package.
        mask: ``none``; ``layer``: true or false, made into numbers once a layer; ``shared``: numbers, made once.
        checkpointed: layers keep their inputs only.
    """

    full: bool
    weight: int
    autocast: bool = False
    adapters: tuple[str, ...] = ()
    rank: int = 0
    attention: Literal["sdpa", "eager", "flash"] = "sdpa"
    mask: Literal["none", "layer", "shared"] = "none"
    checkpointed: bool = False

    @property
    def computed(self) -> int:
        """Bytes of a value that a linear map returns."""
        return 2 if self.autocast else self.weight

    def copy(self, maps: tuple[str, ...], size: int) -> float:
        """Return the bytes of the inputs that are kept for linear maps that share one input of a given size.

        A weight that learns needs its input. Adapters are float32: from a bfloat16 input each makes a copy of its own,
        which autocast makes bfloat16 again.
        """
        if self.full:
            return float(size * (2 * len(maps) if self.autocast and self.weight == 4 else self.computed))
        count = len([name for name in maps if name in self.adapters])
        if not count or self.weight == 4:
            return float(size * 4 * min(1, count))
        return float(size * (2 if self.autocast else 4) * count)


def forward_of(model: ModelConfig, *, training: bool, masked: bool, shared_mask: bool = False) -> Forward:
    """Return how a stage's forward pass computes.

    Args:
        model: of the run.
        training: SFT through TRL, with autocast in bfloat16; else our own loops, without.
        masked: rows are padded, packed or shared, so that attention gets a mask.
        shared_mask: the mask is one of ours, in numbers.
    """
    full = not model.lora.enabled
    attention: Literal["sdpa", "eager", "flash"] = "eager" if model.attention == "eager" else "sdpa"
    attention = "flash" if model.attention.startswith("flash") else attention
    mask: Literal["none", "layer", "shared"] = "shared" if shared_mask else "layer"
    return Forward(
        full=full,
        weight=4 if full else BYTES[model.dtype],
        autocast=training and model.dtype == "bfloat16",
        adapters=() if full else tuple(adapted(model.lora.target_modules)),
        rank=model.lora.r,
        attention=attention,
        mask=mask if masked and attention == "sdpa" else "none",
        checkpointed=model.gradient_checkpointing,
    )


@dataclass(frozen=True)
class Rows:
    """Tokens in ``rows`` rows of ``width`` positions, padding included."""

    rows: int
    width: int

    @property
    def tokens(self) -> int:
        """Return how many go through the layers."""
        return self.rows * self.width


@dataclass(frozen=True)
class Packed:
    """Responses behind prompts that they share, without padding, as `trlhf.packed_attention` lays them out.

    Attributes:
        prompts: how many.
        prompt: tokens of each.
        responses: how many, of all prompts together.
        response: tokens of each, the last of which is predicted and not read.
    """

    prompts: int
    prompt: int
    responses: int
    response: int

    @property
    def read(self) -> int:
        """Return how many tokens of responses go through the layers."""
        return self.responses * (self.response - 1)

    @property
    def tokens(self) -> int:
        """Return how many tokens go through the layers."""
        return self.prompts * self.prompt + self.read


Layout = Rows | Packed


def attention_bytes(shape: Shape, how: Forward, layout: Layout) -> float:
    """Return what the attention of one layer keeps: q, k, v, the output, and what its kernel adds."""
    if isinstance(layout, Packed):
        return _packed_attention(shape, how, layout)
    q, k, value, tokens = shape.queries, shape.keys, how.computed, layout.tokens
    if how.attention == "eager":  # k and v for every head, probabilities in float32 and in the type of v
        output = 1 if how.full or how.weight == 4 else 0  # else the copy that o_proj's adapter makes is kept instead
        return tokens * (q * (3.0 + output) * value + shape.heads * layout.width * (4 if value == 4 else 6))
    repeated = how.mask != "none" and how.attention == "sdpa"  # masked, sdpa wants k and v once for every query head
    kept = (2 * q + 2 * (q if repeated else k)) * value + 4.0 * shape.heads  # the last: log-sum-exp
    return tokens * (kept + (layout.width * value if how.mask == "layer" else 0))


def _packed_attention(shape: Shape, how: Forward, layout: Packed) -> float:
    """Prompts over themselves; responses over their prompt, laid out once more for each, and over themselves."""
    q, value, own = shape.queries, how.computed, layout.response - 1
    behind = layout.prompt + own
    prompts = layout.prompts * layout.prompt * (4.0 * q * value + 4 * shape.heads)
    responses = layout.read * (2.0 * q * value + 4 * shape.heads) + layout.responses * behind * 2.0 * q * value
    mask = float(layout.read * behind * value)
    gathered = layout.tokens * how.copy(("o_proj",), q) if how.full or how.weight == 4 else 0.0
    return prompts + (responses + mask if own else 0.0) + gathered


def layer_bytes(shape: Shape, how: Forward, layout: Layout) -> float:
    """Return what one layer keeps, without checkpointing."""
    h, q, i, value = shape.hidden, shape.queries, shape.intermediate, how.computed
    norms = 2 * (4 * h + 4 + (how.weight * h if how.full else 0))  # float32 input, 1/rms; what the weight multiplies
    inputs = how.copy(("q_proj", "k_proj", "v_proj"), h) + how.copy(("gate_proj", "up_proj"), h)
    out = 0.0 if how.full or how.weight == 4 else how.copy(("o_proj",), q)  # else it is the attention's own output
    gates = 3 * i * value + how.copy(("down_proj",), i)  # gate, silu(gate), up; and their product where it is needed
    low_rank = len(how.adapters) * how.rank * (2 if how.autocast else 4)
    return layout.tokens * (norms + inputs + out + gates + low_rank) + attention_bytes(shape, how, layout)


def graph_bytes(shape: Shape, how: Forward, layout: Layout) -> float:
    """Return what the graph of all layers and the last norm keeps."""
    last = 4 * shape.hidden + 4 + (how.weight * shape.hidden if how.full else 0) + (8 if how.full else 0)
    if how.checkpointed:
        layers = float(layout.tokens * shape.layers * shape.hidden * how.weight)
    else:
        layers = shape.layers * layer_bytes(shape, how, layout)
        # No gradient goes below the first layer's adapters.
        layers -= 0.0 if how.full else layout.tokens * (4 * shape.hidden + 4)
    return layers + layout.tokens * last + (0.0 if how.checkpointed else beside_bytes(shape, how, layout))


def beside_bytes(shape: Shape, how: Forward, layout: Layout) -> float:
    """Return what all layers share: rotations, a mask in numbers, bfloat16 copies of weights."""
    mask = layout.width * how.weight if isinstance(layout, Rows) and how.mask == "shared" else 0
    return layout.tokens * float(2 * shape.head_size * how.weight + mask) + cast_bytes(shape, how)


def activation_bytes(shape: Shape, how: Forward, layout: Layout) -> float:
    """Return what is held at most when the backward pass begins; with checkpointing, when it recomputes a layer."""
    graph = graph_bytes(shape, how, layout)
    if not how.checkpointed:
        return graph
    return graph + beside_bytes(shape, how, layout) + layer_bytes(shape, how, layout)


def cast_bytes(shape: Shape, how: Forward) -> float:
    """Return the bfloat16 copies of weights that autocast keeps while a graph needs them."""
    if not how.autocast:
        return 0.0
    if how.full:
        return 2.0 * shape.linear_parameters
    sizes = [shape.linear_sizes[name] for name in how.adapters]
    return 2.0 * shape.layers * how.rank * sum(inputs + outputs for inputs, outputs in sizes)


def gradient_temporaries(shape: Shape, how: Forward, tokens: float) -> float:
    """Return what the backward pass of one layer holds at a time beside what was kept: gradients of its widest part."""
    return tokens * (3.0 * shape.intermediate + 2.0 * shape.hidden) * how.computed


def forward_temporaries(shape: Shape, value: int, tokens: float) -> float:
    """Return what a pass without gradients holds at its widest, the feed-forward part of a layer.

    Embeddings, the residual stream and its norm; silu(gate), up and their product; the rotations of all layers.
    """
    return tokens * float(3 * shape.intermediate + 3 * shape.hidden + 2 * shape.head_size) * value
