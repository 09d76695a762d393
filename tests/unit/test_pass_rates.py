"""Pass rates: a prior that needs no label, counts that fade, and which prompts are drawn by them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from trials import PAD, RL, Trial, sampled_groups

from trlhf.config import build_config
from trlhf.knowledge import Knowledge
from trlhf.rl.checkpoint import Progress
from trlhf.rl.draw import decided_prompts
from trlhf.rl.frontier import describe_frontier, draw_candidates, measure_drift, note_samples, posterior_of, refit_prior
from trlhf.rl.round import RlInputs, Round
from trlhf.run import RunDirectory
from trlhf.seeding import python_rng
from trlhf.targeting.pass_rates import (
    Look,
    describe_samples,
    faded,
    fit_prior,
    looked,
    posterior,
    prior_pass_rates,
    sets,
)
from trlhf.types import Label, Prompt, Rollout

NO_LABELS = fit_prior([])


def look(share: float, right: float = 0.0, wrong: float = 0.0, entropy: float = 0.0, drift: float = 0.0) -> Look:
    return looked(None, [share, entropy, -0.1], (right, wrong), 8, drift)


# ---- what samples show ----


def test_samples_are_described_by_share_entropy_and_likelihood() -> None:
    share, entropy, logprob = describe_samples(["1", "1", "2", None], [(-1.0, -3.0), (-1.0,), (-1.0,), (-1.0,)])
    assert share == 0.5 and logprob == pytest.approx(-1.25)
    assert entropy == pytest.approx(0.5 * math.log(2) + 2 * 0.25 * math.log(4))
    assert describe_samples(["1"] * 8, [(-1.0,)] * 8)[:2] == [1.0, 0.0]


def test_no_answer_is_never_the_top_one() -> None:
    assert describe_samples([None, None, None, "1"], [()] * 4) == [
        0.25,
        pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3)),
        0.0,
    ]
    with pytest.raises(ValueError, match="describe_samples: no samples"):
        describe_samples([], [])


# ---- the prior ----


def test_before_any_label_the_prior_follows_agreement() -> None:
    rates = prior_pass_rates(NO_LABELS, np.array([[0.5, 1.0, -0.3], [1.0, 0.0, -0.1]]))
    assert rates == pytest.approx([0.5, 0.8808], abs=1e-4)
    assert fit_prior([look(0.2), look(0.9)]) == NO_LABELS  # of which labels tell nothing


def test_labels_correct_the_prior() -> None:
    overconfident = [look(1.0, wrong=8) for _ in range(40)] + [look(0.3, right=8) for _ in range(40)]
    agreed, split = prior_pass_rates(fit_prior(overconfident), np.array([[1.0, 0, -0.1], [0.3, 0, -0.1]]))
    assert agreed < 0.3 and split > 0.6  # the guess said 0.88 and 0.31


def test_the_prior_reads_entropy_and_likelihood_too() -> None:
    spread = [look(0.5, right=8, entropy=0.7) for _ in range(40)] + [look(0.5, wrong=8, entropy=1.4) for _ in range(40)]
    two, many = prior_pass_rates(fit_prior(spread), np.array([[0.5, 0.7, -0.1], [0.5, 1.4, -0.1]]))
    assert two > 0.7 and many < 0.3
    sure = [looked(None, [0.5, 0.7, -x], (8 * (x < 1), 8 * (x > 1)), 8, 0.0) for x in (0.1, 2.0) for _ in range(40)]
    low, high = prior_pass_rates(fit_prior(sure), np.array([[0.5, 0.7, -2.0], [0.5, 0.7, -0.1]]))
    assert low < 0.3 and high > 0.7


def test_the_prior_is_where_the_slope_of_its_objective_is_zero() -> None:
    rng = np.random.default_rng(0)
    looks = [
        look(float(s), right=float(r), wrong=float(8 - r))
        for s, r in zip(rng.random(20), rng.integers(0, 9, 20), strict=True)
    ]
    w = np.array(fit_prior(looks))
    design = np.array([[1.0, *one["features"]] for one in looks])
    right, wrong = np.array([one["told"] for one in looks]).T
    p = 1 / (1 + np.exp(-design @ w))
    slope = design.T @ ((right + wrong) * p - right) + (w - np.array(NO_LABELS))
    assert np.abs(slope).max() < 1e-4


def test_what_labels_decide_in_part_counts_in_part() -> None:
    """One sample in eight known to be wrong says less than all of them."""
    features = np.array([[0.5, 0.0, -0.1]])
    some, all_ = (prior_pass_rates(fit_prior([look(0.5, wrong=n)]), features)[0] for n in (1, 8))
    assert all_ < some < 0.5


# ---- counts that fade ----


def test_counts_fade_with_what_the_policy_moved() -> None:
    first = look(0.5, right=4, wrong=4, drift=1.0)
    assert faded(first, 1.0) == (4, 4) and faded(first, 0.5) == (4, 4)
    assert faded(first, 1.0 + math.log(2)) == pytest.approx((2, 2))
    second = looked(first, [0.75, 0.5, -0.1], (6, 2), 8, 1.0 + math.log(2))
    assert second["counts"] == pytest.approx([8, 4]) and second["told"] == [0.75, 0.25]
    assert second["features"][0] == 0.75 and second["drift"] == 1.0 + math.log(2)


def test_what_is_expected_counts_but_teaches_the_prior_nothing() -> None:
    one = looked(None, [0.5, 0.5, -0.1], (0, 0), 8, 0.0, expected=(6.0, 2.0))
    assert one["counts"] == [6, 2] and one["told"] == [0, 0]


def test_the_posterior_is_prior_plus_faded_counts() -> None:
    """κ = 4: at a share of a half 2 and 2; 4 right and 4 wrong, half faded, add 2 and 2."""
    looks = [look(0.5, right=4, wrong=4), None, look(0.5)]
    alpha, beta = posterior(looks, NO_LABELS, math.log(2), unseen=0.75)
    assert alpha == pytest.approx([4, 3, 2]) and beta == pytest.approx([4, 1, 2])


def test_far_away_nothing_but_the_prior_is_left() -> None:
    alpha, beta = posterior([look(0.5, right=8)], NO_LABELS, 100.0)
    assert alpha == pytest.approx([2]) and beta == pytest.approx([2])


def test_sets_go_by_the_posterior() -> None:
    """P(p > 0.9) is 0.86 for Beta(11.5, 0.5) and 0.61 for Beta(9, 0.7); P(p < 0.05) 0.83 for Beta(0.5, 17)."""
    alpha, beta = np.array([11.5, 9.0, 0.5, 1.0, 4.0]), np.array([0.5, 0.7, 17.0, 17.0, 4.0])
    assert sets(alpha, beta) == ["mastered", "frontier", "hopeless", "frontier", "frontier"]


# ---- in the stage ----


def prompt(name: str, task: Any = "exact") -> Prompt:
    return Prompt(name, ({"role": "user", "content": f"what is {name}?"},), task=task)


def rollouts(name: str, answers: list[str | None], finished: bool = True) -> list[Rollout]:
    return [Rollout(name, f"{a}", (1, 2), (-0.1, -0.1), finished, a) for a in answers]


def verdict(name: str, outcome: str = "right") -> Label:
    return Label("verdict", name, ("5",), "5", outcome, "test", 1.0, "", 0)


def test_samples_are_noted_as_labels_and_expectations_say() -> None:
    state, knowledge = Progress(), Knowledge([verdict("a"), verdict("b", "wrong")])
    note_samples(state, "a", rollouts("a", ["5", "5", "6", None]), knowledge)
    note_samples(state, "b", rollouts("b", ["5", "6", "6", "6"]), knowledge)
    note_samples(state, "c", rollouts("c", ["5", "6", "6", "6"]), knowledge, expected=0.75)
    note_samples(state, "d", rollouts("d", ["5"] * 4, finished=False), knowledge)
    counts = {name: one["counts"] for name, one in state.looks.items()}
    assert counts == {"a": [2, 2], "b": [0, 1], "c": [3, 1], "d": [0, 4]}  # what never ended is wrong
    assert state.looks["d"]["features"][0] == 0.0
    note_samples(state, "a", rollouts("a", ["5"] * 4), knowledge)
    assert state.looks["a"]["counts"] == [6, 2]


def test_a_prompt_never_sampled_has_the_mean_prior() -> None:
    state = Progress(looks={"a": look(0.5), "b": look(1.0)})
    alpha, beta = posterior_of(state, [prompt("new")])
    assert alpha / (alpha + beta) == pytest.approx([(0.5 + 0.8808) / 2], abs=1e-4)
    assert posterior_of(Progress(), [prompt("new")])[0] == pytest.approx([2.0])


def test_a_rounds_file_says_what_the_frontier_is_worth() -> None:
    pool = [*map(prompt, "abcd"), prompt("o", "open")]
    state = Progress(looks={"a": look(1.0, right=8), "b": look(0.5, right=4, wrong=4), "o": look(0.5)})
    found = describe_frontier(state, pool, 8)
    assert {key: found[key] for key in ("prompts", "seen", "frontier", "mastered", "hopeless")} == {
        "prompts": 4, "seen": 2, "frontier": 1, "mastered": 1, "hopeless": 0,
    }  # fmt: skip
    alone = [describe_frontier(replace(state, looks={n: state.looks[n]}), pool, 8)["worth"] for n in "ab"]
    assert found["worth"] == pytest.approx(sum(alone) / 2, abs=1e-5) and alone[0] < 1.5 < 3 < alone[1] < 4
    assert describe_frontier(Progress(), pool, 8)["worth"] == 0.0


def test_a_twentieth_of_the_candidates_probes_what_is_thought_known() -> None:
    pool = [prompt(f"m{i}") for i in range(200)] + [prompt(f"f{i}") for i in range(200)]
    state = Progress(looks={p.id: look(1.0, right=8) for p in pool[:200]})
    drawn = [p.id for p in draw_candidates(state, pool, 100, python_rng(0), probe=True)]
    assert len(set(drawn)) == 100 and sum(name.startswith("m") for name in drawn) == 5
    few = draw_candidates(state, pool[:210], 100, python_rng(0), probe=True)
    assert sum(p.id.startswith("m") for p in few) == 90 and len({p.id for p in few}) == 100
    alike = draw_candidates(state, pool, 100, python_rng(0), probe=False)
    assert alike == python_rng(0).sample(pool, 100)
    assert len(draw_candidates(state, pool[:3], 100, python_rng(0), probe=True)) == 3


@pytest.mark.parametrize(("pass_rates", "favourite"), [("last", "b"), ("posterior", "a")])
def test_prompts_are_drawn_by_the_pass_rates_that_are_asked_for(
    tmp_path: Path, pass_rates: str, favourite: str
) -> None:
    """One prompt was mixed before and not in its last samples, the other the other way round."""
    config = build_config({"targeting": {"pass_rates": pass_rates, "update": "frontier"}})
    state = Progress(pass_rates={"a": 1.0, "b": 0.5})
    state.looks = {"a": looked(look(0.5, 4, 4), [1.0, 0, -0.1], (8, 0), 8, 0.0), "b": look(1.0, 20, 0)}
    inputs = RlInputs([], tmp_path, *cast("Any", (None, None, None, None, None)))
    trainer = Round(config, RunDirectory(tmp_path).stage("rl"), inputs, *cast("Any", (None, None)), state)
    trainer.exact = [prompt("a"), prompt("b")]
    prompts, weights = decided_prompts(trainer)
    assert prompts[int(np.argmax(weights))].id == favourite and weights.sum() == pytest.approx(1)


def test_the_drift_of_an_update_is_the_kl_of_the_sampler_to_the_updated_policy(tiny_model_dir: Path) -> None:
    """Σ d²/2 over the tokens of one sample a prompt, where no log-ratio d counts for more than 2 nats."""
    trial = Trial(tiny_model_dir, RL)
    groups, ratios = [], [0.5, -0.5, 0.1, -3.0]
    for group in sampled_groups(4):
        ids, rollout = group.prompt_ids, group.rollouts[0]
        with torch.no_grad(), trial.policy.acting() as model:
            logits = model(torch.tensor([[*ids, *rollout.token_ids]])).logits[0, len(ids) - 1 : -1]
        now = logits.log_softmax(-1).gather(1, torch.tensor(rollout.token_ids)[:, None]).squeeze(1)
        then = tuple(float(x) + ratios[i % 4] for i, x in enumerate(now))
        groups.append(replace(group, rollouts=(replace(rollout, logprobs=then), *group.rollouts[1:])))
    lengths = [len(group.rollouts[0].token_ids) for group in groups]
    by_hand = sum(min(abs(ratios[i % 4]), 2.0) ** 2 / 2 for length in lengths for i in range(length)) / 4
    assert measure_drift(trial.policy, groups, RL, PAD) == pytest.approx(by_hand, rel=1e-3) and by_hand > 0
    assert measure_drift(trial.policy, [], RL, PAD) == 0.0


def test_the_prior_is_refitted_to_what_labels_tell() -> None:
    state = Progress(looks={f"p{i}": look(1.0, wrong=8) for i in range(20)})
    refit_prior(state)
    assert state.prior == fit_prior(list(state.looks.values())) != NO_LABELS
