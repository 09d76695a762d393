"""The YAML header of a card, which the hub reads."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from trlhf.card.facts import Facts
from trlhf.config import CardConfig, Config
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
        datasets=datasets_of(config, card) or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["trlhf", "chain-of-thought", facts.stage if facts.stage == "sft" else config.rl.algorithm],
        model_name=name,
        eval_results=results(facts),
    )


def licence_of(config: Config, card: CardConfig) -> str | None:
    """Return the licence; the embedded base has the library's, of any other only the user knows."""
    return card.license or ("apache-2.0" if config.model.name == "micro" else None)


def results(facts: Facts) -> list[EvalResult] | None:
    """Return the accuracy with its interval; None where nothing was measured."""
    accuracy = facts.measured.get("accuracy")
    if not accuracy:
        return None
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


def datasets_of(config: Config, card: CardConfig) -> list[str]:
    """Return the names on the hub of the data that were trained on, as far as they have one."""
    data = config.data
    own = ["openai/gsm8k"] if data.name == "gsm8k" else [data.sft, data.pool, data.labels]
    named = [name.partition(":")[0] for name in own if name and _on_hub(name)]
    return list(dict.fromkeys([*card.datasets, *named]))


def _on_hub(name: str) -> bool:
    return HUB_DATA.fullmatch(name) is not None and not Path(name).exists()
