"""How responses to open prompts are liked, as far as is known: the model of preferences, applied to samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from jaxtyping import Float
from numpy import ndarray

from trlhf import files
from trlhf.rl.judge import DRAWS, Features, Judgement, settled
from trlhf.targeting.pairs import Options, disagreement
from trlhf.targeting.preferences import Compared, PreferenceModel, fit_preferences
from trlhf.targeting.swaps import Noise, estimate_noise
from trlhf.targeting.whitening import Whitening
from trlhf.types import Label, Prompt, Rollout

SCALES = "liking_scales.safetensors"
TYPICAL = 2  # columns that say how typical a response is, the last of the features
LARGEST = 4.0  # standard deviations that one of them counts at most
SCORES = {"A": 1.0, "tie": 0.5, "B": 0.0}
PairCache = dict[tuple[str, tuple[str, ...]], Float[ndarray, "2 F"]]  # prompt id and the two texts → their features


@dataclass(frozen=True)
class Scales:
    """Features as read → what the model sees: a sphere, and typicality of mean 0 and standard deviation 1."""

    whitening: Whitening
    mean: Float[ndarray, " E"]
    sd: Float[ndarray, " E"]

    def __call__(self, features: Float[ndarray, "N F"]) -> Float[ndarray, "N Q"]:
        """Return the rows of `trlhf.targeting.preferences.Compared`."""
        typical = np.clip((features[:, -TYPICAL:] - self.mean) / self.sd, -LARGEST, LARGEST)
        return np.hstack([self.whitening(features[:, :-TYPICAL]), typical])


def comparisons(labels: Sequence[Label]) -> list[Label]:
    """Return the preferences among some labels."""
    return [label for label in labels if label.kind == "preference"]


def repeated(labels: Sequence[Label]) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the answers to comparisons asked once, and both answers to those that were asked in both orders."""
    asked: dict[tuple[str, frozenset[str]], list[Label]] = {}
    for label in comparisons(labels):
        asked.setdefault((label.prompt_id, frozenset(label.responses)), []).append(label)
    once = [found[0].outcome for found in asked.values() if len(found) == 1]
    twice = [found for found in asked.values() if len(found) > 1]
    return once, [(found[0].outcome, found[1].outcome) for found in twice if found[0].responses != found[1].responses]


