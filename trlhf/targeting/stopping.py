"""When to stop buying labels, and when to stop updating. Pure rules: plain values by round in, a reason in words out.

Each rule returns a sentence with the figures, the bound and a remedy, or None as long as all is well or nothing can be
said. The bound on the policy's KL and over-optimisation against held-out accuracy are in `rl.health`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from trlhf.evaluation.statistics import bootstrap_interval

LEAST_ITEMS = 8  # a held-out gain from fewer says nothing
STANDARD_ERRORS = 2.0  # beyond chance, where the rule itself does not say

# ---- labels ----


def labels_buy_too_little(drops: Sequence[float], left: int, share: float = 0.05, patience: int = 1) -> str | None:
    """Say whether a label is predicted to tell less than ``share`` of what one told in the first round.

    Args:
        drops: predicted drop of tr(TΣ) per label, by round. T may change between rounds; divide by tr(TΣ) before the
            round where its scale does.
        left: labels of the budget that are not spent.
        share: of the first round's.
        patience: rounds in a row under it, at least 1.

    Raises:
        ValueError: a share outside (0, 1), or no patience.
    """
    _check("labels_buy_too_little", share, patience)
    if len(drops) <= patience or not drops[0] > 0 or not all(drop < share * drops[0] for drop in drops[-patience:]):
        return None
    return (
        f"labels stopped paying: predicted drop of the target's variance per label {drops[-1]:.3g}, under {share:.0%} "
        f"of the first round's {drops[0]:.3g}{_in_a_row(patience)}; {_refund(left)}"
    )


def held_out_gain_covers_zero(
    gains: Sequence[Float[ndarray, " N"] | None],
    left: int,
    confidence: float = 0.9,
    patience: int = 2,
    seed: int = 0,
) -> str | None:
    """Say whether the last rounds' labels left the held-out likelihood where it was, or worse.

    The percentile interval of the mean gain, from a bootstrap over items that keeps before and after together, must
    reach down to 0 in each of the last ``patience`` rounds. A small held-out set makes this likely even while labels
    help: with 40 items a round whose labels help is overlooked in 7% of cases if the gain's sd over items is twice its
    mean, in 29% if three times, in 60% if five times; a round without any gain is seen as one in 94%.

    Args:
        gains: by round, the negative log-likelihood of each held-out item before its refit less that after it, in nats;
            one entry a prompt (the mean of its items). None, or fewer than `LEAST_ITEMS`: not measured, and such a
            round breaks the row.
        left: labels of the budget that are not spent.
        confidence: of the two-sided interval.
        patience: rounds in a row, at least 1.
        seed: of the bootstrap.

    Raises:
        ValueError: no patience, a confidence outside (0, 1), or a gain that is not finite.
    """
    _check("held_out_gain_covers_zero", confidence, patience, "confidence")
    recent = [np.asarray(gain, float) for gain in gains[-patience:] if gain is not None and len(gain) >= LEAST_ITEMS]
    if len(recent) < patience:
        return None
    intervals = [bootstrap_interval(gain, confidence, seed) for gain in recent]
    if any(low > 0 for low, _ in intervals):
        return None
    found = ", ".join(
        f"{round(gain.mean(), 3) + 0.0:.3f} [{low:.3f}, {high:.3f}]"
        for gain, (low, high) in zip(recent, intervals, strict=True)
    )
    return (
        f"labels stopped paying: held-out gain in nats per item {found}, {confidence:.0%} interval not above 0"
        f"{_in_a_row(patience)}; {_refund(left)}"
    )


# ---- updates ----


def outliers_doubled(outliers: Sequence[float], rollouts: Sequence[int], factor: float = 2.0) -> str | None:
    """Say whether the share of outliers among the rollouts grew ``factor`` times since the first round.

    By more than `STANDARD_ERRORS` standard errors of the difference as well, √(p(1-p)(1/n₁+1/n)) with the pooled share
    p: a share of 1% doubles by chance.

    Args:
        outliers: rollouts beyond the gate's bound, by round; where rollouts resemble each other, the sum over
            prompts of the share that lies beyond, and ``rollouts`` the number of prompts.
        rollouts: how many there were, by round.
        factor: above 1.

    Raises:
        ValueError: lengths that differ, counts that cannot be, or a factor that is not above 1.
    """
    if len(outliers) != len(rollouts) or any(not 0 <= k <= n for k, n in zip(outliers, rollouts, strict=False)):
        raise ValueError(
            f"outliers_doubled: {list(outliers)} of {list(rollouts)} cannot be; give both counts of each round"
        )
    if not factor > 1:
        raise ValueError(f"outliers_doubled: factor={factor} must be above 1; 2 stops where the share doubles")
    if len(outliers) < 2 or not rollouts[0] or not rollouts[-1]:
        return None
    first, last = outliers[0] / rollouts[0], outliers[-1] / rollouts[-1]
    pooled = (outliers[0] + outliers[-1]) / (rollouts[0] + rollouts[-1])
    error = math.sqrt(pooled * (1 - pooled) * (1 / rollouts[0] + 1 / rollouts[-1]))
    if last < factor * first or last - first <= STANDARD_ERRORS * error:
        return None
    return (
        f"the policy leaves what the reward model knows: {last:.1%} of the rollouts are outliers, {first:.1%} in the "
        f"first round, grown {factor:g} times or more; lower rl.learning_rate, raise rl.kl_coef, or buy labels on what "
        "it writes now"
    )


def longer_without_accuracy(
    lengths: Sequence[float], accuracies: Sequence[float | None], growth: float = 0.25, least_gain: float = 0.01
) -> str | None:
    """Say whether responses grew by ``growth`` since the first round while accuracy gained less than ``least_gain``.

    Length explains most of the reward that PPO gains where it is not watched (Singhal et al. 2023,
    https://arxiv.org/abs/2310.03716).

    Args:
        lengths: mean tokens a response, by round.
        accuracies: on the same prompts in every round; None where not measured. Where the first or the last is, nothing
            can be said.
        growth: as a share of the first round's length.
        least_gain: in accuracy, a number in [0, 1].

    Raises:
        ValueError: lengths that differ.
    """
    if len(lengths) != len(accuracies):
        raise ValueError(
            f"longer_without_accuracy: {len(lengths)} lengths and {len(accuracies)} accuracies; give one each a round"
        )
    if len(lengths) < 2:
        return None
    before, after = accuracies[0], accuracies[-1]
    if before is None or after is None or lengths[-1] < (1 + growth) * lengths[0] or after - before >= least_gain:
        return None
    return (
        f"longer, not better: {lengths[-1]:.0f} tokens a response, {lengths[0]:.0f} in the first round, and accuracy "
        f"{after:.1%} after {before:.1%}; lower rl.max_new_tokens, raise rl.kl_coef or rl.uncertainty_penalty"
    )


def frontier_used_up(sums: Sequence[float], share: float = 0.1) -> str | None:
    """Say whether the frontier's value, ΣU over the same pool, fell under ``share`` of the first round's.

    Raises:
        ValueError: a share outside (0, 1).
    """
    _check("frontier_used_up", share, 1)
    if len(sums) < 2 or not sums[-1] < share * sums[0]:
        return None
    return (
        f"nothing left to learn here: the frontier is worth {sums[-1]:.3g} mixed groups, under {share:.0%} of the "
        f"first round's {sums[0]:.3g}; stop, or give other prompts"
    )


def anchors_fell(before: Float[ndarray, " N"], after: Float[ndarray, " N"], standard_errors: float = 1.0) -> str | None:
    """Say whether the anchors, prompts that must not get worse, fell by more than ``standard_errors``.

    mean(d) < -k·sd(d)/√n over the paired differences d. With k = 1 a policy that did not change at all, sampled anew,
    is stopped in about one of six checks: look at greedy answers, seldom, or ask for 2.

    Args:
        before: accuracy (or score) of each anchor prompt before RL.
        after: of the same prompts now.
        standard_errors: k, at least 0.

    Raises:
        ValueError: lengths that differ.
    """
    before, after = np.asarray(before, float), np.asarray(after, float)
    if len(before) != len(after):
        raise ValueError(f"anchors_fell: {len(before)} values before and {len(after)} after; give the same prompts")
    n = len(before)
    if n < 2:
        return None
    change = after - before
    error = float(np.std(change, ddof=1)) / math.sqrt(n)
    if not change.mean() < -standard_errors * error - 1e-12:
        return None
    return (
        f"forgetting: the {n} anchor prompts fell from {before.mean():.3g} to {after.mean():.3g}, by more than "
        f"{standard_errors:g} standard error{'' if standard_errors == 1 else 's'} ({error:.2g}); raise rl.anchor_coef "
        "or rl.anchor_prompts, or lower rl.learning_rate"
    )


def anchor_kl_over_budget(kls: Sequence[float], budget: float, steps: int = 2) -> str | None:
    """Say whether KL(reference ‖ policy) on the anchors was over its budget in the last ``steps`` steps.

    Args:
        kls: nats per token, of the steps that measured it; a value that is not finite is over.
        budget: in the same unit, above 0.
        steps: in a row, at least 1.

    Raises:
        ValueError: a budget that is not above 0, or fewer than 1 step.
    """
    if not budget > 0:
        raise ValueError(f"anchor_kl_over_budget: budget={budget} must be above 0; give nats per token")
    if steps < 1:
        raise ValueError(f"anchor_kl_over_budget: steps={steps} must be at least 1")
    if len(kls) < steps or any(kl <= budget for kl in kls[-steps:]):
        return None
    return (
        f"the anchors move: KL {kls[-1]:.4g} nats per token, over the budget of {budget:g}{_in_a_row(steps, 'steps')}; "
        "raise rl.anchor_coef or rl.anchor_prompts, or lower rl.learning_rate"
    )


def _in_a_row(count: int, what: str = "rounds") -> str:
    return f" in {count} {what} in a row" if count > 1 else ""


def _refund(left: int) -> str:
    return f"{left} {'label' if left == 1 else 'labels'} of the budget {'is' if left == 1 else 'are'} handed back"


def _check(function: str, share: float, patience: int, name: str = "share") -> None:
    if not 0 < share < 1:
        raise ValueError(f"{function}: {name}={share} must be between 0 and 1")
    if patience < 1:
        raise ValueError(f"{function}: patience={patience} must be at least 1; it counts rounds in a row")
