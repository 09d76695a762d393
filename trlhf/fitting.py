"""Which prompts can be worked on: those that leave room for a response, and that the labeller can judge."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from trlhf.config import Config
from trlhf.errors import UserError
from trlhf.models import encode_prompt
from trlhf.tasks import Task
from trlhf.types import Prompt, RowReport


def fit_task(task: Task, config: Config, tokenizer: PreTrainedTokenizerBase, stages: Collection[str]) -> Task:
    """Leave out the pool prompts that cannot be used, and set aside the test prompts that cannot be answered.

    Nothing is truncated. A pool prompt is left out; a test prompt moves to ``too_long``, where it counts as wrong. The
    reports of the result are only about this.

    Args:
        task: as it was loaded.
        config: ``model.max_length``, the two ``max_new_tokens`` and ``labeler.name`` matter.
        tokenizer: with the chat template of the run.
        stages: those that are to be run; the others' prompts are not looked at.

    Raises:
        UserError: no prompt is left.
    """
    task = replace(task, reports=[])
    if task.pool and not {"reward", "rl"}.isdisjoint(stages):
        pool, answerless = _judged(task.answerable(config), task.pool, config)
        fitting, _, long = _split(pool, tokenizer, config, "pool", "rl.max_new_tokens", config.rl.max_new_tokens)
        task = replace(task, pool=fitting, reports=[answerless, long])
    if task.test and "eval" in stages:
        new_tokens = config.evaluation.max_new_tokens
        fitting, too_long, report = _split(
            task.test, tokenizer, config, "test", "evaluation.max_new_tokens", new_tokens
        )
        task = replace(task, test=fitting, too_long=too_long, reports=[*task.reports, report])
    return replace(task, reports=[report for report in task.reports if report.dropped])


def _judged(kept: Sequence[Prompt], pool: Sequence[Prompt], config: Config) -> tuple[Sequence[Prompt], RowReport]:
    report = RowReport("pool prompts", read=len(pool), kept=len(kept))
    if not kept:
        raise UserError(
            f"data.pool: none of the {len(pool)} prompts has a gold answer, which labeler={config.labeler.name} needs "
            "to judge a response; give the rows a column 'answer'"
        )
    ids = {prompt.id for prompt in kept}
    for prompt in pool:
        if prompt.id not in ids:
            report.drop(f"no gold answer, which labeler={config.labeler.name} needs", prompt.id)
    return kept, report


def _split(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, config: Config, part: str, key: str, new_tokens: int
) -> tuple[list[Prompt], list[Prompt], RowReport]:
    """Return the prompts that fit, those that do not, and the report on them."""
    limit = config.model.max_length
    lengths = [len(encode_prompt(tokenizer, prompt.messages)) for prompt in prompts]
    if min(lengths) + new_tokens > limit:
        raise UserError(
            f"data.{part}: all {len(prompts)} prompts are too long: the shortest has {min(lengths)} tokens, and with "
            f"{key}={new_tokens} more it exceeds model.max_length={limit}; raise model.max_length, lower {key}, or "
            "give shorter prompts"
        )
    fitting = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length + new_tokens <= limit]
    too_long = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length + new_tokens > limit]
    report = RowReport(f"{part} prompts", read=len(prompts), kept=len(fitting))
    for prompt in too_long:
        report.drop(
            f"with {key}={new_tokens} more tokens they exceed model.max_length={limit}"
            + (", so they count as wrong" if part == "test" else ""),
            prompt.id,
        )
    return fitting, too_long, report
