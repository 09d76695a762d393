"""Suites of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness): its tasks and its model class, unchanged.

What is ours is which tasks, how many shots, where the data lie, and the intervals.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.api.task
import numpy as np
from lm_eval import evaluate
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trlhf.config import EvaluationConfig
from trlhf.console import Advance, progress, quiet_libraries
from trlhf.errors import UserError
from trlhf.evaluation.means import mean_of_means, mean_summary
from trlhf.evaluation.mirror import mirrored
from trlhf.evaluation.statistics import Estimate
from trlhf.evaluation.suites import SuiteTask
from trlhf.models import first_line

TASKS = Path(lm_eval.__file__).parent / "tasks"
VERSION = importlib.metadata.version("lm_eval")


@dataclass(frozen=True)
class Outcome:
    """What came of one task.

    Attributes:
        estimate: the metric that counts, with its interval.
        also: further metrics.
        chance: what guessing would get; None where that is not known.
        members: name of each of lm-eval's tasks → its estimate, where there are several.
        truncated: questions that were too long for the model, whose beginning was cut off.
        samples: one row a question.
    """

    estimate: Estimate
    also: Mapping[str, Estimate]
    chance: float | None
    members: Mapping[str, Estimate]
    truncated: int
    samples: Sequence[Mapping[str, Any]]


class _Model(HFLM):  # type: ignore[misc]  # lm-eval is not typed
    """lm-eval's own model, with our progress bar, and a count of what it truncates."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, name: str) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._name = name
        self.truncated = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        with self._shown(requests):
            return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Any], *arguments: Any, **options: Any) -> Any:
        limit = self.max_length + 1
        self.truncated += sum(len(context) + len(continuation) > limit for _, context, continuation in requests)
        return super()._loglikelihood_tokens(requests, *arguments, **options)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        for context, options in (request.args for request in requests):
            room = self.max_length - options.get("max_gen_toks", self.max_gen_toks)
            if room <= 0:
                raise UserError(
                    f"{self._name}: a response may take {self.max_length - room} tokens, but the model's context of "
                    f"{self.max_length} leaves no room for the question; take a model with a longer one, or leave this "
                    "task out with evaluation.tasks=[…]"
                )
            self.truncated += len(self.tok_encode(context)) > room
        with self._shown(requests):
            return super().generate_until(requests, disable_tqdm=True)

    @contextmanager
    def _shown(self, requests: Sequence[Any]) -> Iterator[None]:
        with progress(self._name, len(requests)) as advance:
            self.cache_hook = _Counter(advance)
            yield


class _Counter:
    """Where lm-eval hands over each finished request; we only count them."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def add_partial(self, kind: str, request: Any, result: Any) -> None:
        self._advance(1)


def run_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: SuiteTask,
    config: EvaluationConfig,
    name: str,
    seed: int,
) -> Outcome:
    """Ask a model one task of a suite, as lm-eval does.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a chat template if ``config.chat_template``.
        task: which.
        config: batch size, limit, mirror, intervals.
        name: for the progress bar.
        seed: of bootstrap intervals.

    Raises:
        UserError: the data cannot be read.
    """
    with _quiet():
        asked = _Model(model, tokenizer, config.batch_size, name)
        found = evaluate(
            lm=asked,
            task_dict=_load(task, config.mirror),
            limit=config.limit or None,
            apply_chat_template=config.chat_template,
            fewshot_as_multiturn=config.chat_template,
            bootstrap_iters=0,  # the intervals are ours
        )
    samples = {name: [row for row in rows if row["filter"] == task.filter] for name, rows in found["samples"].items()}

    def estimate(metric: str) -> dict[str, Estimate]:
        return {
            member: mean_summary([float(row[metric]) for row in rows], config.confidence, config.interval, seed)
            for member, rows in samples.items()
        }

    members = estimate(task.metric)
    return Outcome(
        estimate=mean_of_means(list(members.values())),
        also={metric: mean_of_means(list(estimate(metric).values())) for metric in task.also},
        chance=_chance(task.metric, samples),
        members=members if len(members) > 1 else {},
        truncated=asked.truncated,
        samples=[_sample(member, row, (task.metric, *task.also)) for member, rows in samples.items() for row in rows],
    )


def _load(task: SuiteTask, mirror: str | None) -> dict[str, Any]:
    """Return lm-eval's tasks; nothing but their shots and where their data lie differs from its own files.

    Only the folder that is needed is read: an index of all folders takes 16 s.
    """
    changes: dict[str, Any] = {"num_fewshot": task.shots}
    if mirror is not None:
        path, cache = mirrored(mirror, task.data)
        changes |= {"dataset_path": path, "dataset_kwargs": {"cache_dir": cache}}
    group = {"group": f"trlhf_{task.name}", "task": [{"task": member, **changes} for member in task.members]}
    try:
        index = TaskManager(include_path=[TASKS / task.folder], include_defaults=False)
        loaded: dict[str, Any] = index.load([group])
    except Exception as error:  # datasets, the hub and the network each raise kinds of their own
        place = changes.get("dataset_path", task.data)
        raise UserError(
            f"{task.name}: its data {place} cannot be read ({first_line(error)}); "
            + ("correct that copy" if mirror else "check the connection, or give copies with evaluation.mirror=FOLDER")
        ) from error
    for member in loaded["tasks"].values():
        member.set_fewshot_seed(DEFAULT_OTHER_SEED)  # as its command line does: the same worked examples
    return loaded


def _chance(metric: str, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> float | None:
    """Return the mean of 1 / number of options, over questions and then over tasks; None for open questions."""
    rows = [row for member in samples.values() for row in member]
    options = [len(row["resps"]) for row in rows]
    if min(options) < 2 or any(row[metric] not in (0, 1) for row in rows):
        return None
    return float(np.mean([np.mean([1 / len(row["resps"]) for row in member]) for member in samples.values()]))


def _sample(member: str, row: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    """Return what a reader wants to see of one question, without the worked examples before it."""
    texts = [row["resps"][0][0]] if isinstance(row["resps"][0][0], str) else None
    return {
        "task": member,
        "question": row["doc_id"],
        "target": row["target"],
        "prompt_hash": row["prompt_hash"],
        **({"response": texts[0]} if texts else {"loglikelihoods": [found[0][0] for found in row["resps"]]}),
        **{metric: float(row[metric]) for metric in metrics},
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval to errors (it warns about each question that it truncates), and its bars off the screen."""
    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, lm_eval.api.task.tqdm
    logger.setLevel(logging.ERROR)
    quiet_libraries()
    lm_eval.api.task.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar
        quiet_libraries()
