"""Zero-shot reasoning through our own engine: one greedy answer, and beside it the majority of several sampled ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trlhf.config import EvaluationConfig
from trlhf.evaluation.answers import same_answer
from trlhf.evaluation.means import clustered_mean
from trlhf.evaluation.questions import Question
from trlhf.evaluation.statistics import Estimate, accuracy_summary
from trlhf.models import encode_prompt
from trlhf.rollout import Sampling, sample_responses
from trlhf.seeding import torch_generator
from trlhf.types import Rollout


@dataclass(frozen=True)
class Answered:
    """One task's result.

    Attributes:
        greedy: accuracy at temperature 0.
        votes: accuracy of the majority; None without votes.
        single: mean accuracy of the single votes, clustered by question; None without votes.
        chance: what guessing would get where every question has options; else None.
        too_long: questions that leave no room for a response, which count as wrong.
        unfinished: greedy responses without an end.
        samples: one row a question.
    """

    greedy: Estimate
    votes: Estimate | None
    single: Estimate | None
    chance: float | None
    too_long: int
    unfinished: int
    samples: Sequence[dict[str, Any]]


def majority(answers: Sequence[str | None]) -> str | None:
    """Return the answer that most responses agree on (Wang et al. 2022, https://arxiv.org/abs/2203.11171, eq. 1).

    Answers that math-verify finds equal are one. Responses without an answer have no vote. Of several answers with as
    many votes that one wins which was given first, so the result depends on nothing but the order of the samples.
    """
    groups: list[list[str]] = []
    for answer in answers:
        if answer is None:
            continue
        for group in groups:
            if same_answer(answer, group[0]):
                group.append(answer)
                break
        else:
            groups.append([answer])
    return max(groups, key=len)[0] if groups else None  # max keeps the first of equals


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    config: EvaluationConfig,
    max_length: int,
    seed: int,
    advance: Callable[[int], None] = lambda done: None,
) -> Answered:
    """Ask every question through the chat template and mark the answers.

    Args:
        model: a causal language model.
        tokenizer: with its chat template.
        questions: at least one.
        config: ``max_new_tokens``, ``majority``, ``temperature``, intervals.
        max_length: tokens of prompt and response together.
        seed: of the votes and of bootstrap intervals.
        advance: called with the number of questions answered; twice for each where there are votes.
    """
    fits = [
        len(encode_prompt(tokenizer, question.prompt.messages)) + config.max_new_tokens <= max_length
        for question in questions
    ]
    asked = [question for question, fitting in zip(questions, fits, strict=True) if fitting]

    def sample(temperature: float, samples: int) -> list[list[Rollout]]:
        sampling = Sampling(temperature, config.max_new_tokens, samples, max(config.batch_size, samples))
        generator = torch_generator(seed, "evaluation", "votes") if temperature else torch.Generator()
        prompts = [question.prompt for question in asked]
        return sample_responses(model, tokenizer, prompts, sampling, generator, advance)

    greedy = {rows[0].prompt_id: rows[0] for rows in sample(0.0, 1)}
    votes = {rows[0].prompt_id: rows for rows in sample(config.temperature, config.majority)} if config.majority else {}
    samples = list(_samples(questions, greedy, votes))

    def accuracy(column: str) -> Estimate:
        right = [row[column] for row in samples]
        return accuracy_summary(right, config.confidence, config.interval, seed)

    single = None
    if config.majority:
        values = [float(right) for row in samples for right in row["votes_correct"]]
        clusters = [row["prompt_id"] for row in samples for _ in row["votes_correct"]]
        single = clustered_mean(values, clusters, config.confidence, seed)
    options = [question.options for question in questions]
    return Answered(
        greedy=accuracy("correct"),
        votes=accuracy("majority_correct") if config.majority else None,
        single=single,
        chance=sum(1 / count for count in options) / len(options) if all(options) else None,
        too_long=len(questions) - len(asked),
        unfinished=sum(not row.finished for row in greedy.values()),
        samples=samples,
    )


def _samples(
    questions: Sequence[Question], greedy: dict[str, Rollout], votes: dict[str, list[Rollout]]
) -> Iterator[dict[str, Any]]:
    """Yield one row a question; a question that could not be asked has an empty response, which is wrong."""
    size = len(next(iter(votes.values()))) if votes else 0
    for question in questions:
        name = question.prompt.id
        first = greedy.get(name) or Rollout(name, "", finished=False)
        row: dict[str, Any] = {
            "prompt_id": name,
            "prompt": question.prompt.messages[-1]["content"],
            "response": first.text,
            "finished": first.finished,
            "answer": first.answer,
            "gold": question.answers[0],
            "correct": question.right(first.answer),
        }
        if size:
            answers = [rollout.answer for rollout in votes[name]] if name in votes else [None] * size
            row["votes"] = answers
            row["votes_correct"] = [question.right(answer) for answer in answers]
            row["majority"] = majority(answers)
            row["majority_correct"] = question.right(row["majority"])
        yield row
