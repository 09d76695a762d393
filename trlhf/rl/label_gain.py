"""What a round's labels were worth: verdicts that chance chose later, predicted with these labels and without them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from trlhf.rl.ask import Chosen, Outlook
from trlhf.rl.judge import settled, texts_of
from trlhf.rl.round import Round
from trlhf.targeting import Candidate
from trlhf.types import Label

LEAST_P = 1e-3  # a prediction counts as no surer than this against what came


def two_predictions(
    trainer: Round,
    candidates: Sequence[Candidate],
    outlook: Outlook,
    uniform: Sequence[Chosen],
    labels: Sequence[Label],
) -> list[dict[str, Any]]:
    """Return what is predicted of verdicts that chance chose, with the last round's labels and without them.

    Both before the verdicts are bought, so that what comes tells what the last round's labels were worth.
    """
    number, rate = trainer.state.round, trainer.flip_rate
    if number < 2 or not uniform:
        return []
    judge = trainer.fit_judge([label for label in labels if label.round < number - 1])
    trainer.flip_rate = rate  # `fit_judge` estimates it from the labels that it is given
    assert judge is not None and judge.model is not None
    prompts, texts = [c.prompt for c in candidates], [texts_of(c.rollouts) for c in candidates]
    table = judge.table(prompts, texts, [len(candidate.rollouts) for candidate in candidates])
    earlier = judge.model.probabilities(table.answers)
    names = [candidates[outlook.table.places[p]].prompt.id for p in outlook.table.answers.prompts]
    rows = []
    for verdict in uniform:
        asked = verdict.question
        row = next(n for n, at in enumerate(names) if at == asked.prompt.id and table.names[n] == asked.answer)
        now, before = settled(float(outlook.probabilities[row])), settled(float(earlier[row]))
        rows.append({"prompt_id": asked.prompt.id, "answer": asked.answer, "with": now, "without": before})
    return rows


def label_gains(trainer: Round, labels: Sequence[Label]) -> list[Float[np.ndarray, " N"]]:
    """Return by round, from the second on, by how much the labels before it lowered the NLL of its uniform verdicts."""
    told = {(x.prompt_id, x.answer, x.round): x.outcome == "right" for x in labels if x.kind == "verdict"}
    gains = []
    for number in range(2, trainer.state.round):
        found = []
        for row in trainer.decisions(number).get("uniform_slice", []):
            right = told.get((row["prompt_id"], row["answer"], number))
            if right is not None:
                now, before = (row[key] if right else 1 - row[key] for key in ("with", "without"))
                found.append(math.log(max(now, LEAST_P)) - math.log(max(before, LEAST_P)))
        gains.append(np.array(found))
    return gains
