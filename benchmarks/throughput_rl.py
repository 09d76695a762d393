"""RL: samples a second through a whole step (rollout, score, update) against TRL's RLOO and GRPO of the same size."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from throughput_setting import Arm, Done, Setting, alternate, build, compared, prompts, tokenizer
from throughput_sft import Clock
from transformers import PreTrainedTokenizerBase, PrinterCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trlhf.config import RlConfig
from trlhf.console import quiet_libraries
from trlhf.models import encode_prompt
from trlhf.rl.experience import Group
from trlhf.rl.ppo import PpoLearner
from trlhf.roles import Role
from trlhf.rollout import Sampling, sample_responses
from trlhf.types import Prompt

EPOCHS, MICROBATCH, LIMIT = 2, 16, 200
RATE = 1e-5
LOG_RATIO = 1e-4  # most that a first ratio may differ from 1


def reward_of(text: str) -> float:
    """Return the share of vowels: cheap, and hardly ever the same for two samples, so that every group teaches."""
    return sum(letter in "aeiou" for letter in text) / max(1, len(text))


def trl_common(setting: Setting) -> dict[str, Any]:
    """Return TRL's arguments that say where and how to compute, the same for every trainer: nothing is recomputed."""
    return {
        "output_dir": str(setting.folder / "trl"),
        "use_cpu": setting.device == "cpu",
        "dataloader_pin_memory": setting.device != "cpu",
        "activation_checkpointing": False,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": RATE,
        "logging_steps": 1,
    }


def measure_rl(setting: Setting) -> dict[str, Any]:
    """Measure one step of the same size by every trainer: as many samples, minibatches and passes."""
    quiet_libraries()
    ids = tokenizer()
    asked = prompts(setting.size(16, 4, 2), ids)
    samples = setting.size(8, 8, 2)
    minibatch = setting.size(64, 16, 2)
    microbatch = min(MICROBATCH, minibatch)
    rl = RlConfig(
        prompts_per_step=len(asked),
        samples_per_prompt=samples,
        max_new_tokens=setting.size(LIMIT, LIMIT // 2, 16),
        epochs=setting.size(EPOCHS, 1, EPOCHS),
        minibatch_size=minibatch,
        microbatch_size=microbatch,
        learning_rate=RATE,
        kl_coef=0.05,
        kl_in="reward",
    )
    arms = [Arm("trlhf", lambda: our_step(setting, ids, asked, rl))]
    for name, trainer, arguments in (("TRL RLOO", RLOOTrainer, RLOOConfig), ("TRL GRPO", GRPOTrainer, GRPOConfig)):
        arms.append(Arm(name, lambda t=trainer, a=arguments: trl_step(t, a, setting, ids, asked, rl)))
    measured = alternate(arms, setting)
    steps = {name: arm["optimizer_steps"] for name, arm in measured.items()}
    assert len(set(steps.values())) == 1, steps
    assert abs(measured["trlhf"]["first_ratio"] - 1) < LOG_RATIO, measured["trlhf"]
    return compared("samples/s", measured, {"TRL RLOO": 2.0})


def our_step(
    setting: Setting, ids: PreTrainedTokenizerBase, asked: Sequence[Prompt], rl: RlConfig
) -> Callable[[], Done]:
    """Return one step of the rl stage with the leave-one-out baseline, its rewards given."""
    policy = Role(build(setting, ends=True))
    learner = PpoLearner(policy, Role(copy.deepcopy(policy.model)).frozen(), None, rl, int(ids.pad_token_id))
    encoded = [tuple(encode_prompt(ids, prompt.messages)) for prompt in asked]

    def work() -> Done:
        sampling = Sampling.of(rl, rl.samples_per_prompt)
        drawn = sample_responses(policy.model, ids, asked, sampling, torch.Generator().manual_seed(0))
        groups = [
            Group(prompt, tokens, tuple(rows), tuple(reward_of(row.text) for row in rows), (True,) * len(rows))
            for prompt, tokens, rows in zip(asked, encoded, drawn, strict=True)
        ]
        metrics = learner.update(groups, [], random.Random(0), 1.0)
        count = len(asked) * rl.samples_per_prompt
        return Done(
            count,
            {
                "optimizer_steps": rl.epochs * count // rl.minibatch_size,
                "first_ratio": metrics["first_ratio"],
                "sampler_mismatch": metrics["sampler_mismatch"],
                "response_tokens": metrics["response_tokens"],
            },
        )

    return work


def trl_step(
    kind: Any, arguments: Any, setting: Setting, ids: PreTrainedTokenizerBase, asked: Sequence[Prompt], rl: RlConfig
) -> Callable[[], Done]:
    """Return one step of TRL's RLOO or GRPO of the same size: a batch of samples, then passes of minibatches."""
    count = len(asked) * rl.samples_per_prompt
    steps = rl.epochs * count // rl.minibatch_size
    config = arguments(
        per_device_train_batch_size=rl.microbatch_size,
        gradient_accumulation_steps=rl.minibatch_size // rl.microbatch_size,
        generation_batch_size=count,
        num_generations=rl.samples_per_prompt,
        num_iterations=rl.epochs,
        max_completion_length=rl.max_new_tokens,
        max_steps=steps,
        beta=rl.kl_coef,
        temperature=1.0,
        **trl_common(setting),
    )

    def reward(completions: Sequence[Any], **_: Any) -> list[float]:
        return [reward_of(turns[0]["content"]) for turns in completions]

    clock = Clock()
    rows = Dataset.from_list([{"prompt": [dict(message) for message in prompt.messages]} for prompt in asked])
    model = build(setting, ends=True)
    folder = setting.folder.resolve() / f"base-{setting.model}"
    build(setting).save_pretrained(folder)
    model.config._name_or_path = str(folder)  # where TRL loads its reference from
    trainer = kind(
        model=model, reward_funcs=reward, args=config, train_dataset=rows, processing_class=ids, callbacks=[clock],
    )  # fmt: skip
    trainer.ref_model.lm_head.bias = model.lm_head.bias

    trainer.remove_callback(PrinterCallback)

    def work() -> Done:
        trainer.train()
        seen = [entry for entry in trainer.state.log_history if "completions/mean_length" in entry]
        facts = {"optimizer_steps": trainer.state.global_step, "response_tokens": seen[0]["completions/mean_length"]}
        return Done(count, facts, clock.took)

    return work
