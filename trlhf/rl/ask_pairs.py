"""Which comparisons a round asks for: candidates, the gate, the acquisition, and repeats in the other order."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from trlhf.logprobs import pad_sequences, response_logprobs
from trlhf.models import encode_prompt
from trlhf.rl.anchors import release
from trlhf.rl.candidates import more_open
from trlhf.rl.judge import settled
from trlhf.rl.liking import LikingJudge, comparisons
from trlhf.rl.round import OPEN_KINDS, Round
from trlhf.seeding import numpy_rng
from trlhf.sharding import whole
from trlhf.targeting import Candidate
from trlhf.targeting.gate import FEWEST_USUAL, OUTLIER_PERCENTILE, gate, mahalanobis_distances, outlier_bound
from trlhf.targeting.pairs import Options, choose_pairs, pick_pairs
from trlhf.types import Label, Prompt, Question, Rollout

REPEATED = "repeat: the same two responses in the other order, to measure noise and position bias"


@dataclass
class PairQuestions:
    """The comparisons of a round.

    Attributes:
        questions: in the order in which they are asked.
        decided: what goes into the round's file.
    """

    questions: list[Question]
    decided: dict[str, Any] = field(default_factory=dict)


def learns_open(trainer: Round) -> bool:
    """Say whether preferences are bought and learned from, so that open prompts must not be held still."""
    targeting, rl = trainer.config.targeting, trainer.config.rl
    return targeting.preference_share > 0 and rl.open_share > 0 and targeting.update == "targeted"


def open_candidates(trainer: Round, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the open prompts among the candidates and, where they are learned by a model, more of them."""
    found = [candidate for candidate in candidates if candidate.prompt.task == "open"]
    if not learns_open(trainer):
        return found
    return found + more_open(trainer, {candidate.prompt.id for candidate in found})


def fit_taste(trainer: Round, candidates: Sequence[Candidate], labels: Sequence[Label]) -> LikingJudge | None:
    """Fit the model of preferences to the labels so far; None where it has no part, or nothing to read."""
    if trainer.config.targeting.pairs == "uniform" and not learns_open(trainer):
        return None
    taster = trainer.new_taster()
    prompts, sampled = [c.prompt for c in candidates], [c.rollouts for c in candidates]
    if taster is None or not any(r.finished for rollouts in sampled for r in rollouts):
        return None
    taster.scale_on(prompts, sampled)
    taster.fit(trainer.inputs.pool, labels)
    return taster


def ask_pairs(
    trainer: Round,
    candidates: Sequence[Candidate],
    taster: LikingJudge | None,
    labels: Sequence[Label],
    count: int,
    rng: np.random.Generator,
) -> PairQuestions:
    """Choose ``count`` comparisons: by ``targeting.pairs``, and of ``targeting.repeat_share`` the order turned.

    Args:
        trainer: the round.
        candidates: open prompts with samples.
        taster: fitted to the labels of earlier rounds; None: pairs at random.
        labels: of earlier rounds.
        count: how many to ask.
        rng: of all chance.
    """
    targeting, number = trainer.config.targeting, trainer.state.round
    if count < 1 or not candidates:
        return PairQuestions([])
    repeats = turned(labels, trainer.inputs.pool, round(count * targeting.repeat_share), rng, number)
    count -= len(repeats)
    asked = {(label.prompt_id, frozenset(label.responses)) for label in comparisons(labels)}
    if taster is None or taster.model is None or targeting.pairs == "uniform":
        return PairQuestions([*choose_pairs(candidates, count, rng, number, asked), *repeats], _in_words(taster))
    options, texts, samples = taster.options([c.prompt for c in candidates], [c.rollouts for c in candidates])
    refused: dict[str, int] = {}
    if targeting.gate:
        kept, refused = _sound(options, samples, taster)
        options = options._replace(
            features=options.features[kept], prompts=options.prompts[kept], counts=options.counts[kept]
        )
        texts, samples = [texts[n] for n in kept], [samples[n] for n in kept]
    options = options._replace(asked=_rows(asked, [candidates[x].prompt.id for x in options.prompts], texts))
    entropy, implicit = None, None
    if targeting.pairs == "apl":
        entropy = np.array([-np.mean([sum(r.logprobs) for r in c.rollouts]) for c in candidates])
        implicit = implicit_rewards(trainer, [candidates[x].prompt for x in options.prompts], samples)
    picks = pick_pairs(options, taster.model, targeting.pairs, count, rng, entropy, implicit)
    questions = []
    for pick in picks:
        prompt = candidates[options.prompts[pick.first]].prompt
        why = f"{targeting.pairs}: P(told apart) {pick.told_apart:.2f}, P(A is preferred) {pick.probability:.2f}"
        why += "" if pick.value is None else f", resolves {pick.value:.2f} prompts"
        questions.append(Question("preference", prompt, (texts[pick.first], texts[pick.second]), None, why, number))
    decided = _in_words(taster) | {"pairs_refused_by_gate": refused, "pair_candidates": len(candidates)}
    if picks:
        decided["pairs_expected_told_apart"] = settled(float(np.mean([pick.told_apart for pick in picks])))
    return PairQuestions([*questions, *repeats], decided)


def _rows(
    asked: Collection[tuple[str, frozenset[str]]], names: Sequence[str], texts: Sequence[str]
) -> frozenset[frozenset[int]]:
    """Return comparisons as pairs of rows; those of other responses than the rows' are left out."""
    row = {own: n for n, own in enumerate(zip(names, texts, strict=True))}
    pairs = [frozenset(row[name, text] for text in two if (name, text) in row) for name, two in asked]
    return frozenset(pair for pair in pairs if len(pair) == 2)


