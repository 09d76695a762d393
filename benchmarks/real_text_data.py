"""The marked solutions of GSM8K's test questions, grouped by question, with what a backbone makes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, Int
from numpy import ndarray

from trlhf import files
from trlhf.checks import SOLUTIONS
from trlhf.config import ModelConfig
from trlhf.data import LabelledResponse
from trlhf.errors import UserError
from trlhf.evaluation.answers import extract_answer
from trlhf.models import model_path
from trlhf.reward.features import Pooled
from trlhf.reward.model import RewardModel
from trlhf.rl.judge import texts_of
from trlhf.seeding import numpy_rng
from trlhf.sft.gsm8k import marked_solutions
from trlhf.targeting.choose import Candidate
from trlhf.targeting.gate import is_repetitive
from trlhf.types import Label, Prompt, Question, Rollout


@dataclass(frozen=True)
class Solutions:
    """Marked solutions; nothing but `buy` and `truth` reads the marks.

    Attributes:
        candidates: each question with its solutions, as if a policy had sampled them. Tokens are kept of repetitive
            ones only: the gate asks for nothing else, and asks often.
        marks: whether an answer is right, by prompt id and answer; None (no answer) is wrong.
        rows: where a solution stands in ``pooled``, by prompt id and text.
        pooled: hidden states of the distinct solutions.
        lengths: tokens of each of them.
    """

    candidates: tuple[Candidate, ...]
    marks: Mapping[tuple[str, str], bool]
    rows: Mapping[tuple[str, str], int]
    pooled: Pooled
    lengths: tuple[int, ...]

    def buy(self, question: Question) -> Label:
        """Return the verdict that was hidden until now."""
        right = self.marks[question.prompt.id, question.answer or ""]
        outcome = "right" if right else "wrong"
        return Label(
            "verdict", question.prompt.id, question.responses, question.answer, outcome, "file", 1.0, question.why,
            question.round,
        )  # fmt: skip

    def truth(self, rollout: Rollout) -> bool:
        """Return whether a solution is right, to evaluate."""
        return rollout.answer is not None and self.marks[rollout.prompt_id, rollout.answer]

    def places(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Int[ndarray, " N"]:
        """Return the rows of some solutions."""
        return np.array([self.rows[prompt.id, text] for prompt, text in zip(prompts, texts, strict=True)], int)

    def split(self, held_out: int, seed: int) -> tuple[list[Candidate], list[Candidate]]:
        """Return questions to buy verdicts on, and ``held_out`` others to evaluate on."""
        order = numpy_rng(seed, "real text", "split").permutation(len(self.candidates)).tolist()
        return [self.candidates[n] for n in order[held_out:]], [self.candidates[n] for n in order[:held_out]]


POOLINGS: dict[str, Callable[[Pooled], torch.Tensor]] = {
    "forks": lambda pooled: pooled.forks,
    "mean": lambda pooled: pooled.response[:, : 2 * pooled.prompt.shape[1]],
    "both": lambda pooled: pooled.response,
}


def features_of(
    solutions: Solutions, held_in: Sequence[Candidate], pooling: str, dimension: int
) -> Float[ndarray, "N D"]:
    """Return the features that the answer model reads, of all solutions: the leading principal components.

    The components are those of the held-in solutions; no mark is looked at.

    Args:
        solutions: all of them.
        held_in: questions that verdicts may be bought on.
        pooling: one of `POOLINGS`.
        dimension: components kept.
    """
    matrix = POOLINGS[pooling](solutions.pooled).double().numpy()
    seen = [solutions.rows[c.prompt.id, text] for c in held_in for text in texts_of(c.rollouts)]
    mean = matrix[seen].mean(0)
    _, _, directions = np.linalg.svd(matrix[seen] - mean, full_matrices=False)
    return np.asarray((matrix - mean) @ directions[:dimension].T)


def group(labelled: Sequence[LabelledResponse]) -> tuple[list[Candidate], dict[tuple[str, str], bool]]:
    """Return questions with their solutions, and the mark of each answer.

    Raises:
        UserError: one answer to a question is marked right and wrong; the cluster rule would not hold.
    """
    found: dict[str, tuple[Prompt, list[Rollout]]] = {}
    marks: dict[tuple[str, str], bool] = {}
    for label in labelled:
        answer = extract_answer(label.response)
        prompt, rollouts = found.setdefault(label.prompt.id, (label.prompt, []))
        rollouts.append(Rollout(prompt.id, label.response, answer=answer))
        if answer is not None and marks.setdefault((prompt.id, answer), label.right) != label.right:
            raise UserError(f"{label.source}: answer {answer} is marked right and wrong; leave that question out")
    return [Candidate(prompt, tuple(rollouts)) for prompt, rollouts in found.values()], marks


def read_solutions(folder: Path, model: str, cache: Path, most: int = 0) -> tuple[Solutions, dict[str, int]]:
    """Read the marked solutions and what the backbone makes of them; the second time from ``cache``.

    A change of the weights behind one model name is not noticed: delete the cache then.

    Args:
        folder: GSM8K's files.
        model: the backbone: ``micro``, a folder or a hub name.
        cache: folder.
        most: questions read, the first ones; 0: all.

    Returns:
        The solutions, and how many there are of what.

    Raises:
        UserError: the file is missing or malformed, or there is no such model.
    """
    if not (folder / SOLUTIONS).is_file():
        raise UserError(f"--data {folder}: there is no {SOLUTIONS}; give the folder of GSM8K's files")
    labelled, _ = marked_solutions(folder, set())
    first = set(list(dict.fromkeys(label.prompt.id for label in labelled))[: most or None])
    labelled = [label for label in labelled if label.prompt.id in first]
    reader = RewardModel.from_backbone(model_path(model), ModelConfig(name=model))
    fitting = [label for label in labelled if reader.fits(label.prompt, label.response)]
    distinct = {(label.prompt.id, label.response): label for label in fitting}
    samples = reader.encode([x.prompt for x in distinct.values()], [x.response for x in distinct.values()])
    digest = hashlib.sha256(repr((model, samples)).encode()).hexdigest()[:16]
    path = cache / f"features-{digest}.safetensors"
    if not path.exists():
        pooled = reader.pool_samples(samples)
        cache.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, safetensors.torch.save({"response": pooled.response, "prompt": pooled.prompt}))
    candidates, marks = group(fitting)
    tokens = {key: sample.ids[sample.prompt_length :] for key, sample in zip(distinct, samples, strict=True)}
    repetitive = {key: ids for key, ids in tokens.items() if is_repetitive(ids)}
    candidates = [
        Candidate(c.prompt, tuple(replace(r, token_ids=repetitive.get((r.prompt_id, r.text), ())) for r in c.rollouts))
        for c in candidates
    ]
    kept = safetensors.torch.load_file(path)
    solutions = Solutions(
        tuple(candidates),
        marks,
        {key: n for n, key in enumerate(distinct)},
        Pooled(kept["response"], kept["prompt"]),
        tuple(sample.response_length for sample in samples),
    )
    counts = {"read": len(labelled), "used": len(fitting), "too_long": len(labelled) - len(fitting)}
    counts |= {"questions": len(candidates), "right": sum(label.right for label in fitting)}
    counts |= {"answers": len(marks), "repetitive": len(repetitive)}
    return solutions, counts
