"""When the rl stage stops early: the policy far outside of its bounds, over-optimised, or as a rule says. Pure rules.

The state is a dictionary of plain values, so that it can lie in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

from trlhf.rl.records import Record, broken_rule
from trlhf.targeting.stopping import anchor_kl_over_budget

KL_STEPS = 2  # in a row beyond the bound
STANDARD_ERRORS = 2.0  # that the held-out accuracy must fall by
Rates = Mapping[str, float]  # prompt id → share of its samples that are right


class RoundResult(TypedDict):
    """What a round reached.

    ``step``: its last step. ``reward``: mean training reward of its steps. ``rates``: pass rate of each held-out
    prompt, None where nothing was measured.
    """

    step: int
    reward: float
    rates: dict[str, float] | None


class Health(TypedDict):
    """What the rules remember.

    ``beyond``: steps in a row beyond the KL bound. ``anchor_kls``: of the steps in a row beyond the anchors' bound.
    ``good``: the last step after which the policy was found within both. ``rewards``, ``tokens``: of the steps of the
    round under way. ``rounds``, ``records``: of those that are over. ``stopped``: why the stage ends early, in a
    sentence; None as long as all is well. ``restore``: the last step whose policy may then be kept.
    """

    beyond: int
    anchor_kls: list[float]
    good: int
    rewards: list[float]
    tokens: list[float]
    rounds: list[RoundResult]
    records: list[Record]
    stopped: str | None
    restore: int | None


def new_health() -> Health:
    """Return the state before the first step."""
    return {
        "beyond": 0, "anchor_kls": [], "good": 0, "rewards": [], "tokens": [], "rounds": [], "records": [],
        "stopped": None, "restore": None,
    }  # fmt: skip


def after_step(
    health: Health, step: int, metrics: Mapping[str, float], max_kl: float | None, max_anchor_kl: float | None = None
) -> Health:
    """Take the metrics of a step into account.

    Stops where ``kl_per_response`` (KL(policy ‖ reference), k1, nats per response) was beyond ``max_kl`` in `KL_STEPS`
    steps in a row, or ``anchor_kl`` (KL(reference ‖ policy) on the anchors, nats per token) beyond ``max_anchor_kl``.
    Steps that did not measure one count neither way; a value that is not finite is beyond. The first is that of the
    step's fresh samples, so of the policy after the step before; the second is taken while the policy is updated.
    """
    news: Health = {**health, "rewards": [*health["rewards"], metrics["reward"]]}
    if "response_tokens" in metrics:
        news["tokens"] = [*health["tokens"], metrics["response_tokens"]]
    kl, anchor_kl = metrics.get("kl_per_response"), metrics.get("anchor_kl")
    measured = [(kl, max_kl), (anchor_kl, max_anchor_kl)]
    inside = [value <= bound for value, bound in measured if value is not None and bound is not None]
    if inside and all(inside):
        news["good"] = step - 1
    reason = None
    if kl is not None and max_kl is not None:
        news["beyond"] = 0 if kl <= max_kl else health["beyond"] + 1
        if news["beyond"] >= KL_STEPS:
            reason = (
                f"the policy left its reference: kl_per_response={kl:.4g} nats at step {step}, above "
                f"rl.max_kl={max_kl:g} in {KL_STEPS} steps in a row; lower rl.learning_rate, raise rl.kl_coef or "
                "rl.anchor_coef, or raise rl.max_kl"
            )
    if anchor_kl is not None and max_anchor_kl is not None:
        news["anchor_kls"] = [] if anchor_kl <= max_anchor_kl else [*health["anchor_kls"], anchor_kl]
        too_far = anchor_kl_over_budget(news["anchor_kls"], max_anchor_kl, KL_STEPS)
        reason = reason or (too_far and f"{too_far}, or raise rl.max_anchor_kl")
    if reason is not None and news["stopped"] is None:
        news["stopped"], news["restore"] = reason, news["good"]
    return news


def after_round(health: Health, step: int, rates: Rates | None, patience: int) -> Health:
    """Close a round, whose last step is ``step``; stops where the policy is over-optimised (see `is_over_optimised`).

    Args:
        health: after the round's last step.
        step: number of that step.
        rates: pass rate of each held-out prompt; None where none was measured.
        patience: rounds in a row; 0 never stops.
    """
    rewards = health["rewards"]
    result: RoundResult = {
        "step": step,
        "reward": sum(rewards) / len(rewards) if rewards else math.nan,
        "rates": None if rates is None else dict(rates),
    }
    rounds = [*health["rounds"], result]
    news: Health = {**health, "rewards": [], "tokens": [], "rounds": rounds}
    if news["stopped"] is None and is_over_optimised(rounds, patience):
        best = rounds[best_round(rounds[:-patience]) or 0]
        news["restore"] = best["step"]
        news["stopped"] = (
            f"over-optimised: in {patience} rounds in a row, up to step {step}, the training reward was above that of "
            f"step {best['step']} ({result['reward']:.3f}, then {best['reward']:.3f}) and held-out accuracy more than "
            f"{STANDARD_ERRORS:g} standard errors below ({mean(result['rates']):.1%}, then {mean(best['rates']):.1%}); "
            "lower rl.learning_rate or rl.rounds, raise rl.kl_coef or rl.uncertainty_penalty, or set "
            "rl.held_out_patience=0 to go on all the same"
        )
    return news


def after_record(health: Health, record: Record, rules: Sequence[str]) -> Health:
    """Note what a round was like; stops where one of ``rules`` says so.

    Args:
        health: after `after_round`.
        record: of the round.
        rules: names of `trlhf.rl.records.RULES`.
    """
    records = [*health["records"], record]
    news: Health = {**health, "records": records}
    if news["stopped"] is not None:
        return news
    found = broken_rule(records, rules)
    return news if found is None else {**news, "stopped": found[0], "restore": found[1]}


def is_over_optimised(rounds: Sequence[RoundResult], patience: int) -> bool:
    """Say whether each of the last ``patience`` rounds was worse than the best round before them, though it paid more.

    Worse: mean(d) < -2·sd(d)/√n over the n held-out prompts, where d is the prompt's pass rate in the round less that
    in the best round, and its mean training reward is higher than the best round's. Goodhart's signature, after Gao et
    al., https://arxiv.org/abs/2210.10760.

    False alarms on pure noise (16 prompts of any difficulty, 32 samples, 4 rounds, patience 2), 4,000 runs: 1.8% where
    the reward rises in every round, 0.4% where it is noise too; with 8 rounds 7.3% and 3.1%, since the best of many
    rounds is partly luck; with patience 1 already 14% and 7% in 4 rounds. 8 samples give the same within the error.
    """
    before = rounds[:-patience] if patience else []
    best = best_round(before)
    if best is None:
        return False
    return all(
        result["reward"] > before[best]["reward"] and has_fallen(before[best]["rates"], result["rates"])
        for result in rounds[-patience:]
    )


def best_round(rounds: Sequence[RoundResult]) -> int | None:
    """Return the index of the round with the highest held-out accuracy, the earliest of equals; None without any."""
    measured = [i for i, result in enumerate(rounds) if result["rates"]]
    return max(measured, key=lambda i: (mean(rounds[i]["rates"]), -i), default=None)


def has_fallen(before: Rates | None, after: Rates | None) -> bool:
    """Say whether pass rates fell by more than `STANDARD_ERRORS` standard errors of their paired differences."""
    if before is None or after is None:
        return False
    differences = [after[name] - before[name] for name in before if name in after]
    n = len(differences)
    if n < 2:
        return False
    average = sum(differences) / n
    variance = sum((x - average) ** 2 for x in differences) / (n - 1)
    return average < -STANDARD_ERRORS * math.sqrt(variance / n) - 1e-12


def protected(health: Health, steps: Sequence[int]) -> set[int]:
    """Return which of the steps that have a checkpoint must keep it: those that a stop would go back to.

    That of the best round, that of the round before the one under way or, after a stop, that which is gone back to,
    and, while the policy is beyond a bound, the last one within it.
    """
    best = best_round(health["rounds"])
    kept = set() if best is None else {health["rounds"][best]["step"]} & set(steps)
    begun = health["records"][-1]["step"] if health["records"] else 0
    kept |= {begun if health["restore"] is None else health["restore"]} & set(steps)
    beyond = health["beyond"] or health["anchor_kls"]
    within = [step for step in steps if step <= health["good"]] if beyond else []
    return kept | set(within and [max(within)])


def held_out_accuracies(health: Health) -> list[float | None]:
    """Return the held-out accuracy after each round; None where nothing was measured."""
    return [mean(result["rates"]) if result["rates"] else None for result in health["rounds"]]


def mean(rates: Rates | None) -> float:
    """Return the accuracy, each prompt counting alike; nan where nothing was measured."""
    return sum(rates.values()) / len(rates) if rates else math.nan
