"""The labels that the reward stage buys: on prompts drawn at random, before anything is known."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from trlhf.config import Config
from trlhf.console import progress
from trlhf.crew import keep, release
from trlhf.knowledge import Knowledge
from trlhf.labelling import Archive, settle_questions
from trlhf.ledger import Ledger
from trlhf.models import choose_device, load_tokenizer
from trlhf.roles import load_sft
from trlhf.rollout import Sampling, sample_as
from trlhf.run import StageDirectory
from trlhf.seeding import derive_seed, numpy_rng, python_rng
from trlhf.targeting import Candidate, choose_pairs, choose_verdicts
from trlhf.types import Label, Labeler, Prompt, Question

log = logging.getLogger("trlhf")
SAMPLES = "labelled_samples.jsonl"
QUESTIONS = "questions.jsonl"


def buy_first_labels(
    config: Config, stage: StageDirectory, model_dir: Path, pool: Sequence[Prompt], ledger: Ledger, labeler: Labeler
) -> tuple[Archive, list[Label]]:
    """Sample responses to random prompts, buy ``reward.labels`` labels on them, and return both.

    Args:
        config: ``reward``, ``rl`` (how it samples) and ``targeting.preference_share`` matter.
        stage: receives the samples and the questions, so that a killed run asks the same ones.
        model_dir: folder of the SFT model.
        pool: prompts to draw from.
        ledger: where labels are bought.
        labeler: who answers.
    """

    def choose() -> list[Question]:
        candidates = _candidates(config, model_dir, pool)
        rng = numpy_rng(config.seed, "reward", "choose")
        questions = choose_pairs(candidates, _pairs_wanted(config, pool), rng)
        wanted = config.reward.labels - len(questions)
        questions += choose_verdicts(candidates, Knowledge(), wanted, None, 2, rng)
        if len(questions) < config.reward.labels:
            log.warning(
                "reward: %d of %d labels can be asked for; of the other prompts drawn, no sample gives an answer",
                len(questions), config.reward.labels,
            )  # fmt: skip
        asked = {question.prompt.id for question in questions}
        kept = Archive(pool)
        for candidate in candidates:
            if candidate.prompt.id in asked:
                kept.add(candidate.rollouts)
        stage.write_jsonl(SAMPLES, kept.rows())
        return questions

    questions = settle_questions(stage, QUESTIONS, choose)
    archive = Archive(pool)
    archive.load(stage.path / SAMPLES)
    return archive, ledger.ask(questions, labeler)


def _pairs_wanted(config: Config, pool: Sequence[Prompt]) -> int:
    """Return how many of the labels are to be preferences."""
    if not any(prompt.task == "open" for prompt in pool):
        return 0
    return round(config.reward.labels * config.targeting.preference_share)


def _candidates(config: Config, model_dir: Path, pool: Sequence[Prompt]) -> list[Candidate]:
    """Draw a quarter more prompts than labels, since some get no answer, and sample responses to them."""
    pairs = _pairs_wanted(config, pool)
    verdicts = config.reward.labels - pairs
    shuffled = python_rng(config.seed, "reward", "prompts").sample(list(pool), len(pool))
    drawn = [prompt for prompt in shuffled if prompt.task == "exact"][: verdicts + verdicts // 4]
    drawn += [prompt for prompt in shuffled if prompt.task == "open"][: pairs + pairs // 4]
    sampling = Sampling.of(config.rl, config.reward.samples_per_prompt)
    tokenizer = keep(load_tokenizer, model_dir)
    role = keep(load_sft, model_dir, config.model, choose_device(config))
    seed = derive_seed(config.seed, "reward", "rollouts")
    with progress("reward: sampling responses to label", len(drawn)) as advance:
        sampled = sample_as(role, tokenizer, drawn, sampling, seed, advance)
    release()
    return [Candidate(prompt, tuple(rollouts)) for prompt, rollouts in zip(drawn, sampled, strict=True)]
