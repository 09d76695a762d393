"""The first half of a round: candidates → what to ask → labels, with every decision written down in words."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from trlhf.knowledge import Knowledge
from trlhf.labelling import Archive, settle_questions
from trlhf.models import encode_prompt
from trlhf.rl.anchors import find_anchors
from trlhf.rl.ask import Outlook, flip_rate, look
from trlhf.rl.ask_pairs import ask_pairs, fit_taste, note_taste, open_candidates
from trlhf.rl.ask_verdicts import BY_ANSWERS, VerdictChooser
from trlhf.rl.candidates import more_plain, sample_candidates
from trlhf.rl.frontier import describe_frontier, expected_rate, note_samples, refit_prior
from trlhf.rl.judge import texts_of
from trlhf.rl.outliers import count_outliers
from trlhf.rl.round import Round, decisions_file, samples_file
from trlhf.seeding import numpy_rng
from trlhf.targeting import Candidate
from trlhf.types import Label, Question

log = logging.getLogger("trlhf")


def buy_labels(trainer: Round) -> None:
    """Sample candidates, choose what to ask, ask, and note what was decided and why."""
    config, number, inputs, stage = trainer.config, trainer.state.round, trainer.inputs, trainer.stage
    targeting = config.targeting
    inputs.ledger.ask(inputs.ledger.unanswered(), inputs.labeler)  # paid before a kill
    labels = [label for label in inputs.ledger.labels() if label.round < number]  # a replay knows later ones
    before = Knowledge(labels)
    candidates = sample_candidates(trainer, before)
    if number == 1:
        held = [*candidates, *more_plain(trainer, {candidate.prompt.id for candidate in candidates})]
        ids = [encode_prompt(trainer.tokenizer, candidate.prompt.messages) for candidate in held]
        trainer.state.anchors = find_anchors(held, ids)
    exact = [candidate for candidate in candidates if candidate.prompt.task == "exact"]
    decided: dict[str, Any] = {"round": number, "candidates": len(candidates), "acquisition": targeting.acquisition}
    outlook = None
    if targeting.acquisition in BY_ANSWERS or targeting.update == "targeted" or targeting.gate:
        outlook = _outlook(trainer, exact, labels)
    if outlook is not None:
        decided |= {"flip_rate": trainer.flip_rate, "spread": outlook.model.spread}
        decided["outliers"] = count_outliers(stage.path, outlook.table, exact)
    rng = numpy_rng(config.seed, "rl", "choose", number)
    count = _affordable(trainer)
    pairs_wanted = round(count * targeting.preference_share) if _has_open(trainer) else 0
    compares = _has_open(trainer) and targeting.preference_share > 0  # also when this round's labels are paid already
    compared = open_candidates(trainer, candidates) if compares else []
    taster = fit_taste(trainer, compared, labels) if compares else None

    def choose() -> list[Question]:
        pairs = ask_pairs(trainer, compared, taster, labels, pairs_wanted, rng)
        chosen = pairs.questions
        decided.update(pairs.decided)
        chosen += VerdictChooser(trainer, exact, outlook, labels, rng, decided).choose(count - len(chosen))
        if "labels_stopped" in decided:  # what is left is handed back, comparisons included
            chosen = []
        asked = {question.prompt.id for question in chosen}
        new = Archive(inputs.pool)
        for candidate in {c.prompt.id: c for c in [*candidates, *compared]}.values():
            if candidate.prompt.id in asked or before.right_answer(candidate.prompt.id) is not None:
                new.add(candidate.rollouts, number)
        stage.write_jsonl(samples_file(number), new.rows())
        stage.write_json(decisions_file(number), decided)
        return chosen

    questions = settle_questions(stage, f"round_{number:02d}_questions.jsonl", choose)
    decided = trainer.decisions(number)  # as it was decided, by whichever start
    bought = inputs.ledger.ask(questions, inputs.labeler)
    labels = [label for label in inputs.ledger.labels() if label.round <= number]
    knowledge = Knowledge(labels)
    _note_pass_rates(trainer, candidates, knowledge)
    if targeting.update == "targeted":
        _note_outlook(trainer, exact, labels, knowledge)
    _note_looks(trainer, exact, knowledge)
    decided |= note_taste(trainer, compared, taster, labels)
    stage.write_json(decisions_file(number), decided | _outcome(trainer, questions, bought, labels, knowledge))


def _affordable(trainer: Round) -> int:
    """Return how many labels the round may buy: an equal share of what is left, or a fixed share, and all at the end.

    Labels bought early are learned from in every later step, and what they tell is about samples of a policy that has
    not yet learned from its own mistakes. None after a round in which a rule stopped the buying.
    """
    if any("labels_stopped" in trainer.decisions(number) for number in range(1, trainer.state.round)):
        return 0
    left, rounds = trainer.inputs.ledger.remaining, trainer.config.rl.rounds - trainer.state.round + 1
    share = trainer.config.targeting.round_share
    return int(left // rounds) if not share or rounds == 1 else math.ceil(left * share - 1e-9)


def _outlook(trainer: Round, candidates: Sequence[Candidate], labels: Sequence[Label]) -> Outlook | None:
    """Fit the answer model to the labels so far and look at the candidates; None where no sample has an answer."""
    prompts = [candidate.prompt for candidate in candidates]
    texts = [texts_of(candidate.rollouts) for candidate in candidates]
    judge = trainer.new_judge()
    if judge is None or not any(texts):
        return None
    judge.whiten_on(prompts, texts)
    if trainer.state.round == 1:
        labelled = [prompt for prompt in trainer.inputs.pool if trainer.inputs.archive.sampled(prompt.id)]
        first = [trainer.inputs.archive.sampled(prompt.id)[0] for prompt in labelled]
        judge.note_reference([*labelled, *prompts], [*first, *texts])
    judge = trainer.fit_judge(labels)
    assert judge is not None and judge.model is not None
    table = judge.table(prompts, texts, [len(candidate.rollouts) for candidate in candidates])
    return look(table, judge.model, trainer.config.rl.samples_per_prompt)


def _note_pass_rates(trainer: Round, candidates: Sequence[Candidate], knowledge: Knowledge) -> None:
    for candidate in candidates:
        rate = candidate.pass_rate(knowledge) if candidate.prompt.task == "exact" else None
        if rate is not None:
            trainer.state.pass_rates[candidate.prompt.id] = rate


def _note_looks(trainer: Round, candidates: Sequence[Candidate], knowledge: Knowledge) -> None:
    """Note what the candidates' samples say of their pass rates, and refit the label-free prior to all labels."""
    state, least = trainer.state, trainer.config.targeting.least_trust
    for candidate in candidates:
        name = candidate.prompt.id
        verified = knowledge.right_answer(name) is not None
        expected = None if verified else expected_rate(state.outlook, name, least)
        note_samples(state, name, candidate.rollouts, knowledge, expected)
    refit_prior(state)