def turned(
    labels: Sequence[Label], prompts: Sequence[Prompt], count: int, rng: np.random.Generator, number: int
) -> list[Question]:
    """Choose at random, among the comparisons asked once, some to be asked again with A and B changed."""
    known = {prompt.id: prompt for prompt in prompts}
    asked: dict[tuple[str, frozenset[str]], list[Label]] = {}
    for label in comparisons(labels):
        asked.setdefault((label.prompt_id, frozenset(label.responses)), []).append(label)
    once = [found[0] for found in asked.values() if len(found) == 1 and found[0].prompt_id in known]
    return [
        Question("preference", known[x.prompt_id], (x.responses[1], x.responses[0]), None, REPEATED, number, 1)
        for x in (once[i] for i in rng.permutation(len(once))[:count])
    ]


def note_taste(
    trainer: Round, candidates: Sequence[Candidate], taster: LikingJudge | None, labels: Sequence[Label]
) -> dict[str, Any]:
    """Refit to the labels just bought, note what they tell of every open candidate, and say it in words."""
    if taster is None:
        return {}
    taster.fit(trainer.inputs.pool, labels)
    if trainer.config.targeting.update == "targeted" and comparisons(labels):
        trainer.taster = taster  # `prepare` needs the same
        rng = numpy_rng(trainer.config.seed, "rl", "liking", trainer.state.round)
        prompts, sampled = [c.prompt for c in candidates], [c.rollouts for c in candidates]
        _, outlook = taster.judge(prompts, sampled, rng)
        trainer.state.liking |= {prompt.id: seen for prompt, seen in zip(prompts, outlook, strict=True)}
        if learns_open(trainer):
            learned = worth_learning(trainer.state.liking, trainer.inputs.pool)
            released = {p.id for p in trainer.inputs.pool if p.task == "open" and p.kind in learned}
            trainer.state.anchors = release(trainer.state.anchors, released)
            return _in_words(taster) | {OPEN_KINDS: sorted(learned), "open_prompts_learned": len(released)}
    return _in_words(taster)


def worth_learning(liking: Mapping[str, tuple[float, float]], prompts: Sequence[Prompt]) -> set[str]:
    """Return the kinds of open prompts worth learning; prompts of the others stay held still, and are not trained on.

    A prompt's value is P(two samples are told apart) times trust; a kind is worth it if the mean over its prompts is at
    least that over all. Prompts of one kind are answered alike: what holds some of them still holds all.
    """
    values = {name: apart * trust for name, (apart, trust) in liking.items()}
    least = sum(values.values()) / max(1, len(values)) * (1 - 1e-9)
    of_kind: dict[str, list[float]] = {}
    for prompt in prompts:
        if prompt.id in values:
            of_kind.setdefault(prompt.kind, []).append(values[prompt.id])
    return {kind for kind, found in of_kind.items() if sum(found) > 0 and sum(found) / len(found) >= least}


@torch.no_grad()
def implicit_rewards(trainer: Round, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> Float[ndarray, " N"]:
    """Return β·log π/π_ref of each response (Rafailov et al. 2023, sec. 4)."""
    rl, reference = trainer.config.rl, trainer.inputs.roles.reference
    ids = [encode_prompt(trainer.tokenizer, prompt.messages) for prompt in prompts]
    pad_id = int(trainer.tokenizer.pad_token_id)
    rewards: list[float] = []
    with whole(reference), reference.acting() as model:
        for start in range(0, len(rollouts), rl.microbatch_size):
            part = slice(start, start + rl.microbatch_size)
            batch = pad_sequences(ids[part], [r.token_ids for r in rollouts[part]], pad_id).to(reference.device)
            logprobs = response_logprobs(model, batch, rl.temperature)
            rewards += (logprobs * batch.response_mask).sum(1).tolist()
    own = np.array([sum(rollout.logprobs) for rollout in rollouts])
    return np.asarray(rl.beta * (own - np.array(rewards)))


def _sound(options: Options, samples: Sequence[Rollout], taster: LikingJudge) -> tuple[list[int], dict[str, int]]:
    """Return the rows that the gate lets through, and how many it refuses for each reason.

    What is usual is measured on responses that a person preferred to another.
    """
    distances, bound = None, None
    if taster.winners is not None and len(set(taster.winning_prompts)) >= FEWEST_USUAL:
        groups = np.unique(taster.winning_prompts, return_inverse=True)[1]
        distances = mahalanobis_distances(options.features, taster.winners)
        bound = outlier_bound(taster.winners, OUTLIER_PERCENTILE, groups)
    reasons = gate([r.token_ids for r in samples], [r.finished for r in samples], distances, bound)
    refused: dict[str, int] = {}
    for reason in reasons:
        if reason is not None:
            name = reason.split(":")[0]
            refused[name] = refused.get(name, 0) + 1
    return [n for n, reason in enumerate(reasons) if reason is None], refused


def _in_words(taster: LikingJudge | None) -> dict[str, Any]:
    """Return what the round's file says of the people who compare."""
    if taster is None or taster.model is None:
        return {}
    noise, model = taster.noise, taster.model
    return {
        "preference_noise": {"flip_rate": noise.flip_rate, "position_bias": noise.bias, "swapped": taster.swapped},
        "preferences_say": (
            f"{model.compared} comparisons, {taster.swapped} of them asked in both orders: an answer that was thought "
            f"about is the opposite in an estimated {noise.flip_rate:.0%}, and A is answered unread in {noise.bias:.0%}"
        ),
    }
