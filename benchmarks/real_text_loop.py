"""Buy verdicts on real solutions by one arm, and measure after every budget what was learned on held-out questions.

Acquisition, gate, answer model and the reward stage's heads are the library's own; only the policy is missing, whose
samples the real solutions stand for.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from real_text_data import Solutions, features_of

from trlhf.config import Acquisition, TargetingConfig
from trlhf.evaluation.statistics import auc, within_group_auc
from trlhf.knowledge import Knowledge
from trlhf.reward.heads import EnsembleHeads
from trlhf.reward.solve import fit_heads, pose
from trlhf.reward.table import LabelTable, bootstrap_weights
from trlhf.rl.answer_table import AnswerTable
from trlhf.rl.ask import Outlook, choose_targeted, look, may_be_asked
from trlhf.rl.judge import AnswerJudge, texts_of, verdicts_of
from trlhf.seeding import numpy_rng
from trlhf.targeting.answers import FLIP_RATE
from trlhf.targeting.choose import Candidate, choose_verdicts
from trlhf.types import Label, Question

FIRST = 16  # verdicts at random, the same for every arm of a split
GROUP = 4  # solutions of a question
Measure = dict[str, float | None]


@dataclass(frozen=True)
class Arm:
    """A way to choose verdicts.

    Attributes:
        acquisition: ``solutions``: random solutions; ``uniform``: as the library, top answers of random questions; else
            an acquisition of the library.
        gate: refuse repetitive and outlying solutions.
        label_prompts: ``frontier``: only questions whose solutions are probably mixed.
    """

    acquisition: Acquisition | Literal["solutions"]
    gate: bool = True
    label_prompts: Literal["pool", "frontier"] = "pool"


UNIFORM = "uniform"
ARMS = {
    UNIFORM: Arm("solutions", gate=False),
    "uniform, gate": Arm("solutions"),
    "uniform, top answers": Arm("uniform", gate=False),
    "v_optimal": Arm("v_optimal"),
    "v_optimal, no gate": Arm("v_optimal", gate=False),
    "v_optimal, frontier": Arm("v_optimal", label_prompts="frontier"),
    "d_optimal": Arm("d_optimal"),
    "d_optimal, no gate": Arm("d_optimal", gate=False),
    "max_entropy": Arm("max_entropy"),
    "max_entropy, no gate": Arm("max_entropy", gate=False),
    "scrambled": Arm("scrambled"),
}


@dataclass(frozen=True)
class Settings:
    """How verdicts are bought and what is measured when.

    Attributes:
        budgets: verdicts after which is measured, rising; the first is `FIRST` or more.
        batch: verdicts bought between two fits at most; never more than are there already, so that they double as in
            the rounds of a run.
        held_out: questions to evaluate on.
        pooling: which hidden states, see `real_text_data.POOLINGS`.
        dimension: principal components of them.
        heads: of the reward stage's model; 0: it is not fitted.
        heads_budgets: budgets after which it is.
        heads_arms: arms for which it is.
    """

    budgets: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
    batch: int = 512
    held_out: int = 400
    pooling: str = "forks"
    dimension: int = 512
    heads: int = 0
    heads_budgets: tuple[int, ...] = ()
    heads_arms: tuple[str, ...] = (UNIFORM, "v_optimal")


def learn(solutions: Solutions, arms: Mapping[str, Arm], settings: Settings, seed: int) -> dict[str, list[Measure]]:
    """Return what is measured after each budget, by arm.

    ``seed`` decides the split, the first verdicts, which all arms share, and every draw.
    """
    held_in, held_out = solutions.split(settings.held_out, seed)
    everything = [*held_in, *held_out]
    features = features_of(solutions, held_in, settings.pooling, settings.dimension)
    found: dict[str, list[Measure]] = {}
    with tempfile.TemporaryDirectory() as folder:

        def new_judge() -> AnswerJudge:
            return AnswerJudge(lambda prompts, texts: features[solutions.places(prompts, texts)], Path(folder))

        judge = new_judge()
        judge.whiten_on([c.prompt for c in held_in], [texts_of(c.rollouts) for c in held_in])
        judge.note_reference([c.prompt for c in everything], [texts_of(c.rollouts) for c in everything])
        judge.load()
        rng = numpy_rng(seed, "real text", "first")
        first = [solutions.buy(question) for question in choose(judge, held_in, (), ARMS[UNIFORM], FIRST, rng)]
        for name, arm in arms.items():
            judge, labels = new_judge(), list(first)
            judge.load()
            fit(judge, held_in, labels)
            rng = numpy_rng(seed, "real text", "choose")
            found[name] = []
            for budget in settings.budgets:
                while len(labels) < budget:
                    count = min(budget - len(labels), settings.batch, len(labels))
                    asked = choose(judge, held_in, labels, arm, count, rng)
                    if not asked:
                        break
                    labels += [solutions.buy(question) for question in asked]
                    fit(judge, held_in, labels)
                row = measure(judge, solutions, held_out) | {"labels": float(len(labels))}
                row["decided"] = float(len(Knowledge(labels).verifiable_prompts()))
                row["right"] = sum(label.outcome == "right" for label in labels) / len(labels)
                if settings.heads and name in settings.heads_arms and budget in settings.heads_budgets:
                    row |= measure_heads(solutions, held_in, held_out, labels, settings.heads, seed)
                found[name].append(row)
    return found


def fit(judge: AnswerJudge, held_in: Sequence[Candidate], labels: Sequence[Label]) -> None:
    """Fit the answer model to all verdicts so far."""
    verdicts = verdicts_of(labels)
    judged = [c for c in held_in if c.prompt.id in verdicts]
    judge.fit([c.prompt for c in judged], [[texts_of(c.rollouts)] for c in judged], verdicts, FLIP_RATE)


def choose(
    judge: AnswerJudge,
    held_in: Sequence[Candidate],
    labels: Sequence[Label],
    arm: Arm,
    count: int,
    rng: np.random.Generator,
) -> list[Question]:
    """Choose verdicts on answers that no label decides, at most one a question."""
    knowledge = Knowledge(labels)
    if arm.acquisition == "uniform":
        return choose_verdicts(held_in, knowledge, count, None, GROUP, rng)
    if judge.model is None:
        fit(judge, held_in, ())
    assert judge.model is not None
    outlook = look(table_of(judge, held_in), judge.model, GROUP)
    targeting = TargetingConfig(gate=arm.gate, label_prompts=arm.label_prompts)
    allowed = may_be_asked(outlook, held_in, knowledge, targeting, knowledge.verifiable_prompts())
    if arm.acquisition == "solutions":
        return choose_solutions(outlook, allowed, held_in, count, rng)
    found = choose_targeted(outlook, allowed, held_in, count, arm.acquisition, FLIP_RATE, rng, 0)
    return [chosen.question for chosen in found]


def choose_solutions(
    outlook: Outlook, allowed: Bool[ndarray, " C"], held_in: Sequence[Candidate], count: int, rng: np.random.Generator
) -> list[Question]:
    """Choose solutions at random, at most one a question."""
    table = outlook.table
    taken: dict[int, Question] = {}
    for row in rng.permutation(np.repeat(np.flatnonzero(allowed), table.counts[allowed])).tolist():
        number = int(table.answers.prompts[row])
        if number not in taken:
            prompt = held_in[table.places[number]].prompt
            taken[number] = Question("verdict", prompt, (table.texts[row],), table.names[row], "a random solution")
        if len(taken) == count:
            break
    return list(taken.values())


def table_of(judge: AnswerJudge, candidates: Sequence[Candidate]) -> AnswerTable:
    """Return the answers of some questions."""
    texts = [texts_of(c.rollouts) for c in candidates]
    return judge.table([c.prompt for c in candidates], texts, [len(c.rollouts) for c in candidates])


def measure(judge: AnswerJudge, solutions: Solutions, held_out: Sequence[Candidate]) -> Measure:
    """Return how well the answer model tells right from wrong solutions of held-out questions.

    ``auc`` over all and ``within`` questions, of P(right), which knows how many solutions agree; ``features_within`` of
    w·φ alone, which knows only what the labels taught of the hidden states. (Over all, w·φ means nothing: the model
    compares answers to one question.)
    """
    assert judge.model is not None, "fit first"
    table = table_of(judge, held_out)
    by_answer = {
        (held_out[table.places[n]].prompt.id, name): row
        for row, (n, name) in enumerate(zip(table.answers.prompts, table.names, strict=True))
    }
    rollouts = [rollout for c in held_out for rollout in c.rollouts if rollout.answer is not None]
    rows = [by_answer[rollout.prompt_id, rollout.answer or ""] for rollout in rollouts]
    right = [solutions.truth(rollout) for rollout in rollouts]
    questions = [rollout.prompt_id for rollout in rollouts]
    agreed = judge.model.probabilities(table.answers)[rows]
    features = (table.answers.features @ judge.model.mean[2:])[rows]
    return {
        "auc": auc(agreed, right),
        "within": within_group_auc(agreed, right, questions),
        "features_within": within_group_auc(features, right, questions),
    }


def measure_heads(
    solutions: Solutions,
    held_in: Sequence[Candidate],
    held_out: Sequence[Candidate],
    labels: Sequence[Label],
    count: int,
    seed: int,
) -> Measure:
    """Return the same of the reward stage's model, fitted to all held-in solutions that the verdicts decide."""
    knowledge = Knowledge(labels)
    rows, verdicts, groups = [], [], []
    for number, candidate in enumerate(held_in):
        for rollout in candidate.rollouts:
            known = knowledge.known(rollout.prompt_id, rollout.answer)
            if known is not None and rollout.answer is not None:
                rows.append(solutions.rows[rollout.prompt_id, rollout.text])
                verdicts.append(float(known))
                groups.append(number)
    seen, lengths = solutions.pooled[torch.tensor(rows)], [solutions.lengths[row] for row in rows]
    heads = EnsembleHeads(seen.response.shape[1], seen.prompt.shape[1], count, 1.0, seed)
    heads.standardise_on(seen, lengths)
    none, numbers = torch.zeros(0, dtype=torch.long), torch.tensor(np.unique(groups, return_inverse=True)[1])
    table = LabelTable(torch.arange(len(rows)), torch.tensor(verdicts), none, none, torch.zeros(0), numbers)
    fit_heads(heads, pose(heads, seen, lengths, table, FLIP_RATE), bootstrap_weights(numbers, count, seed), seed)
    rollouts = [rollout for c in held_out for rollout in c.rollouts if rollout.answer is not None]
    new = solutions.pooled[torch.tensor([solutions.rows[rollout.prompt_id, rollout.text] for rollout in rollouts])]
    with torch.no_grad():
        scores, intercepts = heads.scores(new).mean(1).numpy(), heads.intercepts(new).mean(1).numpy()
    right = [solutions.truth(rollout) for rollout in rollouts]
    return {
        "heads_auc": auc(scores + intercepts, right),
        "heads_within": within_group_auc(scores, right, [rollout.prompt_id for rollout in rollouts]),
    }


def agreement(solutions: Solutions, held_out: Sequence[Candidate]) -> Measure:
    """Return the same of the share of a question's solutions that give the answer: what no verdict is needed for."""
    rollouts, shares = [], []
    for candidate in held_out:
        counts = Counter(rollout.answer for rollout in candidate.rollouts)
        found = [rollout for rollout in candidate.rollouts if rollout.answer is not None]
        rollouts += found
        shares += [counts[rollout.answer] / len(candidate.rollouts) for rollout in found]
    right = [solutions.truth(rollout) for rollout in rollouts]
    return {
        "auc": auc(shares, right),
        "within": within_group_auc(shares, right, [rollout.prompt_id for rollout in rollouts]),
    }


def curves(cells: Mapping[tuple[str, int], Sequence[Measure]], arm: str, metric: str) -> Float[ndarray, "S B"]:
    """Return a metric by split and budget, NaN where it was not measured; splits in rising order."""
    seeds = sorted(seed for name, seed in cells if name == arm)
    return np.array([[_number(row.get(metric)) for row in cells[arm, seed]] for seed in seeds], float)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
