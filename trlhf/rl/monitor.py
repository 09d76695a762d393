"""After every step: is the policy still healthy? After every round: what do the held-out prompts say?"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from trlhf.config import RlConfig
from trlhf.rl import checkpoint
from trlhf.rl.checkpoint import Learner
from trlhf.rl.frontier import describe_frontier
from trlhf.rl.health import after_record, after_round, after_step, mean
from trlhf.rl.held_out import FEWEST, TIMES, pass_rates
from trlhf.rl.records import Record
from trlhf.rl.round import Round, decisions_file
from trlhf.rollout import Sampling, sample_as
from trlhf.seeding import derive_seed

log = logging.getLogger("trlhf")


def judge_step(trainer: Round) -> dict[str, float]:
    """Take the step that was just done into ``state.health``, and with a round's last step the round.

    Returns:
        What the step's line says beside its own metrics.
    """
    rl, state = trainer.config.rl, trainer.state
    state.health = after_step(state.health, state.step, state.last, rl.max_kl, rl.max_anchor_kl)
    if state.step < state.round * rl.steps_per_round:
        return {}
    rates, held_out_tokens = measure_held_out(trainer)
    name, accuracy = decisions_file(state.round), mean(rates) if rates else None
    decided = trainer.decisions(state.round)
    record = record_round(trainer, decided, held_out_tokens, accuracy)
    state.health = after_round(state.health, state.step, rates, rl.held_out_patience)
    state.health = after_record(state.health, record, rl.stop_rules)
    ended = {**record, "anchor_kl": state.last.get("anchor_kl"), "stopped": state.health["stopped"]}
    held_out = {"accuracy": accuracy, "pass_rates": rates}
    trainer.stage.write_json(name, decided | {"held_out": held_out, "ended": ended})
    if accuracy is not None:
        log.info("round %d: held-out accuracy %.1f%% (%d prompts)", state.round, 100 * accuracy, len(rates or ()))
        return {"held_out_accuracy": accuracy}
    if state.round == 1:
        log.info("held-out accuracy is not measured: %s", _why_none(rl))
    return {}


def record_round(
    trainer: Round, decided: Mapping[str, Any], held_out_tokens: float | None, accuracy: float | None
) -> Record:
    """Return what the round that just ended was like.

    Args:
        trainer: after the round's last step.
        decided: content of its file so far.
        held_out_tokens: mean length of the held-out prompts' samples.
        accuracy: their share that is right.
    """
    rl, state = trainer.config.rl, trainer.state
    tokens, outliers = state.health["tokens"], decided.get("outliers") or {}
    before, after = measure_anchors(trainer) if "anchors_fell" in rl.stop_rules else (None, None)
    return {
        "step": state.step,
        "tokens": sum(tokens) / len(tokens) if tokens else None,
        "held_out_tokens": held_out_tokens,
        "held_out_accuracy": accuracy,
        "frontier_before": decided.get("frontier", {}).get("worth"),
        "frontier": describe_frontier(state, trainer.pool, rl.samples_per_prompt)["worth"] if state.looks else None,
        "outliers": outliers.get("outliers"),
        "outliers_of": outliers.get("prompts"),
        "anchors_before": before,
        "anchors": after,
    }


def measure_anchors(trainer: Round) -> tuple[dict[str, float] | None, dict[str, float] | None]:
    """Return whether the greedy answer of each anchor that labels verify is right: the reference's, the policy's."""
    held = {anchor.prompt_id for anchor in trainer.state.anchors}
    exact = [prompt for prompt in trainer.pool if prompt.id in held and prompt.task == "exact"]
    prompts = [prompt for prompt in exact if trainer.knowledge.right_answer(prompt.id) is not None]
    if not prompts:
        return None, None
    rl, found = trainer.config.rl, []
    sampling = Sampling(0.0, rl.max_new_tokens, 1, rl.rollout_batch_size)
    for role in (trainer.inputs.roles.reference, trainer.policy):
        sampled = sample_as(role, trainer.tokenizer, prompts, sampling, 0)
        found.append(pass_rates(prompts, sampled, trainer.knowledge))
    return found[0], found[1]


def _why_none(rl: RlConfig) -> str:
    if not rl.unverified_share and not rl.interpolate:
        return "labels decide the reward of every exact prompt"
    if not rl.held_out_patience and not rl.interpolate:
        return "rl.held_out_patience=0"
    return f"the reward stage's labels verify fewer than {FEWEST} prompts that its model never learned from"


def measure_held_out(trainer: Round) -> tuple[dict[str, float] | None, float | None]:
    """Sample the held-out prompts as training does, `TIMES` as often each.

    Returns:
        Pass rates and the responses' mean length, None where there are no such prompts.
    """
    prompts, rl = trainer.held_out, trainer.config.rl
    if not prompts:
        return None, None
    sampling = Sampling.of(rl, TIMES * rl.samples_per_prompt)
    seed = derive_seed(trainer.config.seed, "rl", "held_out", trainer.state.round)
    sampled = sample_as(trainer.policy, trainer.tokenizer, prompts, sampling, seed)
    lengths = [len(rollout.token_ids) for rollouts in sampled for rollout in rollouts]
    return pass_rates(prompts, sampled, trainer.knowledge), sum(lengths) / len(lengths)


def end_early(trainer: Round, learner: Learner) -> str | None:
    """Where a rule stopped the stage, put back the last policy that may be kept; return why and which it is."""
    state = trainer.state
    reason = state.health["stopped"]
    if reason is None:
        return None
    if state.health["restore"] == state.step:
        kept = f"the last one, of step {state.step}"
    else:
        found = checkpoint.load(trainer.stage, trainer.policy, learner, state.health["restore"])
        kept = f"that of step {found.step}" if found else f"the last one, of step {state.step}: no earlier one is left"
    reason = f"{reason}; the policy saved is {kept}"
    log.warning("rl ended early at step %d: %s", state.step, reason)
    return reason
