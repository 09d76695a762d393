"""What a run works on: demonstrations, a pool to learn from, held-out tests, and who can answer questions on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from trlhf.config import Config
from trlhf.data import LabelledPair, LabelledResponse, prompts_from_rows, read_rows
from trlhf.errors import UserError
from trlhf.labelers.exact import ExactVerifier
from trlhf.labelers.simulated import SimulatedPerson
from trlhf.seeding import python_rng
from trlhf.types import Demonstration, Labeler, Prompt, RowReport

T = TypeVar("T")
Taste = Callable[[Prompt, str], float]


@dataclass(frozen=True)
class Task:
    """Everything that the stages read.

    Attributes:
        demonstrations: for SFT.
        pool: prompts without answers, for the reward and rl stages.
        test: held-out prompts.
        test_answers: gold answers of the test prompts, for evaluation only.
        labelled: verdicts that exist already and cost nothing.
        pairs: preferences that exist already and cost nothing.
        taste: the simulated person's true taste, for evaluation only; None where there is none.
        reports: what became of the rows that were read.
        too_long: held-out prompts that leave no room for a response; they count as wrong.
    """

    demonstrations: Sequence[Demonstration]
    pool: Sequence[Prompt]
    test: Sequence[Prompt]
    test_answers: dict[str, str]
    labelled: Sequence[LabelledResponse] = ()
    pairs: Sequence[LabelledPair] = ()
    taste: Taste | None = None
    reports: Sequence[RowReport] = ()
    too_long: Sequence[Prompt] = ()
    _pool_answers: dict[str, str] = field(default_factory=dict)

    def labeler(self, config: Config) -> Labeler:
        """Return who answers questions about the pool; nobody else sees its gold answers."""
        if config.labeler.name == "exact":
            return ExactVerifier(self._pool_answers)
        if self.taste is None:
            raise UserError("labeler=simulated: only the embedded world has a simulated person; use labeler=exact")
        return SimulatedPerson(
            self._pool_answers, self.taste, config.labeler.noise, config.labeler.position_bias, config.seed
        )

    def answerable(self, config: Config) -> list[Prompt]:
        """Return the pool prompts that the labeller can be asked about.

        The exact verifier knows nothing about taste, and nothing about prompts without a gold answer.
        """
        if config.labeler.name == "exact":
            return [prompt for prompt in self.pool if prompt.id in self._pool_answers]
        return list(self.pool)


def load_task(config: Config) -> Task:
    """Load what ``config.data`` names, only as much of it as the stages of this run need.

    Raises:
        UserError: a file is missing, empty or malformed; the message names file and line.
    """
    if config.data.name == "micro":
        return _micro(config)
    return _cap_labels(_gsm8k(config) if config.data.name == "gsm8k" else _file(config), config)


def _micro(config: Config) -> Task:
    from trlhf.micro.taste import taste
    from trlhf.micro.world import generate

    data = config.data
    train = generate("train", data.sft_prompts, config.seed)
    pool = generate("pool", data.pool_prompts, config.seed)
    test = generate("test", data.test_prompts)
    return Task(
        demonstrations=[item.demonstration for item in train],
        pool=[item.prompt for item in pool],
        test=[item.prompt for item in test],
        test_answers={item.prompt.id: item.answer for item in test if item.answer is not None},
        taste=taste,
        _pool_answers={item.prompt.id: item.answer for item in pool if item.answer is not None},
    )


def _gsm8k(config: Config) -> Task:
    from trlhf.sft.gsm8k import gsm8k_splits

    data = config.data
    splits = gsm8k_splits(
        data.path or "",
        sft_prompts=data.sft_prompts,
        pool_prompts=data.pool_prompts,
        test_prompts=data.test_prompts,
        seed=config.seed,
        mirror=data.mirror,
    )
    return Task(
        demonstrations=splits.demonstrations,
        pool=splits.pool,
        test=splits.test,
        test_answers=splits.test_gold,
        labelled=splits.labelled,
        reports=splits.reports,
        _pool_answers=splits.pool_gold,
    )


def _file(config: Config) -> Task:
    from trlhf.reward.labelled import read_labelled

    data, wanted = config.data, config.stage
    demonstrations: list[Demonstration] = []
    pool: list[Prompt] = []
    test: list[Prompt] = []
    pool_answers: dict[str, str] = {}
    test_answers: dict[str, str] = {}
    labelled: Sequence[LabelledResponse] = ()
    pairs: Sequence[LabelledPair] = ()
    reports: list[RowReport] = []
    if (data.sft or data.mixture) and wanted in ("all", "sft"):
        demonstrations, found = _demonstrations(config)
        reports += found
    if data.pool and wanted in ("all", "reward", "rl"):
        pool, pool_answers, report = prompts_from_rows(read_rows(data.pool, mirror=data.mirror), data.pool)
        pool = _at_most(pool, data.pool_prompts, config, "pool")
        reports.append(report)
    if data.test and wanted in ("all", "eval"):
        rows = read_rows(data.test, "test", data.mirror)
        test, test_answers, report = prompts_from_rows(rows, data.test, answers="required")
        test = _at_most(test, data.test_prompts, config, "test")
        reports.append(report)
    if data.labels and wanted in ("all", "reward", "rl"):
        existing = read_labelled(data.labels, data.mirror)
        labelled, pairs = existing.responses, existing.pairs
        reports.append(existing.report)
    return Task(demonstrations, pool, test, test_answers, labelled, pairs, None, reports, (), pool_answers)


def _demonstrations(config: Config) -> tuple[list[Demonstration], list[RowReport]]:
    from trlhf.sft.formats import demonstrations_from_rows
    from trlhf.sft.mixture import is_mixed, mixed_demonstrations

    data = config.data
    if not is_mixed(config):
        rows = read_rows(str(data.sft), mirror=data.mirror)
        found, report = demonstrations_from_rows(rows, str(data.sft), multi_turn=config.sft.multi_turn)
        return _at_most(found, data.sft_prompts, config, "sft"), [report]
    found, reports = mixed_demonstrations(config)
    chosen = _at_most(found, data.sft_prompts, config, "sft")
    if len(chosen) < len(found):
        total = RowReport("demonstrations of all data sets", len(found), len(chosen))
        kept = set(map(id, chosen))
        for demonstration in found:
            if id(demonstration) not in kept:
                total.drop(f"more than data.sft_prompts={data.sft_prompts}; drawn at random", demonstration.source)
        reports.append(total)
    return chosen, reports


def _cap_labels(task: Task, config: Config) -> Task:
    """Leave at most ``reward.max_labelled`` of the labels that come with the data, and report the others."""
    if not config.reward.max_labelled or not (task.labelled or task.pairs):
        return task  # and load no torch for it: the check needs none
    from trlhf.reward.split import Labels, at_most

    given, most = Labels(task.labelled, task.pairs), config.reward.max_labelled
    kept = at_most(given, most, config.seed)
    if len(kept) == len(given):
        return task
    report = RowReport("labels that come with the data", len(given), len(kept))
    taken = {*map(id, kept.responses), *map(id, kept.pairs)}
    sources = [(id(label), label.source) for label in given.responses]
    sources += [(id(label), label.source) for label in given.pairs]
    for label, source in sources:
        if label not in taken:
            report.drop(f"more than reward.max_labelled={most}; drawn by prompt, at random", source)
    return replace(task, labelled=kept.responses, pairs=kept.pairs, reports=[*task.reports, report])


def _at_most(rows: list[T], count: int, config: Config, name: str) -> list[T]:
    """Return a seeded sample of ``count`` rows in their order; 0 means all."""
    if not count or len(rows) <= count:
        return rows
    chosen = set(python_rng(config.seed, "rows", name).sample(range(len(rows)), count))
    return [row for i, row in enumerate(rows) if i in chosen]
