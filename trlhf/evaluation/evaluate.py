"""Stage 4: zero-shot, temperature 0, through the chat template; every model on the same held-out prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from trlhf.config import EvaluationConfig
from trlhf.evaluation.answers import has_plan, same_answer
from trlhf.evaluation.statistics import accuracy_summary, mcnemar, win_rate
from trlhf.roles import Role
from trlhf.rollout import Sampling, sample_as
from trlhf.types import Prompt, Rollout

Taste = Callable[[Prompt, str], float]
TIE = 0.05  # a smaller difference in taste is a tie


@dataclass(frozen=True)
class Evaluation:
    """One model's greedy responses.

    Attributes:
        prompts: the held-out prompts.
        rollouts: one response each.
        correct: prompt id → whether the final answer is right; exact-answer prompts only.
    """

    prompts: Sequence[Prompt]
    rollouts: Sequence[Rollout]
    correct: Mapping[str, bool]

    def reasoning(self) -> list[bool]:
        """Return the verdicts on the reasoning prompts, in order."""
        return [self.correct[p.id] for p in self.prompts if p.reasoning and p.id in self.correct]

    def with_unanswered(self, prompts: Sequence[Prompt], answers: Mapping[str, str]) -> Evaluation:
        """Return the same with prompts that could not be asked: no response, and so wrong where there is an answer."""
        return Evaluation(
            [*self.prompts, *prompts],
            [*self.rollouts, *(Rollout(prompt.id, "", finished=False) for prompt in prompts)],
            {**self.correct, **{prompt.id: False for prompt in prompts if prompt.id in answers}},
        )

    def samples(self, answers: Mapping[str, str]) -> list[dict[str, Any]]:
        """Return one JSON row a prompt: prompt, response, answer, gold, verdict."""
        return [
            {
                "prompt_id": p.id,
                "kind": p.kind,
                "prompt": p.messages[-1]["content"],
                "response": r.text,
                "finished": r.finished,
                "answer": r.answer,
                "gold": answers.get(p.id),
                "correct": self.correct.get(p.id),
            }
            for p, r in zip(self.prompts, self.rollouts, strict=True)
        ]


def evaluate(
    role: Role,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    answers: Mapping[str, str],
    config: EvaluationConfig,
    advance: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Answer every prompt greedily and compare with the gold answers (math-verify where they are not plain)."""
    sampling = Sampling(0.0, config.max_new_tokens, 1, config.batch_size)
    drawn = sample_as(role, tokenizer, prompts, sampling, 0, advance)
    rollouts = [rows[0] for rows in drawn]
    correct = {
        p.id: r.answer is not None and same_answer(r.answer, answers[p.id])
        for p, r in zip(prompts, rollouts, strict=True)
        if p.id in answers
    }
    return Evaluation(prompts, rollouts, correct)


def describe(evaluation: Evaluation, config: EvaluationConfig, seed: int) -> dict[str, Any]:
    """Return accuracy overall and by kind with intervals, shares of plans by need and by kind, share unfinished."""
    by_kind: defaultdict[str, list[bool]] = defaultdict(list)
    plans: defaultdict[bool, list[bool]] = defaultdict(list)
    plans_by_kind: defaultdict[str, list[bool]] = defaultdict(list)
    for prompt, rollout in zip(evaluation.prompts, evaluation.rollouts, strict=True):
        if prompt.id in evaluation.correct:
            by_kind[prompt.kind].append(evaluation.correct[prompt.id])
        planned = has_plan(rollout.text)
        plans[prompt.reasoning].append(planned)
        plans_by_kind[prompt.kind].append(planned)

    def estimate(values: Sequence[bool]) -> dict[str, Any] | None:
        return dict(accuracy_summary(values, config.confidence, config.interval, seed)) if values else None

    return {
        "accuracy": estimate(evaluation.reasoning()),
        "by_kind": {kind: estimate(values) for kind, values in sorted(by_kind.items())},
        "plans": {"reasoning": estimate(plans[True]), "other": estimate(plans[False])},
        "plans_by_kind": {kind: estimate(values) for kind, values in sorted(plans_by_kind.items())},
        "unfinished": sum(not r.finished for r in evaluation.rollouts) / max(1, len(evaluation.rollouts)),
    }


def compare(before: Evaluation, after: Evaluation, taste: Taste | None, confidence: float) -> dict[str, Any]:
    """Return the paired test on the reasoning prompts, and ``after``'s win rate on open prompts by the true taste."""
    result: dict[str, Any] = {}
    if before.reasoning():
        result["mcnemar"] = dict(mcnemar(before.reasoning(), after.reasoning()))
    if taste is None:
        return result
    gains = [
        taste(prompt, new.text) - taste(prompt, old.text)
        for prompt, old, new in zip(before.prompts, before.rollouts, after.rollouts, strict=True)
        if prompt.task == "open"
    ]
    if gains:
        wins, losses = sum(gain > TIE for gain in gains), sum(gain < -TIE for gain in gains)
        result["win_rate"] = dict(win_rate(wins, len(gains) - wins - losses, losses, confidence))
    return result
