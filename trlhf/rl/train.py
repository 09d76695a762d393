"""Stage 3, in order: rollouts → frontier → labels → refit → targeted updates, round by round."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from trlhf import preemption
from trlhf.config import Config
from trlhf.console import progress as progress_bar
from trlhf.crew import keep, together
from trlhf.export import save_adapter
from trlhf.merging import save_model
from trlhf.models import load_tokenizer
from trlhf.rl import checkpoint
from trlhf.rl.ask_verdicts import idle_stop_rules
from trlhf.rl.buy import buy_labels
from trlhf.rl.checkpoint import Progress
from trlhf.rl.critic import Critic
from trlhf.rl.dpo import DpoLearner
from trlhf.rl.experience import Group
from trlhf.rl.frontier import measure_drift
from trlhf.rl.health import held_out_accuracies
from trlhf.rl.interpolate import interpolate
from trlhf.rl.monitor import end_early, judge_step
from trlhf.rl.ppo import PpoLearner
from trlhf.rl.round import RlInputs, Round, samples_file
from trlhf.roles import Roles
from trlhf.run import StageDirectory
from trlhf.seeding import python_rng
from trlhf.sharding import whole

__all__ = ["RlInputs", "train_rl"]
log = logging.getLogger("trlhf")


def train_rl(config: Config, stage: StageDirectory, inputs: RlInputs) -> dict[str, Any]:
    """Run the rounds and save the policy; a stopped run continues from its last checkpoint.

    Returns:
        The metrics that are written to ``metrics.json``.

    Raises:
        UserError: no prompt of the pool can be learned from, or an unreadable checkpoint.
    """
    rl = config.rl
    if idle := idle_stop_rules(config.targeting):
        log.info(
            "targeting.stop_rules: %s never acts with acquisition=%s", ", ".join(idle), config.targeting.acquisition
        )
    policy = inputs.roles.policy
    tokenizer = keep(load_tokenizer, inputs.sft)
    pad_id = int(tokenizer.pad_token_id)
    learner = keep(_learner, config, inputs.roles, pad_id)
    found = checkpoint.load(stage, policy, learner)
    state = found or Progress()
    checkpoint.prune(stage, state, rl.save_total_limit)
    stage.rewind(state.step)
    for number in range(1, state.round):  # what the rounds before the checkpoint had archived
        inputs.archive.load(stage.path / samples_file(number))
    total = rl.rounds * rl.steps_per_round
    with progress_bar(f"rl ({rl.algorithm})", total) as advance:
        advance(state.step)
        for number in range(state.round, rl.rounds + 1):
            state.round = number
            trainer = Round(config, stage, inputs, policy, tokenizer, state)
            if not state.planned:
                buy_labels(trainer)
                state.planned = True
                checkpoint.save(stage, policy, learner, state, rl.save_total_limit)
            trainer.prepare()
            with preemption.patient():
                while state.step < number * rl.steps_per_round and not state.health["stopped"]:
                    begun = time.monotonic()
                    groups = trainer.sample_groups()
                    scale = min((state.step + 1) / max(1.0, rl.warmup_ratio * total), 1 - state.step / total)
                    warmup = rl.advantage == "gae" and state.step < rl.value_warmup_steps
                    rng = python_rng(config.seed, "rl", "update", state.step)
                    state.last = together(learner.update, groups, state.anchors, rng, scale, warmup)
                    moved = together(measure_drift, policy, groups, rl, pad_id)
                    state.drift += moved
                    state.step += 1
                    seconds = time.monotonic() - begun
                    line = {**state.last, "drift": moved, **judge_step(trainer), **_speed(groups, seconds)}
                    stage.log(state.step, round=number, **line)
                    stage.write_jsonl("samples.jsonl", (row for group in groups for row in group.rows()))
                    advance(1, f"round {number}, reward {state.last['reward']:.2f}")
                    stop, due = preemption.requested(), state.step % rl.save_steps == 0
                    if stop or due:
                        kind = checkpoint.REGULAR if due else checkpoint.EXTRA
                        checkpoint.save(stage, policy, learner, state, rl.save_total_limit, kind)
                    if stop:
                        raise preemption.Preempted.at("rl", state.step)
            state.planned = False
            if state.health["stopped"]:
                break
    stopped = end_early(trainer, learner)
    interpolation = interpolate(trainer)
    with stage.new_directory("model") as folder, whole(policy):
        save_model(policy.model, tokenizer, folder, config.model.dtype, policy.adapter)
    if policy.base is not None:
        with stage.new_directory("adapter") as folder:
            save_adapter(policy, inputs.sft, tokenizer, folder)
    metrics = {"steps": state.step, "rounds": state.round, "anchors": len(state.anchors), "last_step": state.last}
    metrics |= {
        "interpolation": interpolation,
        "stopped": stopped,
        "held_out_accuracy": held_out_accuracies(state.health),
    }
    metrics["verifiable_prompts"] = len(inputs.ledger.knowledge().verifiable_prompts())
    ledger = inputs.ledger
    metrics["labels"] = {"budget": ledger.budget, "spent": ledger.spent, "remaining": ledger.remaining}
    stage.complete(metrics)
    return metrics


def _learner(config: Config, roles: Roles, pad_id: int) -> PpoLearner | DpoLearner:
    if config.rl.algorithm == "dpo":
        return DpoLearner(roles.policy, roles.reference, config.rl, pad_id)
    critic = Critic(roles.value) if roles.value is not None else None
    return PpoLearner(roles.policy, roles.reference, critic, config.rl, pad_id)


def _speed(groups: Sequence[Group], seconds: float) -> dict[str, float]:
    """Return how long a step took, and the response tokens sampled and learned from in a second of it."""
    tokens = sum(len(rollout.token_ids) for group in groups for rollout in group.rollouts)
    return {"seconds": seconds, "tokens_per_second": tokens / seconds}
