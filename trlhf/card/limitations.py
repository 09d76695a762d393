"""What a card has to warn of, as far as the run itself shows it."""

from __future__ import annotations

from collections.abc import Iterator

from trlhf.card.facts import Facts
from trlhf.card.header import licence_of, test_set
from trlhf.config import CardConfig

FEW = 1000  # prompts; with fewer an interval is several points wide


def limitations(facts: Facts, card: CardConfig) -> Iterator[str]:
    """Yield one sentence each, the general ones last."""
    if licence_of(facts.config, card) is None:
        yield "No licence is stated here; the base and the data have theirs."
    yield from _of_the_model(facts)
    yield from _of_the_measurement(facts)
    yield "Nothing was trained or tested for safety: it may follow harmful requests."
    yield "Wrong answers sound as sure as right ones."
    if facts.native:
        yield "A chain of thought is text that ends in an answer; it need not be how the model came to it."


def _of_the_model(facts: Facts) -> Iterator[str]:
    config = facts.config
    if config.model.name == "micro":
        yield "The base is the embedded one of 0.9 million parameters: it knows one small generated world, no language."
    if facts.stage == "sft":
        yield "It imitates demonstrations only; no reinforcement learning was done."
        return
    if reason := facts.stages["rl"].get("stopped"):
        yield f"The RL stage ended early: {reason}."
    if config.labeler.name == "simulated":
        errs = f", which errs in {config.labeler.noise:.0%} of its answers" if config.labeler.noise else ""
        yield f"Its labels come from a simulated person{errs}, not from people."
    else:
        yield "Its labels compare final answers with gold ones: how they are reached was judged by nobody."
    if not any(kind == "preference" for kind, _ in facts.labels) and config.labeler.name == "simulated":
        yield "No preferences were bought: taste was not trained."


def _of_the_measurement(facts: Facts) -> Iterator[str]:
    accuracy = facts.measured.get("accuracy")
    name = test_set(facts.config)[1]
    if not accuracy and not facts.suites:
        yield "No accuracy was measured."
        return
    suites = list(dict.fromkeys(suite for suite, _ in facts.suites))
    where = [f"{name}, greedy and zero-shot"] * bool(accuracy) + [f"the suites {', '.join(suites)}"] * bool(suites)
    yield (
        f"Measured on {', and '.join(where)} alone, in one run of one seed ({facts.config.seed}); nothing is known of "
        "other tasks."
    )
    if not accuracy:
        return
    if accuracy["n"] < FEW:
        yield (
            f"{accuracy['n']} prompts leave an interval of {100 * (accuracy['high'] - accuracy['low']):.1f} points; it "
            "holds for new prompts of the same kind, not for new training runs."
        )
    if unfinished := facts.measured.get("unfinished"):
        tokens = facts.config.evaluation.max_new_tokens
        yield f"{unfinished:.1%} of its responses did not end within {tokens} tokens."
    if lost := _lost(facts):
        yield f"Less right than after SFT: {', '.join(lost)}."
    if facts.stages["eval"].get("too_long"):
        yield f"{facts.stages['eval']['too_long']} held-out prompts were too long to be asked, and count as wrong."


def _lost(facts: Facts) -> list[str]:
    """Return the kinds of prompts on which SFT alone was right more often, with both rates."""
    before = facts.stages["eval"]["models"].get("sft", {}).get("by_kind", {}) if facts.stage == "rl" else {}
    after = facts.measured["by_kind"]
    return [
        f"{kind} ({before[kind]['value']:.0%} to {one['value']:.0%}, n = {one['n']})"
        for kind, one in after.items()
        if kind in before and one["value"] < before[kind]["value"]
    ]
