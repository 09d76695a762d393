"""What is known of the answers that labels do not decide: the answer model, applied to prompts and their samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors.numpy
from jaxtyping import Float
from numpy import ndarray

from trlhf import files
from trlhf.evaluation.answers import same_answer
from trlhf.rl.answer_table import AnswerTable
from trlhf.targeting.answer_fit import fit_answers, left_out_log_likelihood
from trlhf.targeting.answers import FLIP_RATE, AnswerModel, Answers
from trlhf.targeting.noise import RATES, flip_rate_from
from trlhf.targeting.whitening import Whitening
from trlhf.types import Label, Prompt, Rollout

Features = Callable[[Sequence[Prompt], Sequence[str]], Float[ndarray, "N F"]]
Texts = Mapping[str, tuple[str, int]]  # text → its answer, and how many samples were this text
Verdicts = Mapping[str, Sequence[tuple[str, bool]]]  # prompt id → judged answers, and whether they were found right
Cache = dict[tuple[str, tuple[str, ...]], Float[ndarray, "N F"]]  # prompt id and texts → their features
WHITENING, REFERENCE = "whitening.safetensors", "reference_shares.json"
RARE = 1 / 16  # share of an answer that none of the reference's samples gave
DRAWS = 64
DIGITS = 6  # kept of what goes on disk or into an update


def settled(value: float) -> float:
    """Return a value without its last digits, which depend on where in memory a matrix happens to lie."""
    return round(value, DIGITS)


@dataclass(frozen=True)
class Judgement:
    """Rewards of a prompt's samples that no label decides, and how far the sign of each advantage can be trusted."""

    rewards: tuple[float, ...]
    trust: tuple[float, ...]


def verdicts_of(labels: Sequence[Label]) -> dict[str, list[tuple[str, bool]]]:
    """Return what labels say about answers, by prompt; a gold label counts as a right verdict on its answer."""
    found: dict[str, list[tuple[str, bool]]] = {}
    for label in labels:
        answer = label.outcome if label.kind == "gold" else label.answer
        if label.kind != "preference" and answer is not None:
            found.setdefault(label.prompt_id, []).append((answer, label.outcome != "wrong"))
    return found


def texts_of(rollouts: Sequence[Rollout]) -> dict[str, tuple[str, int]]:
    """Return the distinct finished responses with an answer."""
    counts = Counter((r.text, r.answer) for r in rollouts if r.finished and r.answer is not None)
    return {text: (str(answer), count) for (text, answer), count in counts.items()}