def _note_outlook(
    trainer: Round, candidates: Sequence[Candidate], labels: Sequence[Label], knowledge: Knowledge
) -> None:
    """Note what the model expects, after the round's labels, of every candidate that no label decides."""
    trainer.inputs.archive.load(trainer.stage.path / samples_file(trainer.state.round))
    judge = trainer.fit_judge(labels)
    open_ = [candidate for candidate in candidates if knowledge.right_answer(candidate.prompt.id) is None]
    trainer.judge = judge  # `prepare` needs the same
    if judge is None or not open_:
        return
    rng = numpy_rng(trainer.config.seed, "rl", "outlook", trainer.state.round)
    judged = judge.judge([c.prompt for c in open_], [c.rollouts for c in open_], rng)
    for candidate, judgement in zip(open_, judged, strict=True):
        trainer.state.outlook[candidate.prompt.id] = float(np.mean(judgement.rewards)), max(judgement.trust)


def _outcome(
    trainer: Round,
    questions: Sequence[Question],
    bought: Sequence[Label],
    labels: Sequence[Label],
    knowledge: Knowledge,
) -> dict[str, Any]:
    """Return what a round bought and what it says now, and tell it."""
    number, state = trainer.state.round, trainer.state
    verdicts = [label for label in bought if label.kind == "verdict"]
    right = sum(label.outcome == "right" for label in verdicts)
    rates = list(state.pass_rates.values())
    error, pairs = flip_rate(labels)
    if trainer.judge is not None:
        error = trainer.flip_rate
    decided_by_labels = knowledge.verifiable_prompts()
    held = {anchor.prompt_id for anchor in state.anchors}.union(decided_by_labels)
    least = trainer.config.targeting.least_trust
    trusted = sum(name not in held and trust >= least for name, (_, trust) in state.outlook.items())
    found: dict[str, Any] = {
        "labels_bought": len(bought),
        "verdicts": len(verdicts),
        "right": right,
        "preferences": len(bought) - len(verdicts),
        "budget_left": max(0.0, trainer.inputs.ledger.budget - sum(label.cost for label in labels)),
        "verifiable_prompts": len(decided_by_labels),
        "mixed": sum(0 < rate < 1 for rate in rates),
        "frontier": describe_frontier(state, trainer.pool, trainer.config.rl.samples_per_prompt),
        "judged_with_trust": trusted,
        "repeated_verdicts": pairs,
        "estimated_flip_rate": error,
        "anchors": len(state.anchors),
        "questions": [{"kind": q.kind, "prompt": q.prompt.id, "answer": q.answer, "why": q.why} for q in questions],
    }
    log.info(
        "round %d: %d verdicts bought (%d right), %d preferences, %g labels left; %d prompts can be verified, %d of "
        "them with mixed samples; %d more are judged with trust; %d of %d seen are probably mastered, %d hopeless",
        number, len(verdicts), right, found["preferences"], trainer.inputs.ledger.remaining,
        found["verifiable_prompts"], found["mixed"], trusted,
        found["frontier"]["mastered"], found["frontier"]["seen"], found["frontier"]["hopeless"],
    )  # fmt: skip
    return found


def _has_open(trainer: Round) -> bool:
    return any(prompt.task == "open" for prompt in trainer.inputs.pool)
