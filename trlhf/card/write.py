"""The text of a model card, and where it is written: beside the weights that it is about."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlhf import files
from trlhf.card.command import command_of
from trlhf.card.facts import Facts, read_facts
from trlhf.card.header import base_name, header, test_set
from trlhf.card.limitations import limitations
from trlhf.evaluation.report import shown

if TYPE_CHECKING:
    from trlhf.config import CardConfig, Config
    from trlhf.run import RunDirectory

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("card.md.jinja")
INTERVALS = {"wilson": "Wilson's interval", "bootstrap": "the bootstrap's interval"}
log = logging.getLogger("trlhf")


def write_cards(config: Config, run: RunDirectory) -> list[Path]:
    """Write the card of the last model of a run into its folder, and into that of its adapter where there is one.

    The same run gets the same card, byte for byte; a card that says it already is not touched.

    Args:
        config: ``card`` and ``push`` matter; everything else is read from the run.
        run: with at least a complete sft stage.

    Returns:
        The folders, the model's first.

    Raises:
        UserError: there is no model.
    """
    facts = read_facts(run)
    name = name_of(facts, config)
    folders = [run.stage(facts.stage).require("model", made_by=f"stage={facts.stage}")]
    if (adapter := run.stage(facts.stage).path / "adapter").exists():
        folders.append(adapter)
    for folder in folders:
        text = card_text(facts, config, name, folders[0], adapter=folder == adapter)
        path = folder / CARD
        if not path.exists() or path.read_bytes() != text.encode():
            files.write_bytes(path, text.encode())
            log.info("card: %s", path)
    return folders


def name_of(facts: Facts, config: Config) -> str:
    """Return the model's name: ``card.name``, the repository that it is pushed to, or base and algorithm."""
    algorithm = "sft" if facts.stage == "sft" else facts.config.rl.algorithm
    return config.card.name or config.push or f"{base_name(facts.config).rpartition('/')[2]}-{algorithm}"


def card_text(facts: Facts, config: Config, name: str, model: Path, *, adapter: bool) -> str:
    """Return the whole card.

    Args:
        facts: of the run.
        config: ``card`` and ``push`` matter: what only the user can say.
        name: of the model.
        model: its folder, for the chat template.
        adapter: whether the card is for the adapter alone.
    """
    from huggingface_hub import ModelCard
    from jinja2 import Environment, StrictUndefined

    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(
        TEMPLATE.read_text("utf-8")
    )
    text = template.render(
        card_data=header(facts, config.card, name, adapter=adapter).to_yaml(),
        name=name,
        adapter=adapter,
        pushed=config.push,
        **_values(facts, config.card),
        **_prompt(facts, model),
    )
    return str(ModelCard(text))  # parsed once: what cannot be read back is not written


def _values(facts: Facts, card: CardConfig) -> dict[str, Any]:
    config, contamination = facts.config, facts.stages.get("check")
    models: Mapping[str, Any] = facts.stages.get("eval", {}).get("models", {})
    versions = dict(facts.summary.get("versions", {}))
    shown = list(models)[: list(models).index(facts.stage) + 1] if facts.measured else []
    kinds = facts.measured.get("by_kind", {})
    return {
        "base": base_name(config),
        "training": _training(facts),
        "version": versions.pop("trlhf", "of an unknown version"),
        "versions": ", ".join(f"{package} {version}" for package, version in versions.items()),
        "commits": ", ".join(facts.commits),
        "command": command_of(config, facts.stage),
        "accuracy": facts.measured.get("accuracy"),
        "test_name": test_set(config)[1],
        "max_new_tokens": config.evaluation.max_new_tokens,
        "dtype": config.model.dtype,
        "template": f"`{Path(config.template.name).name}`",
        "data": list(_data(facts)),
        "models": [(one, models[one]["accuracy"]) for one in shown if models[one]["accuracy"]],
        "interval": f"{config.evaluation.confidence:.0%} by {INTERVALS[config.evaluation.interval]}",
        "tests": list(_tests(facts)),
        "suites": list(_suites(facts)),
        "kind_models": shown,
        "kinds": [(kind, [_rate(models[x]["by_kind"].get(kind)) for x in shown], one) for kind, one in kinds.items()],
        "contamination": contamination,
        "sets": [(_last(source), one) for source, one in contamination["sets"].items()] if contamination else [],
        "cleaned": _cleaned(facts),
        "limitations": list(limitations(facts, card)),
        "percent": lambda value: f"{value:.1%}",
        "percent0": lambda value: f"{value:.0%}",
    }


