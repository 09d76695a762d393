"""How much of what the policy writes lies far from what it wrote before the first update."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy

from trlhf import files
from trlhf.rl.answer_table import AnswerTable
from trlhf.rl.judge import settled
from trlhf.targeting.choose import Candidate
from trlhf.targeting.gate import FEWEST_USUAL, OUTLIER_PERCENTILE, mahalanobis_distances, outlier_bound

REFERENCE, NAMES = "outlier_reference.safetensors", "outlier_reference.json"


def count_outliers(folder: Path, table: AnswerTable, candidates: Sequence[Candidate]) -> dict[str, float] | None:
    """Return how many of the candidates' rollouts are outliers, in prompts.

    The measure of what is usual is the gate's (Mahalanobis distance, 99th percentile out of sample) on every second
    candidate of the first round, all of them samples of the reference; it stays the same for the whole stage, and these
    prompts are passed over ever after. A prompt counts by the share of its rollouts that lie beyond: rollouts of one
    prompt resemble each other, and would make chance look like a trend.

    Args:
        folder: keeps the measure, so that a run that was stopped goes on with the same.
        table: of the candidates' answers.
        candidates: the table's places are indices into them.

    Returns:
        ``outliers`` of ``prompts``; None where the first round had fewer than twice `FEWEST_USUAL` prompts.
    """
    number, features = table.answers.prompts, table.answers.features
    names = [candidates[place].prompt.id for place in table.places]
    if not (folder / NAMES).exists():
        usual = number % 2 == 0
        kept = {"features": features[usual].copy(), "prompts": number[usual].copy()}
        files.write_bytes(folder / REFERENCE, safetensors.numpy.save(kept))
        files.write_json(folder / NAMES, names[::2])
    reference, known = safetensors.numpy.load_file(folder / REFERENCE), set(files.read_json(folder / NAMES))
    if len(known) < FEWEST_USUAL:
        return None
    bound = outlier_bound(reference["features"], OUTLIER_PERCENTILE, reference["prompts"])
    beyond = ~(mahalanobis_distances(features, reference["features"]) <= bound)
    weights = table.counts.astype(float)
    shares = np.bincount(number, weights * beyond, len(names)) / np.bincount(number, weights, len(names))
    new = np.array([name not in known for name in names], bool)
    return {"outliers": settled(float(shares[new].sum())), "prompts": int(new.sum())}
