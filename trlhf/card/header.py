"""The YAML header of a card, which the hub reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from trlhf.card.facts import Facts
from trlhf.config import CardConfig, Config
from trlhf.evaluation.suites import SUITES
from trlhf.hub import DATA as HUB_DATA

EMBEDDED = "trlhf/embedded-world"  # no name on the hub: it is made by the library


def header(facts: Facts, card: CardConfig, name: str, *, adapter: bool) -> ModelCardData:
    """Return base model, data sets, licence, language and the results as ``model-index``.

    Args:
        facts: of the run.
        card: what only the user can say.
        name: of the model.
        adapter: whether it stands beside an adapter instead of whole weights.
    """
    config = facts.config
    return ModelCardData(
        language=list(card.language),
        license=licence_of(config, card),
        base_model=base_name(config),
        datasets=datasets_of(config, card, facts.stage) or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=list(_tags(facts)),
        model_name=name,
        eval_results=[*results(facts), *suite_results(facts)] or None,
    )


def licence_of(config: Config, card: CardConfig) -> str | None:
    """Return the licence; the embedded base has the library's, of any other only the user knows."""
    return card.license or ("apache-2.0" if config.model.name == "micro" else None)


def results(facts: Facts) -> list[EvalResult]:
    """Return the accuracy on the held-out prompts with its interval; [] where it was not measured."""
    accuracy = facts.measured.get("accuracy")
    if not accuracy:
        return []
    kind, name, split = test_set(facts.config)
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation, zero-shot, greedy",
            dataset_type=kind,
            dataset_name=name,
            dataset_split=split,
            metric_type="accuracy",
            metric_name="accuracy",
            metric_value=round(accuracy["value"], 4),
            metric_args={
                "n": accuracy["n"],
                "low": round(accuracy["low"], 4),
                "high": round(accuracy["high"], 4),
                "confidence": facts.config.evaluation.confidence,
                "interval": facts.config.evaluation.interval,
            },
        )
    ]


def suite_results(facts: Facts) -> Iterator[EvalResult]:
    """Yield what each task of a suite came to, under the hub's name of its data; their mean has no data of its own."""
    for (suite, name), one in facts.suites.items():
        task = next((task for task in SUITES[suite].tasks if task.name == name.partition(" ")[0]), None)  # gsm8k maj@8
        if task is None:
            continue
        data = task.data or _source_of(facts.config, suite)
        yield EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=data,
            dataset_name=data,
            metric_type=one["metric"],
            metric_name=f"{name} ({one['metric']})",
            metric_value=round(one["value"], 4),
            metric_args={
                "suite": suite,
                "num_few_shot": one["shots"],
                "n": one["n"],
                "low": round(one["low"], 4),
                "high": round(one["high"], 4),
                "confidence": facts.config.evaluation.confidence,
                "harness": one["protocol"]["harness"],
            },
        )


def _source_of(config: Config, suite: str) -> str:
    """Return what a suite without a data set of its own was asked from, without the folders above a file."""
    given = config.evaluation.file if suite == "file" else config.evaluation.mt_bench.questions
    return given.partition(":")[0] if given and _on_hub(given) else Path(given or suite).stem


def _tags(facts: Facts) -> Iterator[str]:
    yield "trlhf"
    if facts.native:
        yield "chain-of-thought"
    yield facts.stage if facts.stage == "sft" else facts.config.rl.algorithm


def base_name(config: Config) -> str:
    """Return the base model's name, without the folders above a local one."""
    return Path(config.model.name).name if Path(config.model.name).is_absolute() else config.model.name


def test_set(config: Config) -> tuple[str, str, str]:
    """Return identifier, name and split of what was evaluated on."""
    data = config.data
    if data.name == "micro":
        return EMBEDDED, "trlhf's embedded world", "test"
    if data.name == "gsm8k":
        return "openai/gsm8k", "GSM8K", "test"
    given = data.test or "unknown"
    return (given.partition(":")[0], given, "test") if _on_hub(given) else (Path(given).stem, Path(given).name, "test")


def datasets_of(config: Config, card: CardConfig, stage: str) -> list[str]:
    """Return the names on the hub of the data that a model was trained on, as far as they have one.

    Args:
        config: of the run.
        card: names more of them.
        stage: ``sft``: the pool and the labels were not used.
    """
    data = config.data
    own = ["openai/gsm8k"] if data.name == "gsm8k" else [data.sft, *(one.path for one in data.mixture.values())]
    if data.name == "file" and stage == "rl":
        own += [data.pool, data.labels]
    named = [name.partition(":")[0] for name in own if name and _on_hub(name)]
    return list(dict.fromkeys([*card.datasets, *named]))


def _on_hub(name: str) -> bool:
    return HUB_DATA.fullmatch(name) is not None and not Path(name).exists()
