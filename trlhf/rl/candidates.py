"""Prompts with samples of the policy: what a round looks at before it asks anything."""

from __future__ import annotations

from collections.abc import Container, Sequence

from trlhf.console import progress as progress_bar
from trlhf.knowledge import Knowledge
from trlhf.rl.frontier import draw_candidates
from trlhf.rl.round import Round
from trlhf.rollout import Sampling, sample_as
from trlhf.seeding import derive_seed, numpy_rng, python_rng
from trlhf.targeting import Candidate
from trlhf.types import Prompt


def sample(
    trainer: Round, prompts: Sequence[Prompt], samples: int, seed: int, title: str | None = None
) -> list[Candidate]:
    """Return the prompts with ``samples`` responses each of the policy as it is now; with a title, show progress."""
    sampling = Sampling.of(trainer.config.rl, samples)
    if title is None:
        sampled = sample_as(trainer.policy, trainer.tokenizer, prompts, sampling, seed)
    else:
        with progress_bar(title, len(prompts)) as advance:
            sampled = sample_as(trainer.policy, trainer.tokenizer, prompts, sampling, seed, advance)
    return [Candidate(prompt, tuple(rollouts)) for prompt, rollouts in zip(prompts, sampled, strict=True)]


def sample_candidates(trainer: Round, before: Knowledge) -> list[Candidate]:
    """Sample the round's candidates from the current policy: a random part of the pool.

    The frontier acquisition takes first the prompts on which an answer was ruled out and none found right: there the
    policy is known to be wrong, and another verdict can settle what is right.
    """
    config, number = trainer.config, trainer.state.round
    rng = python_rng(config.seed, "rl", "candidates", number)
    pinned: list[Prompt] = []
    if config.targeting.acquisition == "frontier":
        pinned = [p for p in trainer.pool if before.ruled_out(p.id) and before.right_answer(p.id) is None]
        pinned = pinned[: config.targeting.candidates // 2]
    held = {prompt.id for prompt in pinned}
    others = [prompt for prompt in trainer.pool if prompt.id not in held]
    probe = config.targeting.pass_rates == "posterior"
    prompts = pinned + draw_candidates(trainer.state, others, config.targeting.candidates - len(pinned), rng, probe)
    seed = derive_seed(config.seed, "rl", "candidates", number)
    title = f"round {number}: sampling candidates"
    return sample(trainer, prompts, config.targeting.samples_per_prompt, seed, title)


def more_plain(trainer: Round, held: Container[str]) -> list[Candidate]:
    """Sample once prompts that need no thinking, as anchors: no reward watches over them."""
    config = trainer.config
    prompts = [p for p in trainer.pool if not p.reasoning and p.id not in held]
    most = min(config.targeting.candidates, len(prompts)) if config.rl.anchor_coef else 0
    if not most:
        return []
    prompts = python_rng(config.seed, "rl", "anchors").sample(prompts, most)
    return sample(trainer, prompts, 1, derive_seed(config.seed, "rl", "anchors"))


def more_open(trainer: Round, held: Container[str]) -> list[Candidate]:
    """Sample open prompts beyond the round's candidates.

    Six in ten random pairs were ties: a choice needs something to choose from, and rollouts are cheap beside labels.
    """
    config, number = trainer.config, trainer.state.round
    more = [p for p in trainer.inputs.pool if p.task == "open" and p.id not in held]
    rng = numpy_rng(config.seed, "rl", "open", number)
    prompts = [more[i] for i in rng.permutation(len(more))[: config.targeting.candidates]]
    if not prompts:
        return []
    seed = derive_seed(config.seed, "rl", "open", number)
    return sample(trainer, prompts, config.targeting.samples_per_prompt, seed)
