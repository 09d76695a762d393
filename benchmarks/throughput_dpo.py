"""DPO: pairs a second against TRL's DPOTrainer, with the reference precomputed and not; the losses are the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from throughput_rl import EPOCHS, MICROBATCH, RATE, trl_common
from throughput_setting import Arm, Done, Setting, alternate, build, compared, lengths, tokenizer, words
from throughput_sft import Clock
from transformers import PreTrainedTokenizerBase, PrinterCallback
from trl import DPOConfig, DPOTrainer

from trlhf.config import RlConfig
from trlhf.console import quiet_libraries
from trlhf.rl.dpo import DpoLearner, Pair
from trlhf.rl.experience import Group
from trlhf.roles import Role
from trlhf.types import Prompt, Rollout

PLAIN, PRECOMPUTED = "TRL DPO", "TRL DPO, reference precomputed"
TOLERANCE = 1e-4  # nats a pair, between the losses of one step


def texts(count: int, ids: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """Return prompts with two different responses, of GSM8K's lengths, as TRL reads them."""
    rng = random.Random(0)
    return [
        {
            "prompt": words(f"User: {i}", prompt, rng, ids) + "\nAI:",
            "chosen": words(" yes", response - 1, rng, ids),
            "rejected": words(" no", response - 1, rng, ids),
        }
        for i, (prompt, response) in enumerate(lengths(count))
    ]


def pair_of(row: dict[str, str], ids: PreTrainedTokenizerBase) -> Pair:
    """Return the tokens of a row, as TRL cuts them."""
    prompt = ids(row["prompt"])["input_ids"]
    whole = [ids(row["prompt"] + row[name] + str(ids.eos_token))["input_ids"] for name in ("chosen", "rejected")]
    assert all(tokens[: len(prompt)] == prompt for tokens in whole), row
    return Pair(tuple(prompt), *(tuple(tokens[len(prompt) :]) for tokens in whole), True)


def measure_dpo(setting: Setting) -> dict[str, Any]:
    """Measure passes over the same pairs.

    Raises:
        AssertionError: the losses of one step differ.
    """
    quiet_libraries()
    ids = tokenizer()
    count = setting.size(32, 8, 4)
    rows = texts(count, ids)
    pairs = [pair_of(row, ids) for row in rows]
    rl = RlConfig(
        algorithm="dpo", epochs=EPOCHS, pairs_per_step=setting.size(16, 8, 2),
        microbatch_size=MICROBATCH, learning_rate=RATE, nll_coef=0.0,
    )  # fmt: skip
    one, few = replace(rl, epochs=1), rl.pairs_per_step
    losses = [
        our_pairs(setting, ids, pairs[:few], one)().facts["loss"],
        trl_pairs(setting, ids, rows[:few], one, False)().facts["loss"],
    ]
    assert abs(losses[0] - losses[1]) < TOLERANCE, losses
    arms = [
        Arm("trlhf", lambda: our_pairs(setting, ids, pairs, rl)),
        Arm(PLAIN, lambda: trl_pairs(setting, ids, rows, rl, False)),
        Arm(PRECOMPUTED, lambda: trl_pairs(setting, ids, rows, rl, True)),
    ]
    measured = alternate(arms, setting)
    return compared("pairs/s", measured, {PLAIN: 1.3, PRECOMPUTED: 1.3}) | {"loss_of_one_step": losses}


def two_models(setting: Setting) -> tuple[Any, Any]:
    """Return a policy and a reference that differ, so that the losses compared are not log 2 whatever the data."""
    policy, reference = build(setting), build(setting)
    torch.manual_seed(1)
    with torch.no_grad():
        for value in reference.parameters():
            value += 2e-3 * torch.randn_like(value)
    return policy.train(), reference.eval()


def groups_of(pairs: Sequence[Pair]) -> list[Group]:
    """Return groups of two samples, of which labels decided one to be right."""
    groups = []
    for i, pair in enumerate(pairs):
        prompt = Prompt(f"p{i}", ({"role": "user", "content": f"{i}"},))
        drawn = tuple(
            Rollout(prompt.id, "", tokens, (0.0,) * len(tokens)) for tokens in (pair.chosen_ids, pair.rejected_ids)
        )
        groups.append(Group(prompt, pair.prompt_ids, drawn, (1.0, 0.0), (True, True)))
    return groups


def our_pairs(
    setting: Setting, ids: PreTrainedTokenizerBase, pairs: Sequence[Pair], rl: RlConfig
) -> Callable[[], Done]:
    """Return our update on groups of two samples, of which labels decided one to be right."""
    policy, reference = two_models(setting)
    learner = DpoLearner(Role(policy.eval()), Role(reference).frozen(), rl, int(ids.pad_token_id))
    groups = groups_of(pairs)

    def work() -> Done:
        metrics = learner.update(groups, [], random.Random(0), 1.0)
        assert metrics["pairs"] == len(pairs)
        return Done(len(pairs) * rl.epochs, {"loss": metrics["loss"]})

    return work


def trl_pairs(
    setting: Setting, ids: PreTrainedTokenizerBase, rows: list[dict[str, str]], rl: RlConfig, precompute: bool
) -> Callable[[], Done]:
    """Return TRL's DPO on the same tokens; what it precomputes is not counted."""
    policy, reference = two_models(setting)
    size = max(1, rl.microbatch_size // 2)
    clock = Clock()
    config = DPOConfig(
        per_device_train_batch_size=min(size, rl.pairs_per_step),
        gradient_accumulation_steps=max(1, rl.pairs_per_step // size),
        num_train_epochs=rl.epochs,
        beta=rl.beta,
        max_length=None,
        precompute_ref_log_probs=precompute,
        lr_scheduler_type="constant",
        **trl_common(setting),
    )
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=ids,
        callbacks=[clock],
    )

    trainer.remove_callback(PrinterCallback)

    def work() -> Done:
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return Done(len(rows) * rl.epochs, {"loss": sum(losses) / len(losses)}, clock.took)

    return work
