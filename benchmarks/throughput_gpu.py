"""The same comparisons on a GPU with 7B shapes: SFT, rollouts, a PPO step of four roles, DPO; each beside TRL's arm.

Random weights of Mistral's shape, in bfloat16, are written to a folder once (15 GB); every arm loads them from there,
in 4 bits where it says NF4. What every arm reports: its rate, the most memory it held, and what it reaches of the
matrix products that the card does per second (training), or of its bandwidth (decoding), both measured in this run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import throughput_dpo
import throughput_rl
import throughput_sft
import torch
from datasets import Dataset
from throughput_limit import decoding_bytes, peak_bandwidth, peak_flops, training_flops
from throughput_rollouts import generate_arm, our_arm
from throughput_setting import SHAPES, Arm, Done, Setting, alternate, build, compared, endless, prompts, tokenizer
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer, RLOOConfig, RLOOTrainer

from trlhf.config import HardwareConfig, LoraConfig, ModelConfig, RlConfig
from trlhf.logprobs import pad_sequences, response_hidden
from trlhf.models import encode_prompt, load_causal_lm, lora_config
from trlhf.rl.critic import Critic
from trlhf.rl.dpo import DpoLearner
from trlhf.rl.experience import Group
from trlhf.rl.ppo import PpoLearner
from trlhf.roles import Role, SharedBase
from trlhf.rollout import Sampling, sample_responses
from trlhf.types import Rollout

LENGTH = 2048  # tokens of a packed row
BATCHES = (64, 128, 256, 512)  # responses decoded together
WAYS = ("LoRA", "QLoRA", "full")
MARKS = {"LoRA": 0.5, "rollouts at 256": 0.4}  # of the limit
GIB = {"PPO, NF4": 24, "PPO, LoRA": 48}  # most memory


@dataclass(frozen=True)
class Limits:
    """What the card does: FLOPs of matrix products, and bytes read, a second."""

    flops: float
    bandwidth: float


def model_config(setting: Setting, way: str) -> ModelConfig:
    """Return how a model is loaded and what of it learns."""
    lora = LoraConfig(enabled=way != "full")
    quantization = "nf4" if way in ("QLoRA", "NF4") else "none"
    attention = "auto" if setting.device == "cuda" else "sdpa"
    return ModelConfig(
        name=base_folder(setting), dtype="bfloat16", quantization=quantization, attention=attention,
        max_length=setting.size(LENGTH, LENGTH, 256), lora=lora, gradient_checkpointing=True,
    )  # fmt: skip


def base_folder(setting: Setting) -> str:
    """Return the folder of the random base, after writing it where it is not there yet."""
    folder = setting.folder.resolve() / f"base-{setting.model}-bfloat16"
    if not (folder / "tokenizer_config.json").exists():
        build(setting, dtype=torch.bfloat16).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return str(folder)


def load(setting: Setting, config: ModelConfig) -> Any:
    """Load the base as our stages would: float32 where every weight learns, 4 bits where it is quantised."""
    loaded = config if config.lora.enabled else replace(config, dtype="float32")
    model = load_causal_lm(config.name, loaded, setting.device, quantized=config.quantization != "none")
    return model


def measure_gpu(setting: Setting, known: Collection[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure cell by cell what is not known yet."""
    limits = Limits(peak_flops(setting, torch.bfloat16), peak_bandwidth(setting))
    cells: dict[str, Callable[[], dict[str, Any]]] = {f"sft, {way}": partial(sft, setting, way, limits) for way in WAYS}
    for batch in BATCHES if not setting.quick else BATCHES[:1]:
        cells[f"rollouts at {batch}"] = partial(rollouts, setting, batch, limits)
    cells |= {f"PPO, {way}": partial(ppo, setting, way) for way in ("LoRA", "NF4")}
    cells["dpo, LoRA"] = partial(dpo, setting, limits)
    for name, measure in cells.items():
        if f"{name}, {setting.model}" not in known:
            yield name, measure()


