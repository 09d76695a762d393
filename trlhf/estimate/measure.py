"""The lengths of the data at hand, in tokens of the run's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlhf.config import Config
from trlhf.estimate.lengths import Lengths, lengths_of

if TYPE_CHECKING:
    from trlhf.tasks import Task

SOME = 64  # prompts, enough to tell what all begin with


def at_hand(config: Config) -> bool:
    """Say whether tokenizer and data lie on this machine, so that reading them downloads nothing."""
    data = config.data
    paths = [path for path in (data.path, data.sft, data.pool, data.test, data.labels) if path is not None]
    model = config.model.name == "micro" or Path(config.model.name).expanduser().is_dir()
    return model and all(Path(path).expanduser().exists() for path in paths)


def read_lengths(config: Config) -> Lengths:
    """Read the data that are at hand and measure them.

    Raises:
        UserError: what is there cannot be read.
    """
    from trlhf.models import load_tokenizer, model_path
    from trlhf.sft.templates import apply_template
    from trlhf.tasks import load_task

    model = config.model
    tokenizer = load_tokenizer(model_path(model.name), pad_token=model.pad_token, revision=model.revision)
    return measure(load_task(config), apply_template(tokenizer, config.template), config)


def measure(task: Task, tokenizer: Any, config: Config) -> Lengths:
    """Measure demonstrations and prompts; those that do not fit into ``model.max_length`` will not be used."""
    from trlhf.models import encode_prompt, encode_response

    rows = []
    for demonstration in task.demonstrations:
        *context, answer = demonstration.messages
        rows.append((len(encode_prompt(tokenizer, context)), len(encode_response(tokenizer, answer["content"]))))

    def fitting(prompts: Sequence[Any], response: int) -> list[int]:
        lengths = [len(encode_prompt(tokenizer, prompt.messages)) for prompt in prompts]
        return [length for length in lengths if length + response <= config.model.max_length]

    texts = [(label.prompt, label.response) for label in task.labelled]
    texts += [(pair.prompt, text) for pair in task.pairs for text in (pair.first, pair.second)]
    labelled = [
        len(encode_prompt(tokenizer, prompt.messages)) + len(encode_response(tokenizer, text)) for prompt, text in texts
    ]
    return lengths_of(
        [row for row in rows if sum(row) <= config.model.max_length],
        fitting(task.pool, config.rl.max_new_tokens),
        fitting(task.test, config.evaluation.max_new_tokens),
        config,
        [length for length in labelled if length <= config.model.max_length],
        _common([encode_prompt(tokenizer, prompt.messages) for prompt in [*task.pool, *task.test][-SOME:]]),
    )


def _common(rows: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all rows begin with."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))
