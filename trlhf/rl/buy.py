"""The first half of a round: candidates → what to ask → labels, with every decision written down in words."""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Sequence
from typing import Any

import numpy as np

from trlhf import files
from trlhf.console import progress as progress_bar
from trlhf.knowledge import Knowledge
from trlhf.labelling import Archive, settle_questions
from trlhf.models import encode_prompt
from trlhf.rl.anchors import find_anchors
from trlhf.rl.ask import (
    UNIFORM,
    Chosen,
    Outlook,
    check_uncertainty,
    choose_repeats,
    choose_targeted,
    flip_rate,
    look,
    may_be_asked,
    typical_rollouts,
)
from trlhf.rl.ask_pairs import ask_pairs, fit_taste, implicit_rewards, note_taste, open_candidates
from trlhf.rl.frontier import describe_frontier, draw_candidates, expected_rate, note_samples, refit_prior
from trlhf.rl.judge import settled, texts_of
from trlhf.rl.label_gain import label_gains, two_predictions
from trlhf.rl.outliers import count_outliers
from trlhf.rl.round import Round, decisions_file, samples_file
from trlhf.rollout import Sampling, sample_responses
from trlhf.seeding import numpy_rng, python_rng, torch_generator
from trlhf.targeting import Candidate, choose_verdicts, fit_top_answer_model
from trlhf.targeting.stopping import held_out_gain_covers_zero, labels_buy_too_little
from trlhf.targeting.trust import TrustTest
from trlhf.types import Label, Prompt, Question

log = logging.getLogger("trlhf")
BY_ANSWERS = ("v_optimal", "d_optimal", "max_entropy", "double_thompson", "apl", "least_agreed", "scrambled")
LEAST_TESTED = 16  # uniform verdicts from which the uncertainty is tested; before, it is taken on credit