def with_limits(name: str, cell: dict[str, Any], reached: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
    """Add to every arm what it reaches of the limit, and to the cell the mark that ours should reach of it."""
    for arm in cell["arms"].values():
        arm["of_limit"] = round(reached(arm), 3)
    return cell | ({"limit_mark": MARKS[name]} if name in MARKS else {})


def sft(setting: Setting, way: str, limits: Limits) -> dict[str, Any]:
    """Measure packed SFT against TRL's packed SFT: same rows, same adapters, same rows in a pass."""
    config, count = model_config(setting, way), setting.size(640, 640, 4)
    rows = throughput_sft.demonstrations(count, tokenizer())
    ours = throughput_sft.our_config(setting, setting.folder.resolve())
    passes = {"batch_size": setting.size(64, 64, 4), "microbatch_size": setting.size(32, 32, 4)}
    ours = replace(
        ours, model=config, sft=replace(ours.sft, packing=True, **passes),
        hardware=HardwareConfig(device="cuda" if setting.device == "cuda" else "cpu"),
    )  # fmt: skip
    per_row = max(1.0, config.max_length * count / sum(len(row.input_ids) for row in rows))
    pass_rows = max(1, round(passes["microbatch_size"] / per_row))
    options = {"packing": True, "packing_strategy": "bfd", "bf16": True, "per_device_train_batch_size": pass_rows}
    options["gradient_accumulation_steps"] = max(1, round(passes["batch_size"] / per_row / pass_rows))
    options["max_length"] = config.max_length
    peft = lora_config(config) if config.lora.enabled else None
    arms = [
        throughput_sft.our_arm(rows, setting, lambda: load(setting, config), ours),
        throughput_sft.trl_arm("TRL", rows, setting, lambda: load(setting, config), peft, **options),
    ]
    shape, per_weight = SHAPES[setting.model], 6 if way == "full" else 4
    mean = sum(len(row.input_ids) for row in rows) / count
    cell = compared("real tokens/s", alternate(arms, setting), {"TRL": 1.0})

    def reached(arm: dict[str, Any]) -> float:
        return training_flops(shape, arm["per_second"], mean, per_weight) / limits.flops

    return with_limits(way, cell, reached)


def rollouts(setting: Setting, batch: int, limits: Limits) -> dict[str, Any]:
    """Measure sampling of responses that never end by themselves against ``generate``."""
    ids, samples, limit = tokenizer(), 8, setting.size(200, 200, 6)
    model = endless(load(setting, replace(model_config(setting, "LoRA"), gradient_checkpointing=False)))
    asked = prompts(batch // samples, ids)
    arms = [
        generate_arm(model, ids, asked, batch=batch, limit=limit),
        our_arm(model, ids, asked, batch=batch, limit=limit),
    ]
    cell = compared("tokens/s", alternate(arms, setting), {"generate": 1.3})
    prompt = sum(len(encode_prompt(ids, one.messages)) for one in asked) / len(asked)
    step = decoding_bytes(SHAPES[setting.model], batch, limit / 2 + prompt / samples, 2) / limits.bandwidth
    return with_limits(f"rollouts at {batch}", cell, lambda arm: step * arm["per_second"] / batch)


def rl_config(setting: Setting) -> RlConfig:
    """Return the sizes of an RL step."""
    return RlConfig(
        prompts_per_step=setting.size(16, 16, 2), samples_per_prompt=setting.size(8, 8, 2),
        max_new_tokens=setting.size(200, 200, 6), epochs=setting.size(2, 2, 1), minibatch_size=setting.size(64, 64, 4),
        microbatch_size=setting.size(16, 16, 2), learning_rate=throughput_rl.RATE, kl_coef=0.05, kl_in="reward",
        advantage="gae",
    )  # fmt: skip


def ppo(setting: Setting, way: str) -> dict[str, Any]:
    """Measure a step of rollouts, scores and updates with four roles on one base; TRL has no PPO: RLOO, two roles."""
    config, rl, ids = model_config(setting, way), rl_config(setting), tokenizer()
    asked = prompts(rl.prompts_per_step, ids)

    def ours() -> Callable[[], Done]:
        base = SharedBase(load(setting, config), config)
        policy, value = base.add("policy", 0), base.add("value", 0)
        critic = Critic(value)
        learner = PpoLearner(policy, base.role(None), critic, rl, int(ids.pad_token_id))
        encoded = [tuple(encode_prompt(ids, prompt.messages)) for prompt in asked]
        judge, head = base.add("reward", 0), torch.randn(SHAPES[setting.model].hidden, device=setting.device)

        def work() -> Done:
            sampling = Sampling.of(rl, rl.samples_per_prompt)
            with policy.acting() as model:
                drawn = sample_responses(model, ids, asked, sampling, torch.Generator().manual_seed(0))
            groups = [
                Group(prompt, tokens, tuple(rows), scored(judge, head, tokens, rows, ids), (False,) * len(rows))
                for prompt, tokens, rows in zip(asked, encoded, drawn, strict=True)
            ]
            metrics = learner.update(groups, [], random.Random(0), 1.0)
            return Done(len(asked) * rl.samples_per_prompt, {"response_tokens": metrics["response_tokens"]})

        return work

    arms = [Arm("trlhf", ours), Arm("TRL RLOO", lambda: trl_rloo(setting, config, rl, asked))]
    cell = compared("samples/s", alternate(arms, setting), {})
    return cell | {"gib_mark": GIB[f"PPO, {way}"]}


@torch.no_grad()
def scored(
    judge: Role, head: torch.Tensor, prompt: Sequence[int], rollouts: Sequence[Rollout], ids: Any
) -> tuple[float, ...]:
    """Return what a reward adapter with a linear head says of the last token of each response."""
    batch = pad_sequences([prompt] * len(rollouts), [row.token_ids for row in rollouts], int(ids.pad_token_id))
    batch = batch.to(judge.device)
    with judge.acting() as model:
        hidden = response_hidden(model.base_model, batch).float()
    last = batch.response_mask.sum(1) - 1
    return tuple((hidden[torch.arange(len(last), device=last.device), last] @ head).sigmoid().tolist())


def trl_rloo(setting: Setting, config: ModelConfig, rl: RlConfig, asked: Sequence[Any]) -> Callable[[], Done]:
    """Return TRL's step of the same size: policy and reference on one base, the score a function of the text."""
    count = len(asked) * rl.samples_per_prompt
    arguments = RLOOConfig(
        per_device_train_batch_size=rl.microbatch_size,
        gradient_accumulation_steps=rl.minibatch_size // rl.microbatch_size, generation_batch_size=count,
        num_generations=rl.samples_per_prompt, num_iterations=rl.epochs, max_completion_length=rl.max_new_tokens,
        max_steps=rl.epochs * count // rl.minibatch_size, beta=rl.kl_coef, temperature=1.0,
        **trl_common(setting),
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": [dict(message) for message in prompt.messages]} for prompt in asked])

    def reward(completions: Sequence[Any], **_: Any) -> list[float]:
        return [throughput_rl.reward_of(turns[0]["content"]) for turns in completions]

    clock = throughput_sft.Clock()
    trainer = RLOOTrainer(
        model=load(setting, config), reward_funcs=reward, args=arguments, train_dataset=rows,
        processing_class=tokenizer(), peft_config=lora_config(config), callbacks=[clock],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)

    def work() -> Done:
        trainer.train()
        return Done(count, {}, clock.took)

    return work


def trl_common(setting: Setting) -> dict[str, Any]:
    """Return TRL's arguments that say where and how to compute; activations are recomputed in both arms."""
    return throughput_rl.trl_common(setting) | {"bf16": True, "activation_checkpointing": True}


def dpo(setting: Setting, limits: Limits) -> dict[str, Any]:
    """Measure passes over the same pairs, adapters on a bfloat16 base, the reference being the base."""
    config, ids = model_config(setting, "LoRA"), tokenizer()
    rows = throughput_dpo.texts(setting.size(128, 128, 4), ids)
    pairs = [throughput_dpo.pair_of(row, ids) for row in rows]
    rl = replace(
        rl_config(setting), algorithm="dpo", advantage="leave_one_out", pairs_per_step=setting.size(64, 64, 2),
        nll_coef=0.0,
    )  # fmt: skip

    def ours() -> Callable[[], Done]:
        base = SharedBase(load(setting, config), config)
        learner = DpoLearner(base.add("policy", 0), base.role(None), rl, int(ids.pad_token_id))
        groups = throughput_dpo.groups_of(pairs)

        def work() -> Done:
            learner.update(groups, [], random.Random(0), 1.0)
            return Done(len(pairs) * rl.epochs)

        return work

    def theirs() -> Callable[[], Done]:
        size = max(1, rl.microbatch_size // 2)
        clock = throughput_sft.Clock()
        arguments = DPOConfig(
            per_device_train_batch_size=size, gradient_accumulation_steps=max(1, rl.pairs_per_step // size),
            num_train_epochs=rl.epochs, beta=rl.beta, max_length=None, lr_scheduler_type="constant",
            **trl_common(setting),
        )  # fmt: skip
        trainer = DPOTrainer(
            model=load(setting, config), args=arguments, train_dataset=Dataset.from_list(rows),
            processing_class=ids, peft_config=lora_config(config), callbacks=[clock],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)

        def work() -> Done:
            trainer.train()
            return Done(len(rows) * rl.epochs, {}, clock.took)

        return work

    cell = compared("pairs/s", alternate([Arm("trlhf", ours), Arm("TRL DPO", theirs)], setting), {"TRL DPO": 1.3})
    shape = SHAPES[setting.model]
    tokens = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs) / len(pairs)

    def reached(arm: dict[str, Any]) -> float:
        return training_flops(shape, arm["per_second"] * tokens, tokens / 2, 4) / limits.flops

    return with_limits("dpo", cell, reached)
