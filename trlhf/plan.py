"""``dry_run=true``: what a run would do, and what memory it would need. No torch here."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from trlhf.checks import labels_come_with
from trlhf.config import Config, ModelConfig
from trlhf.console import CONSOLE, print_table
from trlhf.evaluation.suites import chosen_tasks
from trlhf.run import planned
from trlhf.schema import show

log = logging.getLogger("trlhf")
GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}
NF4_BYTES = 4.127 / 8  # a weight with its double-quantised scales: https://arxiv.org/abs/2305.14314, sec. 3
MICRO_CONFIG = Path(__file__).parent / "micro" / "base" / "config.json"


@dataclass(frozen=True)
class Shape:
    """The sizes of a Mistral-like model that memory depends on."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool

    @property
    def parameters(self) -> int:
        """Number of weights: embeddings, attention, gated feed-forward, norms, head."""
        head = self.hidden // self.heads
        attention = self.hidden * self.hidden * 2 + 2 * self.hidden * self.kv_heads * head
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.layers * layer + self.hidden

    def base_bytes(self, config: ModelConfig) -> float:
        """Bytes of the weights that ``config`` loads; only linear layers are quantised, embeddings and head are not."""
        size = BYTES[config.dtype]
        if config.quantization == "none":
            return float(self.parameters * size)
        outside = self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden * (1 + 2 * self.layers)
        return outside * size + (self.parameters - outside) * NF4_BYTES

    def adapter_parameters(self, config: ModelConfig) -> int:
        """Number of LoRA weights: r·(in + out) for each adapted layer."""
        kv = self.hidden // self.heads * self.kv_heads
        sizes = {
            "q_proj": (self.hidden, self.hidden), "k_proj": (self.hidden, kv), "v_proj": (self.hidden, kv),
            "o_proj": (self.hidden, self.hidden), "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate), "down_proj": (self.intermediate, self.hidden),
        }  # fmt: skip
        return self.layers * sum(config.lora.r * sum(sizes.get(name, (0, 0))) for name in config.lora.target_modules)


# https://huggingface.co/mistralai/Mistral-7B-v0.1/blob/main/config.json
MISTRAL_7B = Shape(4096, 32, 14336, 32, 8, 32000, tied=False)
KNOWN = {"mistralai/Mistral-7B-v0.1": MISTRAL_7B}


def shape_of(config: ModelConfig) -> Shape | None:
    """Return the model's sizes: of the embedded base, of a local folder, or of a hub model known by name; else None."""
    if config.name in KNOWN:
        return KNOWN[config.name]
    path = MICRO_CONFIG if config.name == "micro" else Path(config.name) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Shape(
            values["hidden_size"],
            values["num_hidden_layers"],
            values["intermediate_size"],
            values["num_attention_heads"],
            values.get("num_key_value_heads", values["num_attention_heads"]),
            values["vocab_size"],
            bool(values.get("tie_word_embeddings", False)),
        )
    except (OSError, ValueError, KeyError):
        return None