def predictions_file(number: int) -> str:
    """Return the name of the file with what was predicted of a round's verdicts before they were bought."""
    return f"round_{number:02d}_predictions.jsonl"


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
        wanted = count - len(chosen)
        if targeting.acquisition in BY_ANSWERS and outlook is not None:
            verdicts = _choose_verdicts(trainer, exact, outlook, before, labels, wanted, decided, rng)
            stage.write_jsonl(predictions_file(number), [verdict.row() for verdict in verdicts])
            chosen += [verdict.question for verdict in verdicts]
        else:
            sound = _behind_the_gate(trainer, exact, outlook, before, decided)
            chosen += _choose_simply(trainer, sound, before, labels, wanted, decided, rng)
        asked = {question.prompt.id for question in chosen}
        new = Archive(inputs.pool)
        for candidate in {c.prompt.id: c for c in [*candidates, *compared]}.values():
            if candidate.prompt.id in asked or before.right_answer(candidate.prompt.id) is not None:
                new.add(candidate.rollouts, number)
        stage.write_jsonl(samples_file(number), new.rows())
        stage.write_json(decisions_file(number), decided)
        return chosen

    questions = settle_questions(stage, f"round_{number:02d}_questions.jsonl", choose)
    decided = _read_round(trainer, number)  # as it was decided, by whichever start
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
    not yet learned from its own mistakes.
    """
    left, rounds = trainer.inputs.ledger.remaining, trainer.config.rl.rounds - trainer.state.round + 1
    share = trainer.config.targeting.round_share
    return int(left // rounds) if not share or rounds == 1 else math.ceil(left * share - 1e-9)


def _choose_simply(
    trainer: Round,
    candidates: Sequence[Candidate],
    before: Knowledge,
    labels: Sequence[Label],
    count: int,
    decided: dict[str, Any],
    rng: np.random.Generator,
) -> list[Question]:
    """Choose verdicts on top answers: at random, or by P(right) and P(mixed group)."""
    targeting = trainer.config.targeting
    coefficients = None
    if targeting.acquisition == "frontier":
        shares, right = trainer.inputs.archive.shares(labels)
        coefficients = fit_top_answer_model(np.array(shares), np.array(right))
    decided["top_answer_model"] = None if coefficients is None else coefficients.tolist()
    if targeting.label_prompts == "frontier":
        candidates = [c for c in candidates if len({r.answer for r in c.rollouts}) > 1]
    group = trainer.config.rl.samples_per_prompt
    return choose_verdicts(candidates, before, count, coefficients, group, rng, trainer.state.round)


def _choose_verdicts(
    trainer: Round,
    candidates: Sequence[Candidate],
    outlook: Outlook,
    before: Knowledge,
    labels: Sequence[Label],
    count: int,
    decided: dict[str, Any],
    rng: np.random.Generator,
) -> list[Chosen]:
    """Choose verdicts by the answer model: targeted ones, a uniform slice, repeats; without trust, all at random."""
    targeting, number = trainer.config.targeting, trainer.state.round
    repeats = choose_repeats(
        labels, {p.id: p for p in trainer.pool}, round(count * targeting.repeat_share), rng, number
    )
    count -= len(repeats)
    test = _tested(trainer, labels)
    at_random = round(count * targeting.uniform_share)
    if test is not None and not test.passed:
        at_random = count
        decided["fallback"] = f"labels at random in this round: {test.words}"
    decided["trust_test"] = test.words if test else f"not tested yet: fewer than {LEAST_TESTED} uniform verdicts"
    uniform = _at_random(outlook, candidates, before, at_random, rng, number)
    taken = {verdict.question.prompt.id for verdict in uniform}
    allowed = may_be_asked(outlook, candidates, before, targeting, before.verifiable_prompts())
    names = [candidates[outlook.table.places[p]].prompt.id for p in outlook.table.answers.prompts]
    allowed &= np.array([name not in taken for name in names], bool)
    rest = count - len(uniform)
    if targeting.acquisition == "apl":
        owners = [candidates[outlook.table.places[n]].prompt for n in outlook.table.answers.prompts]
        outlook.implicit = implicit_rewards(trainer, owners, typical_rollouts(outlook.table, candidates))
    targeted = choose_targeted(
        outlook, allowed, candidates, rest, targeting.acquisition, trainer.flip_rate, rng, number
    )
    values = [verdict.value for verdict in targeted if verdict.value is not None]
    decided["refused_by_gate"] = {reason: len(ids) for reason, ids in outlook.refused.items()}
    decided["value_per_label"] = settled(float(np.mean(values))) if values else None
    decided["value_of_next_label"] = settled(values[-1]) if values else None
    earlier = [_read_round(trainer, n).get("value_per_label") for n in range(1, number)]
    drops = [value for value in [*earlier, decided["value_per_label"]] if value is not None]
    reason, left = None, int(trainer.inputs.ledger.remaining)
    if "labels_buy_too_little" in targeting.stop_rules:
        reason = labels_buy_too_little(drops, left)
    if "held_out_gain_covers_zero" in targeting.stop_rules:
        decided["uniform_slice"] = two_predictions(trainer, candidates, outlook, uniform, labels)
        reason = reason or held_out_gain_covers_zero(label_gains(trainer, labels), left)
    if reason is not None:
        decided["labels_stopped"] = reason
        log.warning("round %d: %s", number, reason)
        return []
    return [*targeted, *uniform, *repeats]


def _behind_the_gate(
    trainer: Round,
    candidates: Sequence[Candidate],
    outlook: Outlook | None,
    before: Knowledge,
    decided: dict[str, Any],
) -> Sequence[Candidate]:
    """Return the candidates without those that the gate refuses an answer of."""
    if outlook is None or not trainer.config.targeting.gate:
        return candidates
    may_be_asked(outlook, candidates, before, trainer.config.targeting, before.verifiable_prompts())
    decided["refused_by_gate"] = {reason: len(ids) for reason, ids in outlook.refused.items()}
    refused = {name for names in outlook.refused.values() for name in names}
    return [candidate for candidate in candidates if candidate.prompt.id not in refused]


def _tested(trainer: Round, labels: Sequence[Label]) -> TrustTest | None:
    """Test the uncertainty on the uniform verdicts of the rounds before; None as long as they are too few."""
    rows = []
    for number in range(1, trainer.state.round):
        path = trainer.stage.path / predictions_file(number)
        rows += files.read_jsonl(path) if path.exists() else []
    if sum(row["part"] == UNIFORM for row in rows) < LEAST_TESTED:
        return None
    return check_uncertainty(rows, labels)


def _at_random(
    outlook: Outlook,
    candidates: Sequence[Candidate],
    before: Knowledge,
    count: int,
    rng: np.random.Generator,
    number: int,
) -> list[Chosen]:
    """Choose prompts at random, and their top answers, with what the model predicts of them."""
    table = outlook.table
    place = {candidates[i].prompt.id: n for n, i in enumerate(table.places)}
    chosen = []
    for question in choose_verdicts(candidates, before, count, None, 2, rng, number):
        rows = np.flatnonzero(table.answers.prompts == place[question.prompt.id])
        row = next(n for n in rows if table.names[n] == question.answer)
        chosen.append(Chosen(question, UNIFORM, float(outlook.probabilities[row])))
    return chosen


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
    trusted = sum(trust >= trainer.config.targeting.least_trust for _, trust in state.outlook.values())
    found: dict[str, Any] = {
        "labels_bought": len(bought),
        "verdicts": len(verdicts),
        "right": right,
        "preferences": len(bought) - len(verdicts),
        "budget_left": max(0.0, trainer.inputs.ledger.budget - sum(label.cost for label in labels)),
        "verifiable_prompts": len(knowledge.verifiable_prompts()),
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


def _read_round(trainer: Round, number: int) -> dict[str, Any]:
    decided: dict[str, Any] = files.read_json(trainer.stage.path / decisions_file(number))
    return decided


def _has_open(trainer: Round) -> bool:
    return any(prompt.task == "open" for prompt in trainer.inputs.pool)


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
    sampling = Sampling.of(config.rl, config.targeting.samples_per_prompt)
    generator = torch_generator(config.seed, "rl", "candidates", number)
    title = f"round {number}: sampling candidates"
    with trainer.policy.acting() as model, progress_bar(title, len(prompts)) as advance:
        sampled = sample_responses(model, trainer.tokenizer, prompts, sampling, generator, advance)
    return [Candidate(prompt, tuple(rollouts)) for prompt, rollouts in zip(prompts, sampled, strict=True)]


def more_plain(trainer: Round, held: Container[str]) -> list[Candidate]:
    """Sample once prompts that need no thinking, as anchors: no reward watches over them."""
    config = trainer.config
    prompts = [p for p in trainer.pool if not p.reasoning and p.id not in held]
    most = min(config.targeting.candidates, len(prompts)) if config.rl.anchor_coef else 0
    if not most:
        return []
    prompts = python_rng(config.seed, "rl", "anchors").sample(prompts, most)
    sampling = Sampling.of(config.rl, 1)
    generator = torch_generator(config.seed, "rl", "anchors")
    with trainer.policy.acting() as model:
        sampled = sample_responses(model, trainer.tokenizer, prompts, sampling, generator)
    return [Candidate(prompt, tuple(rollouts)) for prompt, rollouts in zip(prompts, sampled, strict=True)]
