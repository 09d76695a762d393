"""Which verdicts a round asks for: gate, acquisition, a uniform slice (a test of trust), repeats (noise)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from trlhf.config import TargetingConfig
from trlhf.knowledge import Knowledge
from trlhf.rl.answer_table import AnswerTable
from trlhf.rl.judge import DRAWS, settled
from trlhf.targeting.acquisition import d_optimal_batch, query_information, top_batch, v_optimal_batch
from trlhf.targeting.answers import AnswerModel
from trlhf.targeting.baselines import apl_scores, double_thompson, least_agreed_scores, max_entropy_scores
from trlhf.targeting.choose import Candidate
from trlhf.targeting.frontier import frontier_value
from trlhf.targeting.gate import FEWEST_USUAL, OUTLIER_PERCENTILE, gate, mahalanobis_distances, outlier_bound
from trlhf.targeting.targets import balanced_target
from trlhf.targeting.trust import TrustTest, trust_test
from trlhf.types import Label, Prompt, Question, Rollout

UNIFORM, REPEAT = "uniform", "repeat"
FRONTIER_VALUE = 0.2  # least P(a group is mixed) of a prompt on the frontier


@dataclass(frozen=True)
class Chosen:
    """A verdict to ask for, and what was expected of it.

    Attributes:
        question: what is asked.
        part: ``targeted``, ``uniform`` or ``repeat``.
        probability: P(right) before it was asked; None for repeats.
        value: what it is predicted to resolve, in prompts of the frontier; None where the acquisition does not say.
    """

    question: Question
    part: str
    probability: float | None = None
    value: float | None = None

    def row(self) -> dict[str, Any]:
        """Return what is written down before the question is asked, so that the prediction can be tested."""
        asked = self.question
        return {
            "prompt_id": asked.prompt.id,
            "answer": asked.answer,
            "repeat": asked.repeat,
            "part": self.part,
            "probability": None if self.probability is None else settled(self.probability),
            "value": None if self.value is None else settled(self.value),
        }


@dataclass
class Outlook:
    """What the candidates of a round look like before anything is asked.

    Attributes:
        table: their answers.
        model: says which of them are right.
        probabilities: P(right) of each answer, [C].
        mixed: U of each prompt of the table: P(a group of samples is mixed), [P].
        refused: reason of the gate → ids of the prompts refused for it.
        implicit: β·log π/π_ref of a response with each answer, [C]; only for APL.
    """

    table: AnswerTable
    model: AnswerModel
    probabilities: Float[ndarray, " C"]
    queries: Float[ndarray, "C Q"]
    mixed: Float[ndarray, " P"]
    refused: dict[str, list[str]] = field(default_factory=dict)
    implicit: Float[ndarray, " C"] | None = None


def look(table: AnswerTable, model: AnswerModel, group: int) -> Outlook:
    """Return the outlook on some candidates; U(x) = Σ_c P(c is right)·P(mixed | c is right).

    Given that c is right, the pass rate is Beta(1 + n_c, 1 + k - n_c) after k samples of which n_c end in c.
    """
    queries, p = model.queries(table.answers)
    number = table.answers.prompts
    mixed = frontier_value(1 + table.counts, 1 + table.samples[number] - table.counts, group)
    value = np.bincount(number, p * mixed, minlength=len(table.places))
    return Outlook(table, model, p, queries, value)


def may_be_asked(
    outlook: Outlook,
    candidates: Sequence[Candidate],
    knowledge: Knowledge,
    config: TargetingConfig,
    sound: Sequence[str],
) -> Bool[ndarray, " C"]:
    """Return which answers a verdict may be bought on, and note in ``outlook.refused`` what the gate refuses.

    Args:
        outlook: on the candidates.
        candidates: the table's places are indices into them.
        knowledge: answers whose truth is known are not asked about.
        config: ``gate`` and ``label_prompts`` matter.
        sound: ids of prompts that are known to be sound: those that have a right answer; their answers are the gate's
            measure of what is usual.
    """
    table = outlook.table
    ids = [candidates[place].prompt.id for place in table.places]
    number = table.answers.prompts
    open_ = np.array(
        [knowledge.right_answer(ids[p]) is None and knowledge.known(ids[p], name) is None
         for p, name in zip(number, table.names, strict=True)], bool,
    )  # fmt: skip
    if config.label_prompts == "frontier":
        open_ &= (outlook.mixed >= FRONTIER_VALUE)[number]
    if not config.gate:
        return open_
    usual = np.isin(number, [n for n, name in enumerate(ids) if name in set(sound)])
    distances, bound = None, None
    if len(set(number[usual].tolist())) >= FEWEST_USUAL:
        distances = mahalanobis_distances(table.answers.features, table.answers.features[usual])
        bound = outlier_bound(table.answers.features[usual], OUTLIER_PERCENTILE, number[usual])
    tokens = [rollout.token_ids for rollout in typical_rollouts(table, candidates)]
    reasons = gate(tokens, [True] * len(tokens), distances, bound)
    for row, reason in enumerate(reasons):
        if reason is not None and open_[row]:
            refused = outlook.refused.setdefault(reason.split(":")[0], [])
            if ids[number[row]] not in refused:
                refused.append(ids[number[row]])
            open_[row] = False
    return open_


def choose_targeted(
    outlook: Outlook,
    allowed: Bool[ndarray, " C"],
    candidates: Sequence[Candidate],
    count: int,
    acquisition: str,
    flip_rate: float,
    rng: np.random.Generator,
    number: int,
) -> list[Chosen]:
    """Choose ``count`` verdicts by an acquisition, one a prompt.

    The V-optimal score is in prompts of the frontier. Each prompt counts U(x) in the target, T = Σ_x U(x)·T_x/tr(T_xΣ),
    so that a(q) = Σ_x U(x)·(share of the variance on x that the label removes), and no prompt counts for more because
    its answers look unusual; to this comes U(x)·(n_c/k)·4q(1-q), what the label settles on its own prompt.
    """
    table, p = outlook.table, outlook.probabilities
    rows = np.flatnonzero(allowed)
    if not len(rows) or count < 1:
        return []
    groups = table.answers.prompts[rows]
    kinds = [candidates[table.places[g]].prompt.kind for g in groups]
    share = table.counts[rows] / table.samples[groups]
    values: list[float | None]
    if acquisition in ("v_optimal", "scrambled", "d_optimal"):
        covariance = outlook.model.covariance
        information = query_information(p[rows], flip_rate)
        queries, costs = outlook.queries[rows], np.ones(len(rows))
        if acquisition == "scrambled":  # the same scores on the wrong questions
            order = rng.permutation(len(rows))
            information, queries = information[order], queries[order]
        if acquisition == "d_optimal":
            batch = d_optimal_batch(queries, information, covariance, costs, groups, count, 1)
        else:
            all_rows = table.answers.design()[: len(table.names)]
            target = balanced_target(all_rows, table.answers.prompts, table.counts, outlook.mixed, covariance)
            own = outlook.mixed[groups] * share * 4 * p[rows] * (1 - p[rows])
            own = own[order] if acquisition == "scrambled" else own
            batch = v_optimal_batch(queries, information, covariance, target, costs, groups, count, 1, own)
            batch = batch._replace(values=batch.values + own[batch.picks])
        picks, values = batch.picks, list(batch.values)
    elif acquisition == "double_thompson":
        draws = outlook.model.draws(table.answers, DRAWS, rng).T
        picks = double_thompson(draws[:, rows], groups, count, rng)
        values = [None] * len(picks)
    else:
        if acquisition == "max_entropy":
            scores = max_entropy_scores(p[rows])
        elif acquisition == "least_agreed":
            top = np.zeros(len(table.places))
            np.maximum.at(top, groups, share)
            scores = np.where(share >= top[groups], least_agreed_scores(top[groups]), -np.inf)
        elif acquisition == "apl":
            scores = _apl(outlook, candidates, rows, count)
        else:
            raise ValueError(f"choose_targeted: acquisition={acquisition!r} chooses no answers of a table")
        picks = top_batch(scores, groups, kinds, count, 1)
        values = [None] * len(picks)
    return [
        _chosen(outlook, candidates, int(rows[pick]), acquisition, value, number)
        for pick, value in zip(picks, values, strict=True)
    ]


def _apl(
    outlook: Outlook, candidates: Sequence[Candidate], rows: Int[ndarray, " n"], count: int
) -> Float[ndarray, " n"]:
    """Return APL's scores, made for pairs, of verdicts: the answer that the implicit reward prefers, by its lead.

    The predictive entropy of a prompt is the mean of -log π over its samples. Before the first update the implicit
    reward is 0 everywhere, and entropy alone decides.
    """
    assert outlook.implicit is not None, "apl needs implicit rewards"
    number = outlook.table.answers.prompts
    rollouts = [candidates[place].rollouts for place in outlook.table.places]
    entropy = np.array([-np.mean([sum(r.logprobs) for r in sampled]) for sampled in rollouts])[number[rows]]
    lead = np.zeros(len(rows))
    for n, row in enumerate(rows):
        others = np.flatnonzero((number == number[row]) & (np.arange(len(number)) != row))
        lead[n] = outlook.implicit[row] - max(outlook.implicit[others], default=outlook.implicit[row])
    answers = len(rows) / len(set(number[rows].tolist()))  # of one prompt, on average
    kept = max(0.5, min(1.0, 2 * count * answers / len(rows)))  # of the answers; enough for all that are to be asked
    return apl_scores(entropy, np.maximum(lead, 0) + 1e-9 * entropy, kept)


def choose_repeats(
    labels: Sequence[Label], prompts: Mapping[str, Prompt], count: int, rng: np.random.Generator, number: int
) -> list[Chosen]:
    """Choose at random, among the verdicts asked once, some to be asked again: how often do answers differ?"""
    asked = Counter((x.prompt_id, x.answer) for x in labels if x.kind == "verdict")
    once = [x for x in labels if x.kind == "verdict" and asked[x.prompt_id, x.answer] == 1 and x.prompt_id in prompts]
    why = "repeat: asked once before, to measure how often answers differ"
    return [
        Chosen(
            Question("verdict", prompts[once[i].prompt_id], once[i].responses, once[i].answer, why, number, 1), REPEAT
        )
        for i in rng.permutation(len(once))[:count]
    ]


def flip_rate(labels: Sequence[Label], prior: float = 0.02, weight: float = 25.0) -> tuple[float, int]:
    """Estimate the chance ε that a verdict is flipped from those that were asked twice; return it and their number.

    Two answers to one question differ with probability 2ε(1-ε). The share of differing pairs is shrunk towards that of
    ``prior``, which counts as ``weight`` pairs, and is held within [0.005, 0.45].
    """
    outcomes: dict[tuple[str, str | None], list[str]] = {}
    for label in labels:
        if label.kind == "verdict":
            outcomes.setdefault((label.prompt_id, label.answer), []).append(label.outcome)
    pairs = [found[:2] for found in outcomes.values() if len(found) > 1]
    differing = sum(a != b for a, b in pairs)
    share = (differing + weight * 2 * prior * (1 - prior)) / (len(pairs) + weight)
    return float(np.clip((1 - np.sqrt(max(0.0, 1 - 2 * share))) / 2, 0.005, 0.45)), len(pairs)


def check_uncertainty(predictions: Sequence[Mapping[str, Any]], labels: Sequence[Label]) -> TrustTest:
    """Test, on the verdicts that chance chose, whether the uncertainty before they were bought foretold the error.

    The error is whether the likelier outcome failed to come, 0 or 1. (|outcome - p| would be larger for uncertain
    predictions whatever they are worth: with mostly right answers it passes p shuffled over the questions.)
    """
    told = {(x.prompt_id, x.answer): float(x.outcome == "right") for x in labels if x.kind == "verdict"}
    rows = [x for x in predictions if x["part"] == UNIFORM and (x["prompt_id"], x["answer"]) in told]
    p = np.array([x["probability"] for x in rows], float)
    y = np.array([told[x["prompt_id"], x["answer"]] for x in rows], float)
    return trust_test(np.sqrt(p * (1 - p)), ((p > 0.5) != (y > 0.5)).astype(float))


def _chosen(
    outlook: Outlook, candidates: Sequence[Candidate], row: int, acquisition: str, value: float | None, number: int
) -> Chosen:
    table = outlook.table
    group = table.answers.prompts[row]
    prompt, answer, p = candidates[table.places[group]].prompt, table.names[row], float(outlook.probabilities[row])
    why = (
        f"{acquisition}: answer {answer!r} has {table.counts[row]} of {table.samples[group]} samples, "
        f"P(right) {p:.2f}, P(mixed group) {outlook.mixed[group]:.2f}"
    )
    why += "" if value is None else f", resolves {value:.2f} prompts"
    return Chosen(Question("verdict", prompt, (table.texts[row],), answer, why, number), "targeted", p, value)


def typical_rollouts(table: AnswerTable, candidates: Sequence[Candidate]) -> list[Rollout]:
    """Return for each answer the sample whose text the table holds, [C]."""
    owners = [candidates[table.places[n]] for n in table.answers.prompts]
    return [
        next(rollout for rollout in owner.rollouts if rollout.text == text)
        for owner, text in zip(owners, table.texts, strict=True)
    ]
