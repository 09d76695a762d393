"""The answers of several prompts, as the answer model sees them, with what labels say of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from trlhf.targeting.answers import Answers, label_likelihood


@dataclass(frozen=True)
class AnswerTable:
    """The answers of several prompts.

    Attributes:
        answers: as the model sees them.
        names: each answer, as the samples wrote it, [C].
        counts: samples that end in it, [C].
        texts: one of its texts, [C].
        places: index of each of the P prompts among those given; prompts without any answer are left out.
        samples: of each of these prompts, those without an answer included, [P].
        told: of each of these prompts, verdicts on answers as `names` writes them, or on others; [P] or none at all.
    """

    answers: Answers
    names: tuple[str, ...]
    counts: Int[ndarray, " C"]
    texts: tuple[str, ...]
    places: tuple[int, ...]
    samples: Int[ndarray, " P"]
    told: tuple[Sequence[tuple[str, bool]], ...] = ()

    def at(self, flip_rate: float) -> Answers:
        """Return the answers with the likelihoods of the labels as they are if verdicts err at this rate, ε."""
        likelihood, nones = np.ones(len(self.names)), np.ones(len(self.places))
        starts = np.searchsorted(self.answers.prompts, np.arange(len(self.places) + 1))
        for number, told in enumerate(self.told):
            if told:
                rows = slice(starts[number], starts[number + 1])
                likelihood[rows], nones[number] = _likelihoods(self.names[rows], told, flip_rate)
        return replace(self.answers, likelihood=likelihood, likelihood_none=nones)


def _likelihoods(
    names: Sequence[str], told: Sequence[tuple[str, bool]], flip_rate: float
) -> tuple[Float[ndarray, " C"], float]:
    """Return P(verdicts | answer c is right) of a prompt's answers, and of "none of these".

    "None of these" stands for an answer that was found right and is not among the samples.
    """
    elsewhere = [about for about, right in told if right and about not in names]
    likely, none = label_likelihood([*names, *elsewhere[:1]], told, flip_rate)
    return likely[: len(names)], float(likely[-1]) if elsewhere else none
