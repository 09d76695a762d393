"""Stage 3, in order: rollouts → frontier → labels → refit → targeted updates, round by round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from trlhf.config import Config
from trlhf.console import progress as progress_bar
from trlhf.models import Reference, choose_device, load_policy, load_tokenizer, save_policy
from trlhf.rl import checkpoint
from trlhf.rl.checkpoint import Progress
from trlhf.rl.critic import Critic
from trlhf.rl.dpo import DpoLearner
from trlhf.rl.ppo import PpoLearner
from trlhf.rl.round import RlInputs, Round, samples_file
from trlhf.run import StageDirectory
from trlhf.seeding import python_rng

__all__ = ["RlInputs", "train_rl"]


def train_rl(config: Config, stage: StageDirectory, inputs: RlInputs) -> dict[str, Any]:
    """Run the rounds and save the policy; a stopped run continues from its last checkpoint.

    Returns:
        The metrics that are written to ``metrics.json``.

    Raises:
        UserError: no prompt of the pool can be learned from, or an unreadable checkpoint.
    """
    rl = config.rl
    device = choose_device(config)
    tokenizer = load_tokenizer(inputs.sft)
    policy, reference = load_policy(inputs.sft, config.model, device, config.seed)
    learner = _learner(config, policy, reference, inputs.critic, int(tokenizer.pad_token_id), device)
    found = checkpoint.load(stage, policy, learner)
    state = found or Progress()
    stage.rewind(state.step)
    for number in range(1, state.round):  # what the rounds before the checkpoint had archived
        inputs.archive.load(stage.path / samples_file(number))
    last: dict[str, float] = {}
    total = rl.rounds * rl.steps_per_round
    with progress_bar(f"rl ({rl.algorithm})", total) as advance:
        advance(state.step)
        for number in range(state.round, rl.rounds + 1):
            state.round = number
            trainer = Round(config, stage, inputs, policy, tokenizer, state)
            if not state.planned:
                trainer.buy_labels()
                state.planned = True
                checkpoint.save(stage, policy, learner, state)
            trainer.prepare()
            while state.step < number * rl.steps_per_round:
                groups = trainer.sample_groups()
                scale = min((state.step + 1) / max(1.0, rl.warmup_ratio * total), 1 - state.step / total)
                warmup = rl.advantage == "gae" and state.step < rl.value_warmup_steps
                last = learner.update(
                    groups, state.anchors, python_rng(config.seed, "rl", "update", state.step), scale, warmup
                )
                state.step += 1
                stage.log(state.step, round=number, **last)
                stage.write_jsonl("samples.jsonl", (row for group in groups for row in group.rows()))
                advance(1, f"round {number}, reward {last['reward']:.2f}")
                if state.step % rl.save_steps == 0:
                    checkpoint.save(stage, policy, learner, state)
            state.planned = False
    if not config.model.lora.enabled:
        policy.to(getattr(torch, config.model.dtype))
    with stage.new_directory("model") as folder:
        save_policy(policy, tokenizer, folder)
    metrics = {"steps": state.step, "rounds": rl.rounds, "anchors": len(state.anchors), "last_step": last}
    metrics["verifiable_prompts"] = len(inputs.ledger.knowledge().verifiable_prompts())
    metrics["labels"] = {"spent": inputs.ledger.spent, "remaining": inputs.ledger.remaining}
    stage.complete(metrics)
    return metrics


def _learner(
    config: Config, policy: PreTrainedModel, reference: Reference, critic: Path, pad_id: int, device: str
) -> PpoLearner | DpoLearner:
    policy.eval()  # dropout stays off in training too: the ratio of new to old must come from the weights alone
    if config.rl.algorithm == "dpo":
        return DpoLearner(policy, reference, config.rl, pad_id)
    value = Critic(critic, config.model, device) if config.rl.advantage == "gae" else None
    return PpoLearner(policy, reference, value, config.rl, pad_id)