class AnswerJudge:
    """An answer model with what it needs to read samples.

    Args:
        features: of responses; from a backbone that does not change.
        folder: keeps the whitening, so that a run that was stopped goes on with the same.
        cache: features that `fit` has read before; it is added to.
    """

    def __init__(self, features: Features, folder: Path, cache: Cache | None = None) -> None:
        self.features, self.folder, self.flip_rate = features, folder, FLIP_RATE
        self.model: AnswerModel | None = None
        self.verdicts: Verdicts = {}
        self.cache: Cache = {} if cache is None else cache
        self._whitening: Whitening | None = None
        self._reference: dict[str, dict[str, float]] = {}

    def table(
        self,
        prompts: Sequence[Prompt],
        texts: Sequence[Texts],
        samples: Sequence[int],
        known: Mapping[tuple[str, str], Float[ndarray, " F"]] | None = None,
    ) -> AnswerTable:
        """Return the answers of some prompts, with what `fit` was told of the labels on them.

        Their shares are those among the reference's samples (see `_share`), not among these.

        Args:
            prompts: with an exact answer.
            texts: the distinct finished responses of each that have an answer.
            samples: of each, those without an answer included.
            known: features of all of them, by prompt id and text; None: they are computed.
        """
        rows = [(i, text, answer, n) for i, found in enumerate(texts) for text, (answer, n) in sorted(found.items())]
        if known is None:
            read = self.features([prompts[i] for i, *_ in rows], [text for _, text, *_ in rows]) if rows else None
        else:
            read = np.array([known[prompts[i].id, text] for i, text, *_ in rows]) if rows else None
        assert self._whitening is not None, "whiten_on or load first"
        pooled = np.zeros((0, self._whitening.map.shape[1])) if read is None else self._whitening(read)
        features, names, counts, shares, numbers, kept = [], [], [], [], [], []
        told, places = list[list[tuple[str, bool]]](), list[int]()
        first = 0  # row of a prompt's first text
        for i, found in enumerate(texts):
            if not found:
                continue
            places.append(i)
            by_answer: dict[str, list[int]] = {}
            for n in range(first, first + len(found)):
                by_answer.setdefault(rows[n][2], []).append(n)
            first += len(found)
            told.append([(_matching(about, by_answer), right) for about, right in self.verdicts.get(prompts[i].id, ())])
            for answer, members in by_answer.items():
                weights = np.array([rows[n][3] for n in members], float)
                features.append(weights @ pooled[members] / weights.sum())
                names.append(answer)
                counts.append(int(weights.sum()))
                shares.append(self._share(prompts[i].id, answer, len(by_answer)))
                numbers.append(len(places) - 1)
                kept.append(rows[members[int(weights.argmax())]][1])
        answers = Answers(
            np.array(features).reshape(len(names), pooled.shape[1]),
            np.array(shares, float),
            np.array(numbers, int),
            np.ones(len(names)),
            np.ones(len(places)),
        )
        of, many = np.array([samples[i] for i in places], int), np.array(counts, int)
        table = AnswerTable(answers, tuple(names), many, tuple(kept), tuple(places), of, tuple(told))
        return replace(table, answers=table.at(self.flip_rate))

    def fit(
        self,
        prompts: Sequence[Prompt],
        rounds: Sequence[Sequence[Texts]],
        verdicts: Verdicts,
        flip_rate: float | None = None,
    ) -> None:
        """Fit the model to all labels so far, on all samples of the labelled prompts.

        Args:
            prompts: those with verdicts.
            rounds: of each, the responses of every round. Those of one round are always read in one batch, so that a
                run that was stopped computes the same features, to the bit, as one that went on.
            verdicts: by prompt.
            flip_rate: chance that one is the opposite of the truth; None: estimated from what the model expects of them
                when it is fitted to other prompts (`trlhf.targeting.noise`).
        """
        self.verdicts = verdicts
        known: dict[tuple[str, str], Float[ndarray, " F"]] = {}
        texts = []
        for prompt, found in zip(prompts, rounds, strict=True):
            merged: dict[str, tuple[str, int]] = {}
            for own in found:
                new = sorted(own)
                if not new:
                    continue
                key = (prompt.id, tuple(new))
                if key not in self.cache:
                    self.cache[key] = self.features([prompt] * len(new), new)
                for text, row in zip(new, self.cache[key], strict=True):
                    known.setdefault((prompt.id, text), row)
                    merged[text] = (own[text][0], merged.get(text, ("", 0))[1] + own[text][1])
            texts.append(merged)
        samples = [max(1, sum(n for _, n in found.values())) for found in texts]

        table = self.table(prompts, texts, samples, known)
        if flip_rate is None:
            flip_rate = flip_rate_from([left_out_log_likelihood(table.at(rate), rate) for rate in RATES])
        self.flip_rate = flip_rate
        self.model = fit_answers(table.at(flip_rate), flip_rate)

    def judge(
        self, prompts: Sequence[Prompt], sampled: Sequence[Sequence[Rollout]], rng: np.random.Generator
    ) -> list[Judgement]:
        """Return the expected reward of every sample, P(its answer is right), and the trust in its advantage.

        A sample's advantage is above 0 if its answer is right, below 0 if another sampled answer is, and 0 if none is.
        The trust in its sign is c = |P(A > 0) - P(A < 0)|, averaged over `DRAWS` draws of θ: what the model does not
        know and what no model could tell from the samples count alike. (The sign of the *expected* advantage can be
        certain while the answer is not: a majority of 5 in 8 is preferred by every draw.)
        """
        assert self.model is not None, "judge: fit first"
        table = self.table(prompts, [texts_of(rollouts) for rollouts in sampled], [len(x) for x in sampled])
        judged = [Judgement((0.0,) * len(rollouts), (0.0,) * len(rollouts)) for rollouts in sampled]
        if not table.names:
            return judged
        draws = self.model.draws(table.answers, DRAWS, rng)
        for number, place in enumerate(table.places):
            rows = np.flatnonzero(table.answers.prompts == number)
            by_name = {table.names[n]: float(draws[n].mean()) for n in rows}
            rewards = [by_name.get(r.answer or "", 0.0) if r.finished else 0.0 for r in sampled[place]]
            some = sum(by_name.values())
            trust = [abs(2 * reward - some) for reward in rewards]
            judged[place] = Judgement(tuple(map(settled, rewards)), tuple(map(settled, trust)))
        return judged

    def whiten_on(self, prompts: Sequence[Prompt], texts: Sequence[Texts]) -> None:
        """Fit the whitening on these samples, unless an earlier start has done so; no label is looked at."""
        path = self.folder / WHITENING
        if not path.exists():
            rows = [(prompt, text) for prompt, found in zip(prompts, texts, strict=True) for text in sorted(found)]
            whitening = Whitening.fit(self.features([prompt for prompt, _ in rows], [text for _, text in rows]))
            files.write_bytes(path, safetensors.numpy.save({"mean": whitening.mean, "map": whitening.map.copy()}))
        kept = safetensors.numpy.load_file(path)
        self._whitening = Whitening(kept["mean"], kept["map"])

    def note_reference(self, prompts: Sequence[Prompt], texts: Sequence[Texts]) -> None:
        """Keep how often the reference's samples end in each answer, for `table`."""
        shares: dict[str, dict[str, float]] = {}
        for prompt, found in zip(prompts, texts, strict=True):
            total = max(1, sum(count for _, count in found.values()))
            own = shares.setdefault(prompt.id, {})
            for answer, count in found.values():
                own[answer] = own.get(answer, 0.0) + count / total
        files.write_json(self.folder / REFERENCE, shares)

    def load(self) -> bool:
        """Take up the whitening and the reference's shares of an earlier round; False if there are none."""
        if not (self.folder / REFERENCE).exists():
            return False
        self.whiten_on((), ())
        self._reference = files.read_json(self.folder / REFERENCE)
        return True

    def _share(self, prompt_id: str, answer: str, answers: int) -> float:
        """Return the share of the *reference's* samples that end in an answer; where it is not known, all alike.

        The share under the policy as it is now says what the policy has been rewarded for, by this very model.
        """
        known = self._reference.get(prompt_id)
        return 1 / answers if known is None else known.get(answer, RARE)


def _matching(answer: str, known: Mapping[str, object]) -> str:
    """Return the known answer that equals this one, in whatever form; else itself."""
    return answer if answer in known else next((other for other in known if same_answer(other, answer)), answer)
