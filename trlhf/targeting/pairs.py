"""Which two responses to compare: at random, or by what the answer is expected to tell."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.special import expit

from trlhf.targeting.acquisition import d_optimal_batch, top_batch, v_optimal_batch
from trlhf.targeting.baselines import apl_scores, double_thompson_pair, max_entropy_scores
from trlhf.targeting.choose import Candidate
from trlhf.targeting.preferences import PreferenceModel
from trlhf.targeting.targets import balanced_target
from trlhf.types import Question

DRAWS = 64


class PairPick(NamedTuple):
    """A comparison to ask for.

    ``first``, ``second``: rows. ``probability`` that the first is preferred if there is no tie; ``told_apart``: P(no
    tie). ``value``: what the acquisition predicts; None where it does not say.
    """

    first: int
    second: int
    probability: float
    told_apart: float
    value: float | None


class Options(NamedTuple):
    """R distinct responses to P prompts, those of a prompt side by side.

    ``features`` [R, Q] as in `trlhf.targeting.preferences.Compared`; ``prompts`` [R]: number of each one's prompt;
    ``counts`` [R]: how many samples were this response; ``kinds`` [P]. ``asked``: two rows each, compared before, which
    are not asked for again.
    """

    features: Float[ndarray, "R Q"]
    prompts: Int[ndarray, " R"]
    counts: Int[ndarray, " R"]
    kinds: Sequence[str]
    asked: Collection[frozenset[int]] = frozenset()


def all_pairs(options: Options) -> tuple[Int[ndarray, " N"], Int[ndarray, " N"]]:
    """Return every two rows of one prompt."""
    pairs = [
        pair
        for x in range(len(options.kinds))
        for pair in combinations(np.flatnonzero(options.prompts == x).tolist(), 2)
    ]
    found = np.array(pairs, int).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def disagreement(options: Options, model: PreferenceModel) -> Float[ndarray, " P"]:
    """Return U of each prompt: P(a person tells two of its responses apart), averaged over pairs of samples.

    As for verdicts: where the samples of a group all are worth the same, nothing can be learned from them. Equal
    samples are never told apart.
    """
    first, second = all_pairs(options)
    number, weight = options.prompts[first], options.counts[first] * options.counts[second]
    samples = np.bincount(options.prompts, options.counts, len(options.kinds))
    apart = np.bincount(
        number, weight * model.told_apart(options.features[first], options.features[second]), len(options.kinds)
    )
    return np.asarray(apart / np.maximum(samples * (samples - 1) / 2, 1))


def pick_pairs(
    options: Options,
    model: PreferenceModel,
    acquisition: str,
    count: int,
    rng: np.random.Generator,
    entropy: Float[ndarray, " P"] | None = None,
    implicit: Float[ndarray, " R"] | None = None,
) -> list[PairPick]:
    """Pick ``count`` comparisons, one a prompt.

    With z = φ_A - φ_B, ω of `trlhf.targeting.preferences.information` (ties, flips and position bias count) and U of
    `disagreement`:

    - ``double_thompson``: the prompts of the largest U; on each, two responses that are each the best under a draw of θ
      (Dwaracherla et al. 2024).
    - ``v_optimal``: ω·zᵀΣTΣz/(1 + ω·zᵀΣz), T = Σ_x U(x)·T_x/tr(T_xΣ) over the samples. ``d_optimal``: ln(1 + ω·zᵀΣz).
    - ``max_entropy``: P(no tie)·H(p), spread over kinds. ``apl``: |difference of the implicit rewards|, on the half of
      the prompts with the largest entropy (on as many as there are labels, if these are more), so only with ``entropy``
      and ``implicit``.

    Which response is shown first is drawn at random, or a preference for the first place would look like taste.

    Args:
        options: the responses that may be asked about.
        model: of the labels so far.
        acquisition: one of the above.
        count: at most so many.
        rng: of draws and orders.
        entropy: predictive entropy of the policy on each prompt, in nats.
        implicit: β·log π/π_ref of each response.

    Raises:
        ValueError: another acquisition, or apl without its inputs.
    """
    pairs = [pair for pair in zip(*all_pairs(options), strict=True) if frozenset(pair) not in options.asked]
    if not pairs or count < 1:
        return []
    first, second = np.array(pairs, int).T
    turned = rng.random(len(first)) < 0.5
    first, second = np.where(turned, second, first), np.where(turned, first, second)
    rows, groups = options.features, options.prompts[first]
    margins = (rows[first] - rows[second]) @ model.mean
    apart = model.told_apart(rows[first], rows[second])
    values: list[float | None] | None = None
    if acquisition == "double_thompson":
        picks = _thompson(options, model, first, second, count, rng)
    elif acquisition in ("v_optimal", "d_optimal"):
        queries, omega = rows[first] - rows[second], model.information(rows[first], rows[second])
        costs = np.ones(len(first))
        if acquisition == "d_optimal":
            batch = d_optimal_batch(queries, omega, model.covariance, costs, groups, count, 1)
        else:
            value = disagreement(options, model)
            target = balanced_target(rows, options.prompts, options.counts, value, model.covariance)
            batch = v_optimal_batch(queries, omega, model.covariance, target, costs, groups, count, 1)
        picks, values = batch.picks, list(batch.values)
    elif acquisition in ("max_entropy", "apl"):
        if acquisition == "max_entropy":
            scores = apart * max_entropy_scores(expit(margins))
        elif entropy is None or implicit is None:
            raise ValueError(
                "pick_pairs: apl needs the entropy of each prompt and the implicit reward of each response"
            )
        else:
            scores = _apl(entropy, groups, implicit[first] - implicit[second], count)
        picks = top_batch(scores, groups, [options.kinds[g] for g in groups], count, 1)
    else:
        raise ValueError(f"pick_pairs: acquisition={acquisition!r} chooses no pairs; uniform ones are `choose_pairs`'")
    told = values or [None] * len(picks)
    return [
        PairPick(int(first[i]), int(second[i]), float(expit(margins[i])), float(apart[i]), value)
        for i, value in zip(picks, told, strict=True)
    ]


def choose_pairs(
    candidates: Sequence[Candidate],
    count: int,
    rng: np.random.Generator,
    round_number: int = 0,
    asked: Collection[tuple[str, frozenset[str]]] = frozenset(),
) -> list[Question]:
    """Choose pairs of different responses to open prompts: prompts and responses at random, at most a pair a prompt.

    Args:
        candidates: prompts with samples.
        count: at most so many.
        rng: of all chance.
        round_number: that the questions belong to.
        asked: prompt ids and the two responses of comparisons that are not to be asked for again.
    """
    usable = [c for c in candidates if c.prompt.task == "open"]
    questions: list[Question] = []
    for i in rng.permutation(len(usable)):
        if len(questions) == count:
            break
        prompt, rollouts = usable[i].prompt, usable[i].rollouts
        texts = sorted({r.text for r in rollouts if r.finished}) or sorted({r.text for r in rollouts})
        pairs = [two for two in combinations(texts, 2) if (prompt.id, frozenset(two)) not in asked]
        if not pairs:
            continue
        two = pairs[rng.integers(len(pairs))]
        first = int(rng.integers(2))
        why = "uniform: a random pair on a random open prompt"
        questions.append(Question("preference", prompt, (two[first], two[1 - first]), None, why, round_number))
    return questions


def _apl(
    entropy: Float[ndarray, " P"], groups: Int[ndarray, " N"], margins: Float[ndarray, " N"], count: int
) -> Float[ndarray, " N"]:
    """Return the scores of `apl_scores` for each pair, the entropies cut prompt by prompt, not pair by pair."""
    prompts = np.unique(groups)
    kept = apl_scores(entropy[prompts], np.ones(len(prompts)), max(0.5, min(1.0, count / len(prompts)))) > -np.inf
    return np.where(kept[np.searchsorted(prompts, groups)], np.abs(margins), -np.inf)


def _thompson(
    options: Options,
    model: PreferenceModel,
    first: Int[ndarray, " N"],
    second: Int[ndarray, " N"],
    count: int,
    rng: np.random.Generator,
) -> Int[ndarray, " n"]:
    draws = model.draws(options.features, DRAWS, rng).T
    able = np.bincount(options.prompts, minlength=len(options.kinds)) > 1
    value = np.where(able, disagreement(options, model), -1.0)
    picks: list[int] = []
    for x in np.argsort(-value, kind="stable")[: int(able.sum())]:
        if len(picks) == count:
            break
        members, fresh = np.flatnonzero(options.prompts == x), np.flatnonzero(options.prompts[first] == x)
        if not len(fresh):
            continue
        two = {int(members[i]) for i in double_thompson_pair(draws[:, members], rng)}
        same = [n for n in fresh if {first[n], second[n]} == two]
        picks.append(int(same[0] if same else rng.choice(fresh)))  # the two were compared already
    return np.array(picks, int)
