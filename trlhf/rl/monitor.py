"""After every step: is the policy still healthy? After every round: what do the held-out prompts say?"""

from __future__ import annotations

import logging

from trlhf import files
from trlhf.config import RlConfig
from trlhf.rl import checkpoint
from trlhf.rl.checkpoint import Learner
from trlhf.rl.health import after_round, after_step, mean
from trlhf.rl.held_out import FEWEST, pass_rates
from trlhf.rl.round import Round, decisions_file
from trlhf.rollout import Sampling, sample_responses
from trlhf.seeding import torch_generator

log = logging.getLogger("trlhf")


def judge_step(trainer: Round) -> dict[str, float]:
    """Take the step that was just done into ``state.health``, and with a round's last step the round.

    Returns:
        What the step's line says beside its own metrics.
    """
    rl, state = trainer.config.rl, trainer.state
    state.health = after_step(state.health, state.step, state.last, rl.max_kl)
    if state.step < state.round * rl.steps_per_round:
        return {}
    rates = measure_held_out(trainer)
    state.health = after_round(state.health, state.step, rates, rl.held_out_patience)
    name, accuracy = decisions_file(state.round), mean(rates) if rates else None
    decided = files.read_json(trainer.stage.path / name)
    trainer.stage.write_json(name, decided | {"held_out": {"accuracy": accuracy, "pass_rates": rates}})
    if accuracy is not None:
        log.info("round %d: held-out accuracy %.1f%% (%d prompts)", state.round, 100 * accuracy, len(rates or ()))
        return {"held_out_accuracy": accuracy}
    if state.round == 1:
        log.info("held-out accuracy is not measured: %s", _why_none(rl))
    return {}


def _why_none(rl: RlConfig) -> str:
    if not rl.unverified_share:
        return "labels decide the reward of every exact prompt"
    if not rl.held_out_patience:
        return "rl.held_out_patience=0"
    return f"the reward stage's labels verify fewer than {FEWEST} prompts that its model never learned from"


def measure_held_out(trainer: Round) -> dict[str, float] | None:
    """Sample the held-out prompts as training does, and return their pass rates; None where there are none."""
    prompts, rl = trainer.held_out, trainer.config.rl
    if not prompts:
        return None
    sampling = Sampling.of(rl, rl.samples_per_prompt)
    generator = torch_generator(trainer.config.seed, "rl", "held_out", trainer.state.round)
    with trainer.policy.acting() as model:
        sampled = sample_responses(model, trainer.tokenizer, prompts, sampling, generator)
    return pass_rates(prompts, sampled, trainer.knowledge)


def end_early(trainer: Round, learner: Learner) -> str | None:
    """Where a rule stopped the stage, put back the last policy that may be kept; return why and which it is."""
    state = trainer.state
    reason = state.health["stopped"]
    if reason is None:
        return None
    found = checkpoint.load(trainer.stage, trainer.policy, learner, state.health["restore"])
    kept = f"that of step {found.step}" if found else f"the last one, of step {state.step}: no earlier one is left"
    reason = f"{reason}; the policy saved is {kept}"
    log.warning("rl ended early at step %d: %s", state.step, reason)
    return reason