def _prompt(facts: Facts, model: Path) -> dict[str, Any]:
    from trlhf.models import load_tokenizer

    tokenizer: Any = load_tokenizer(model)
    if facts.example is None:
        return {"example": None, "prompt": "", "eos": tokenizer.eos_token}
    chat = [{"role": "user", "content": facts.example["prompt"]}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return {"example": facts.example, "prompt": prompt, "eos": tokenizer.eos_token}


def _training(facts: Facts) -> str:
    recipe = f" by the recipe `{facts.config.experiment}`" if facts.config.experiment else ""
    imitated = f"supervised fine-tuning{' on native chains of thought' if facts.native else ''}{recipe}"
    return imitated if facts.stage == "sft" else f"{imitated} and targeted RLHF ({facts.config.rl.algorithm.upper()})"


def _data(facts: Facts) -> Iterator[tuple[str, str]]:
    data, sft = facts.config.data, facts.stages.get("sft", {})
    source = {"micro": "the embedded world", "gsm8k": "GSM8K, as native chain of thought"}
    if sft:
        if data.mixture:
            yield from _mixture(facts)
        named = source.get(data.name) or ("all of them" if data.mixture else _last(data.sft))
        yield f"demonstrations ({named})", f"{sft['demonstrations']:,}"
        yield "their response tokens", f"{sft['response_tokens']:,}"
    if facts.stage == "rl":
        most = f"at most {data.pool_prompts:,}" if data.pool_prompts else "all"
        yield f"prompts to learn from ({source.get(data.name) or _last(data.pool)})", most
        labels = facts.stages["rl"]["labels"]
        yield "labels bought, of the budget", f"{labels['spent']:g} of {labels['budget']:g}"
        for (kind, outcome), count in sorted(facts.labels.items()):
            yield f"{kind}: {outcome}", f"{count:,}"
        if data.labels:
            yield "labels that came with the data", _last(data.labels)
    if facts.measured.get("accuracy"):
        yield "held-out reasoning prompts", f"{facts.measured['accuracy']['n']:,}"


def _mixture(facts: Facts) -> Iterator[tuple[str, str]]:
    """Yield how much each data set of a mixture gave: chats, and how often each counts where that is not once."""
    for name, one in facts.config.data.mixture.items():
        found = facts.data.get(f"{name}: {one.path}")
        weight = f", each {one.weight:g} times" if one.weight > 1 else ""
        rows = f"{found['kept']:,} of {found['read']:,} rows{weight}" if found else "not noted"
        yield f"chats of {_last(one.path)}", rows


def _suites(facts: Facts) -> Iterator[tuple[str, str, str, str, str, int]]:
    """Yield suite, task with its metric, shots, value, interval and number of questions."""
    for (suite, task), one in facts.suites.items():
        mark = " †" if one.get("at_chance") else ""
        shots = "by task" if one["shots"] < 0 else str(one["shots"])
        span = f"{shown(one, 'low')} to {shown(one, 'high')}"
        yield suite, f"{task}, {one['metric']}", shots, f"{shown(one)}{mark}", span, one["n"]


def _tests(facts: Facts) -> Iterator[str]:
    """Yield the paired tests up to this model, and how often it wins where taste decides."""
    for pair, found in facts.stages.get("eval", {}).get("paired", {}).items():
        before, after = pair.split("→")
        if test := found.get("mcnemar"):
            yield (
                f"{before} to {after}: {test['gained']} newly right, {test['lost']} newly wrong "
                f"(McNemar's exact p = {test['p']:.2g})."
            )
        if wins := found.get("win_rate"):
            yield (
                f"On open prompts {after} wins {wins['value']:.0%} [{wins['low']:.0%}, {wins['high']:.0%}] against "
                f"{before}, by the simulated person's true taste."
            )
        if after == facts.stage:
            return


def _cleaned(facts: Facts) -> str:
    found = sum(facts.stages.get("check", {}).get("offending", {}).values())
    if not found:
        return "No training row is too close to an item."
    return (
        f"{found:,} training rows are too close; they were {'left out' if facts.config.data.decontaminate else 'kept'}."
    )


def _rate(one: Mapping[str, Any] | None) -> str:
    return f"{one['value']:.1%}" if one else "–"


def _last(path: str | None) -> str:
    """Return a file's name without its folders; a name on the hub stays whole."""
    return (
        Path(path or "").name if Path(path or "").exists() or (path or "").startswith(("/", ".", "~")) else path or ""
    )