def memory_estimate(config: Config, shape: Shape) -> dict[str, dict[str, float]]:
    """Estimate the peak memory of each stage, by role, in bytes.

    Weights at ``model.dtype`` or quantised; trained weights with float32 gradients, AdamW's two moments and, beside
    bfloat16 weights or for adapters, the float32 weights that are updated. With adapters all roles of the rl stage
    share one base (`trlhf.roles`); in full fine-tuning each has its own. Activations of one microbatch at full length
    with one float32 copy of its logits, about 34·hidden bytes a token and layer at two bytes a value (Korthikanti et
    al. 2022, https://arxiv.org/abs/2205.05198, without the attention matrix), or 2·hidden where checkpointed, as SFT
    does on a GPU. An estimate, wrong by tens of percents.
    """
    model, rl = config.model, config.rl
    size = BYTES[model.dtype]
    weights, base = float(shape.parameters * size), shape.base_bytes(model)
    whole = float(shape.parameters * (12 + (4 if model.dtype == "bfloat16" else 0)))
    optimizer = float(shape.adapter_parameters(model) * 16) if model.lora.enabled else whole

    def activations(sequences: int, length: int, checkpointed: bool) -> float:
        tokens = sequences * length
        a_token = (2 if checkpointed else 17) * shape.hidden * size * shape.layers
        return float(tokens * a_token + tokens * shape.vocabulary * 4 * 2)

    kv = 2 * shape.layers * shape.kv_heads * (shape.hidden // shape.heads) * size
    length = model.max_length
    critic = rl.algorithm == "ppo" and rl.advantage == "gae"
    finetune = config.reward.finetune
    reward_trained = 0.0 if finetune == "frozen" else optimizer
    adapter = float(shape.adapter_parameters(model) * 4)
    own_reward = finetune != "frozen" or model.dtype != "float32"  # else the reference serves (trlhf.roles)
    if model.lora.enabled:
        roles = base + adapter * ((model.quantization != "none") + (finetune == "lora"))
    else:
        roles = weights * (2 + critic + own_reward)
    estimate = {
        "sft": {
            "weights": base,
            "gradients and optimizer": optimizer,
            "activations": activations(config.sft.microbatch_size, length, checkpointed=model.name != "micro"),
        },
        "reward": {
            "weights": base,
            "gradients and optimizer": reward_trained,
            "activations": activations(config.reward.microbatch_size, length, checkpointed=finetune == "frozen"),
        },
        "rl": {
            "weights": roles,  # policy, reference, reward model, value
            "gradients and optimizer": optimizer * (1 + critic),
            "activations": activations(rl.microbatch_size, length, checkpointed=False),
            "KV cache": float(max(rl.rollout_batch_size, rl.samples_per_prompt) * length * kv),
        },
        "eval": {"weights": weights, "KV cache": float(config.evaluation.batch_size * length * kv)},
    }
    return {name: estimate[name] for name in planned(config) if name in estimate}  # others load no model


def print_plan(config: Config) -> None:
    """Print what would be done and what memory it would take."""
    rl = config.rl
    CONSOLE.print(f"[bold]plan[/bold] (dry_run=true: nothing is started){_named(config)}")
    for line in (
        f"stages: {', '.join(planned(config) or (config.stage,))}; seed {config.seed}; "
        f"results in {config.run.dir or 'runs/<date>'}",
        f"model: {config.model.name}, {config.model.dtype}, "
        + ("NF4 base, " if config.model.quantization == "nf4" else "")
        + (f"LoRA r={config.model.lora.r}" if config.model.lora.enabled else "all weights trained")
        + f", context {config.model.max_length} tokens, template {config.template.name}",
        f"data: {config.data.name}; at most {config.data.sft_prompts or 'all'} demonstrations, "
        f"{config.data.pool_prompts or 'all'} pool prompts, {config.data.test_prompts or 'all'} test prompts",
        f"labels: {config.targeting.budget} at most, {_labels_of_the_reward_stage(config)}; "
        f"labeler {config.labeler.name}; labels by {config.targeting.acquisition}, update {config.targeting.update}",
        f"rl: {rl.algorithm}, {rl.rounds} rounds of {rl.steps_per_round} steps, "
        f"{rl.prompts_per_step} prompts x {rl.samples_per_prompt} samples a step",
        *_mixture(config),
        *_suites(config),
    ):
        CONSOLE.print("  " + line, highlight=False, markup=False)
    shape = shape_of(_loaded(config))
    if shape is None:
        CONSOLE.print(
            f"  memory: not estimated, the sizes of {_loaded(config).name} are not known here", highlight=False
        )
        return
    estimate = memory_estimate(config, shape)
    if not estimate:
        CONSOLE.print("  memory: no model is loaded", highlight=False)
        return
    roles = list(dict.fromkeys(role for parts in estimate.values() for role in parts))
    rows = [
        [name, *(f"{parts.get(role, 0) / GIB:.2f}" for role in roles), f"{sum(parts.values()) / GIB:.2f}"]
        for name, parts in estimate.items()
    ]
    print_table(
        f"Memory estimate in GiB, {shape.parameters / 1e9:.3f} billion parameters, longest possible sequences",
        ["stage", *roles, "sum"],
        rows,
    )
    CONSOLE.print(f"  too much? {_remedy(config)}", highlight=False)


def announce_memory(config: Config, free: float | None) -> None:
    """Say before anything is loaded what the run will need at most, and what to change where that is not there.

    Args:
        config: of the run.
        free: bytes that are free where it will run; None: not known.
    """
    shape = shape_of(_loaded(config))
    if shape is None:
        return
    needed = {name: sum(parts.values()) for name, parts in memory_estimate(config, shape).items()}
    stage = max(needed, key=lambda name: needed[name])
    log.info(
        "memory: at most about %.1f GiB (stage %s, longest possible sequences); dry_run=true shows what takes it",
        needed[stage] / GIB, stage,
    )  # fmt: skip
    if free is not None and needed[stage] > free:
        log.warning("memory: only %.1f GiB are free, so it may not fit; %s", free / GIB, _remedy(config))


def _suites(config: Config) -> list[str]:
    """Return a line on the suites, where there are some and they are asked."""
    chosen = chosen_tasks(config.evaluation.suites, config.evaluation.tasks)
    if not chosen or "eval" not in planned(config):
        return []
    named = ", ".join(f"{suite.name} ({', '.join(task.name for task in tasks)})" for suite, tasks in chosen)
    return [f"suites: {named}; for {config.evaluation.model or 'the base and every model of the run'}"]


def _loaded(config: Config) -> ModelConfig:
    """Return the model section, with the model's name that is really loaded."""
    return config.model if config.evaluation.model is None else replace(config.model, name=config.evaluation.model)


def _remedy(config: Config) -> str:
    """Return what to change when memory is short."""
    remedy = "lower the stage's microbatch_size, rl.rollout_batch_size, evaluation.batch_size or model.max_length"
    if not config.model.lora.enabled:
        return f"{remedy}; or model.lora.enabled=true"
    return remedy if config.model.quantization != "none" else f"{remedy}; or model.quantization=nf4"


def _mixture(config: Config) -> Iterator[str]:
    """Yield a line on the data sets of a mixture, and one on the filters."""
    sources = [
        f"{name} ({source.path}"
        + (f", at most {source.cap}" if source.cap else "")
        + (f", x {source.weight:g})" if source.weight != 1 else ")")
        for name, source in config.data.mixture.items()
    ]
    if sources:
        yield f"mixture: {', '.join(sources)}"
    filters = [f"{name}={show(value)}" for name, value in vars(config.data.filters).items() if value]
    if filters:
        yield f"filters: {', '.join(filters)}"


def _labels_of_the_reward_stage(config: Config) -> str:
    if not labels_come_with(config.data):
        return f"{config.reward.labels} of them for the reward stage"
    some = f" ({config.reward.max_labelled} at most)" if config.reward.max_labelled else ""
    return f"none of them for the reward stage, which takes those that come with the data{some}"


def _named(config: Config) -> str:
    return f" experiment {config.experiment}" if config.experiment else ""
