"""Which prompts a step trains on: what labels decide, what the models of the round tell with trust, open prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from trlhf.rl.frontier import posterior_of
from trlhf.rl.liking import open_weights
from trlhf.targeting import last_pass_rates, training_weights
from trlhf.types import Prompt

if TYPE_CHECKING:
    from trlhf.rl.round import Round


def draw_prompts(trainer: Round, rng: np.random.Generator) -> list[Prompt]:
    """Draw a step's prompts: decided ones, open ones and, by ``rl.unverified_share``, some that nothing decides.

    Where too few are decided, more of the last than were asked for. A targeted update that has nothing else looks
    at such prompts too: their samples may be judged with trust by now.
    """
    rl = trainer.config.rl
    total = rl.prompts_per_step
    decided, weights = decided_prompts(trainer)
    known = {prompt.id for prompt in decided}
    others = [p for p in trainer.unverified if p.id not in known] if rl.unverified_share else []
    n_open = min(len(trainer.open), round(total * rl.open_share) if decided or others else total)
    wanted = min(len(others), round(total * rl.unverified_share))
    n_decided = min(len(decided), max(0, total - n_open - wanted))
    n_others = total - n_open - n_decided
    chosen = [decided[i] for i in rng.choice(len(decided), n_decided, replace=False, p=weights)] if n_decided else []
    if trainer.taster is None or not n_open:
        chosen += [trainer.open[i] for i in rng.permutation(len(trainer.open))[:n_open]]
    else:
        weights = open_weights([prompt.id for prompt in trainer.open], trainer.state.liking)
        chosen += [trainer.open[i] for i in rng.choice(len(trainer.open), n_open, replace=False, p=weights)]
    chosen += [others[i] for i in rng.permutation(len(others))[:n_others]]
    return chosen or [trainer.unverified[i] for i in rng.permutation(len(trainer.unverified))[:total]]


def decided_prompts(trainer: Round) -> tuple[list[Prompt], Float[ndarray, " N"]]:
    """Return the prompts whose rewards labels, or the answer model with trust, decide; and how they are drawn.

    Plain: all alike. Else in proportion to U, P(mixed group). Targeted: times the trust in what no label decides,
    and times (1 - pass rate)^η for what labels verify. Where the model alone says what is right, what is seldom
    right may be what the model has wrong, so there the factor is that of a pass rate of a half.
    """
    targeting, outlook = trainer.config.targeting, trainer.state.outlook
    judged = trainer.trusted()
    prompts = [*trainer.exact, *judged]
    if targeting.update == "plain" or not prompts:
        return prompts, np.full(len(prompts), 1 / max(1, len(prompts)))
    alpha, beta = _pass_rates(trainer, judged)
    eta = targeting.hardness if targeting.update == "targeted" else 0.0
    hardness = np.array([eta] * len(trainer.exact) + [0.0] * len(judged))
    trust = np.array([1.0] * len(trainer.exact) + [outlook[p.id][1] * 0.5**eta for p in judged])
    return prompts, training_weights(alpha, beta, trainer.config.rl.samples_per_prompt, hardness, trust)


def _pass_rates(trainer: Round, judged: Sequence[Prompt]) -> tuple[Float[ndarray, " N"], Float[ndarray, " N"]]:
    """Return α and β of the verified prompts' pass rates, then of those that the answer model judges.

    By ``targeting.pass_rates``: of the last samples alone, or of all so far, faded, over a label-free prior.
    """
    targeting, state = trainer.config.targeting, trainer.state
    if targeting.pass_rates == "posterior":
        return posterior_of(state, [*trainer.exact, *judged])
    samples = min(targeting.samples_per_prompt, trainer.config.rl.samples_per_prompt)  # a rate comes from either
    rates = [state.pass_rates.get(p.id) for p in trainer.exact] + [state.outlook[p.id][0] for p in judged]
    return last_pass_rates(rates, samples)