class LikingJudge:
    """A model of preferences with what it needs to read samples.

    Args:
        features: of responses, the last `TYPICAL` columns typicality; from a backbone that does not change.
        folder: keeps the scales, so that a run that was stopped goes on with the same.
        cache: features of compared pairs that `fit` has read before; it is added to.
    """

    def __init__(self, features: Features, folder: Path, cache: PairCache | None = None) -> None:
        self.features, self.folder = features, folder
        self.model: PreferenceModel | None = None
        self.noise, self.swapped = Noise(), 0  # what `fit` estimated, from so many comparisons asked in both orders
        self.cache: PairCache = {} if cache is None else cache
        self.winners: Float[ndarray, "W Q"] | None = None  # features of preferred responses, and their prompts
        self.winning_prompts: list[str] = []
        self._scales: Scales | None = None

    def load(self) -> bool:
        """Take up the scales of an earlier round; False if there are none."""
        if not (self.folder / SCALES).exists():
            return False
        kept = safetensors.numpy.load_file(self.folder / SCALES)
        self._scales = Scales(Whitening(kept["centre"], kept["map"]), kept["mean"], kept["sd"])
        return True

    def scale_on(self, prompts: Sequence[Prompt], sampled: Sequence[Sequence[Rollout]]) -> None:
        """Fit the scales on these samples, unless an earlier start has done so; no label is looked at."""
        if not (self.folder / SCALES).exists():
            rows = [(p, text) for p, own in zip(prompts, sampled, strict=True) for text in sorted(texts_of(own))]
            read = self.features([prompt for prompt, _ in rows], [text for _, text in rows])
            whitening, typical = Whitening.fit(read[:, :-TYPICAL]), read[:, -TYPICAL:]
            kept = {"centre": whitening.mean, "map": whitening.map.copy(), "mean": typical.mean(0)}
            kept["sd"] = np.maximum(typical.std(0), 1e-6)
            files.write_bytes(self.folder / SCALES, safetensors.numpy.save(kept))
        self.load()

    def fit(self, prompts: Sequence[Prompt], labels: Sequence[Label]) -> None:
        """Fit the model to all comparisons so far; noise and position bias come from the repeated ones.

        The two responses of a comparison are always read in one batch, so that a run that was stopped computes the same
        features, to the bit, as one that went on.
        """
        assert self._scales is not None, "scale_on or load first"
        known = {prompt.id: prompt for prompt in prompts}
        told = [label for label in comparisons(labels) if label.prompt_id in known]
        told.sort(key=lambda x: (x.round, x.repeat, x.prompt_id, x.responses))  # whatever a kill made of their order
        read = []
        for label in told:
            key = (label.prompt_id, tuple(label.responses))
            if key not in self.cache:
                self.cache[key] = self.features([known[label.prompt_id]] * 2, list(label.responses))
            read.append(self._scales(self.cache[key]))
        size = self._scales.whitening.map.shape[1] + TYPICAL
        both = np.array(read).reshape(len(told), 2, size)
        outcomes = np.array([SCORES[label.outcome] for label in told])
        once, both_orders = repeated(told)
        self.noise, self.swapped = estimate_noise(once, both_orders), len(both_orders)
        self.model = fit_preferences(Compared(both[:, 0], both[:, 1], outcomes, TYPICAL), self.noise)
        decided = [(n, int(score == 0)) for n, score in enumerate(outcomes) if score != 0.5]
        self.winners = np.array([both[n, side] for n, side in decided]).reshape(len(decided), size)
        self.winning_prompts = [told[n].prompt_id for n, _ in decided]

    def options(
        self, prompts: Sequence[Prompt], sampled: Sequence[Sequence[Rollout]]
    ) -> tuple[Options, list[str], list[Rollout]]:
        """Return the distinct finished responses, as the model sees them, their texts, and a sample of each."""
        assert self._scales is not None, "scale_on or load first"
        rows = [(x, text, n) for x, own in enumerate(sampled) for text, n in sorted(texts_of(own).items())]
        size = self._scales.whitening.map.shape[1] + TYPICAL
        seen = np.zeros((0, size))
        if rows:
            seen = self._scales(self.features([prompts[x] for x, _, _ in rows], [text for _, text, _ in rows]))
        numbers, counts = np.array([x for x, _, _ in rows], int), np.array([n for _, _, n in rows], int)
        samples = [next(r for r in sampled[x] if r.finished and r.text == text) for x, text, _ in rows]
        return Options(seen, numbers, counts, [p.kind for p in prompts]), [text for _, text, _ in rows], samples

    def judge(
        self, prompts: Sequence[Prompt], sampled: Sequence[Sequence[Rollout]], rng: np.random.Generator
    ) -> tuple[list[Judgement], list[tuple[float, float]]]:
        """Return rewards and trust of every sample, and for each prompt its `disagreement` and mean trust.

        A sample's reward is its expected win rate against the other samples of its group, mean_j P(θ·(φ_i - φ_j) > 0)
        over draws of θ, ties half: the quantity that policies are compared by, on the scale of exact rewards (self-play
        preference optimisation, Swamy et al. 2024, https://arxiv.org/abs/2401.04056). Where θ is not known it is near
        ½, and the advantage near 0, so no second weight is laid on it: a trust of 1 each. The trust that is returned by
        prompt is the mean of |P(A > 0) - P(A < 0)|, A the reward less ½. Unfinished samples lose to all others.
        """
        assert self.model is not None, "judge: fit first"
        options, texts, _ = self.options(prompts, sampled)
        draws = self.model.draws(options.features, DRAWS, rng)
        outlook = disagreement(options, self.model)
        judged, seen = [], []
        for x, rollouts in enumerate(sampled):
            place = {texts[n]: n for n in np.flatnonzero(options.prompts == x)}
            row = np.array([place[r.text] if r.finished else -1 for r in rollouts], int)
            liking = np.vstack([draws, np.full((1, DRAWS), -1e3)])[row]
            gaps = liking[:, None] - liking[None]
            wins = ((gaps > 0) + 0.5 * (gaps == 0)).sum(1) - 0.5
            wins = wins / max(1, len(rollouts) - 1)
            trust = np.abs((wins > 0.5 + 1e-9).mean(1) - (wins < 0.5 - 1e-9).mean(1))
            judged.append(Judgement(tuple(settled(float(w)) for w in wins.mean(1)), (1.0,) * len(rollouts)))
            seen.append((settled(float(outlook[x])), settled(float(trust.mean()))))
        return judged, seen


def texts_of(rollouts: Sequence[Rollout]) -> dict[str, int]:
    """Return the distinct finished responses, and how many samples were each."""
    return dict(Counter(rollout.text for rollout in rollouts if rollout.finished))


def open_weights(names: Sequence[str], liking: Mapping[str, tuple[float, float]]) -> Float[ndarray, " N"]:
    """Return how open prompts are drawn: in proportion to P(two samples are told apart) times trust.

    A hundredth of the largest is added, so that none is out of reach for ever; where nothing is known, all are alike.
    """
    value = np.array([apart * trust for apart, trust in (liking.get(name, (0.0, 0.0)) for name in names)])
    value = value + max(1e-3, 0.01 * float(value.max()))
    return np.asarray(value / value.sum())
