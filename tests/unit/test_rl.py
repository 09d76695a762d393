"""The loops' pieces: rewards from labels, pairs, anchors, and learners that learn, split, stop and continue."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trlhf.config import ModelConfig, RlConfig
from trlhf.errors import UserError
from trlhf.knowledge import Knowledge
from trlhf.logprobs import pad_sequences
from trlhf.models import encode_prompt, load_causal_lm, load_tokenizer
from trlhf.rl import checkpoint
from trlhf.rl.anchors import Anchor, anchor_loss, find_anchors, still_trusted
from trlhf.rl.checkpoint import Progress
from trlhf.rl.critic import Critic
from trlhf.rl.dpo import DpoLearner, build_pairs
from trlhf.rl.experience import Group, score_groups
from trlhf.rl.judge import Judgement
from trlhf.rl.ppo import PpoLearner
from trlhf.roles import Role
from trlhf.rollout import Sampling, sample_responses
from trlhf.run import RunDirectory, StageDirectory
from trlhf.targeting.choose import Candidate
from trlhf.types import Label, Prompt, Rollout, Score

PAD, EOS, SAMPLES, NEW_TOKENS = 3, 2, 8, 6
RL = RlConfig(
    epochs=1,
    prompts_per_step=8,
    samples_per_prompt=SAMPLES,
    max_new_tokens=NEW_TOKENS,
    minibatch_size=64,
    microbatch_size=64,
    learning_rate=5e-3,
    value_learning_rate=5e-3,
    kl_coef=0.0,
    anchor_coef=0.0,
    pairs_per_step=32,
    pairs_per_prompt=4,
)
DPO = replace(RL, algorithm="dpo", nll_coef=0.0)
PROMPTS = [
    Prompt(f"p{i}", ({"role": "user", "content": f"what is {i} plus {j}?"},))
    for i, j in enumerate((2, 3, 5, 7, 1, 4, 6, 8))
]
Metrics = dict[str, float]
Learner = PpoLearner | DpoLearner


# ---- what labels say of samples ----


def verdict(prompt_id: str, answer: str, outcome: str) -> Label:
    return Label("verdict", prompt_id, (answer,), answer, outcome, "test", 1.0, "", 1)


def rollout(
    answer: str | None, *, finished: bool = True, tokens: Sequence[int] = (5, EOS), prompt_id: str = "p"
) -> Rollout:
    return Rollout(prompt_id, f"It is {answer}.", tuple(tokens), (-1.0,) * len(tokens), finished, answer)


class Scores:
    """A reward model that says the same of everything, and notes what it was asked."""

    def __init__(self, mean: float = 0.0, sd: float = 0.0) -> None:
        self.result, self.asked = Score(mean, sd), [("", "")]
        self.asked.clear()

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Score]:
        self.asked += [(prompt.id, response) for prompt, response in zip(prompts, responses, strict=True)]
        return [self.result] * len(prompts)


def test_rewards_are_facts_where_labels_decide_and_lower_bounds_elsewhere() -> None:
    prompts = [Prompt(name, PROMPTS[0].messages) for name in ("right", "ruled out", "unlabelled")]
    knowledge = Knowledge([verdict("right", "5", "right"), verdict("ruled out", "5", "wrong")])
    sampled = [[rollout("5"), rollout("6"), rollout(None)] for _ in prompts]
    scorer = Scores(mean=1.0, sd=0.5)
    groups = score_groups(prompts, [[1]] * 3, sampled, knowledge, scorer, replace(RL, uncertainty_penalty=2.0))
    bound = 0.5  # σ(1 - 2·0.5)
    assert [group.rewards for group in groups] == [(1.0, 0.0, 0.0), (0.0, bound, 0.0), (bound, bound, 0.0)]
    assert [g.verified for g in groups] == [(True, True, True), (True, False, True), (False, False, True)]
    expected = [("ruled out", "It is 6."), ("unlabelled", "It is 5."), ("unlabelled", "It is 6.")]
    assert scorer.asked == expected
    assert [group.mixed for group in groups] == [True, True, True]


def test_a_response_that_never_ends_is_wrong_and_pays() -> None:
    knowledge = Knowledge([verdict("p", "5", "right")])
    rollouts = [rollout("5"), rollout("5", finished=False), rollout("6")]
    (group,) = score_groups([Prompt("p", ())], [[1]], [rollouts], knowledge, None, replace(RL, missing_eos_penalty=0.7))
    assert group.rewards == (1.0, pytest.approx(-0.7), 0.0) and all(group.verified)
    open_prompt = Prompt("o", (), task="open", reasoning=False)
    (group,) = score_groups([open_prompt], [[1]], [rollouts[:2]], knowledge, Scores(), RL)
    assert group.rewards == (0.5, -1.0) and group.verified == (False, True)


def test_what_no_label_decides_needs_a_reward_model() -> None:
    with pytest.raises(ValueError, match="there is no reward model"):
        score_groups([Prompt("p", ())], [[1]], [[rollout("5")]], Knowledge(), None, RL)


def test_equal_rewards_are_flat() -> None:
    def group(*rewards: float) -> Group:
        return Group(PROMPTS[0], (1,), (rollout("5"),) * len(rewards), rewards, (True,) * len(rewards))

    assert not group(1.0, 1.0, 1.0).mixed and not group(0.3, 0.3 + 1e-9).mixed
    assert group(1.0, 0.0, 1.0).mixed


def test_anchors_are_plain_prompts_and_mastered_ones() -> None:
    def candidate(answers: Iterable[str | None], reasoning: bool = True, finished: bool = True) -> Candidate:
        prompt = Prompt("money" if reasoning else "fact", (), reasoning=reasoning)
        rollouts = [rollout(a, finished=finished, tokens=(10 + i, EOS)) for i, a in enumerate(answers)]
        return Candidate(prompt, tuple(rollouts))

    candidates = [
        candidate(["5"] * 8),  # mastered
        candidate(["6"] + ["5"] * 7),  # 7 of 8: still mastered; the typical response is one of the 7
        candidate(["5"] * 6 + ["6"] * 2),  # not
        candidate([None] * 8),  # nothing to agree on
        candidate(["a", "b"], reasoning=False),
        candidate(["5"] * 8, finished=False),
        candidate(["a"], reasoning=False, finished=False),
    ]
    found = find_anchors(candidates, [[i] for i in range(len(candidates))])
    assert [(a.prompt_ids, a.prompt_id, a.answer) for a in found] == [
        ((0,), "money", "5"),
        ((1,), "money", "5"),
        ((4,), "fact", "a"),
    ]
    assert [a.response_ids for a in found] == [(10, EOS), (11, EOS), (10, EOS)]


def test_an_anchor_whose_answer_a_label_finds_wrong_holds_no_longer() -> None:
    anchors = [Anchor("p", (1,), (2,), "5"), Anchor("q", (1,), (2,), "5"), Anchor("open", (1,), (2,), None)]
    ruled_out = Label("verdict", "p", ("5",), "5", "wrong", "test", 1.0, "", 1)
    right = Label("verdict", "q", ("5",), "5", "right", "test", 1.0, "", 1)
    assert still_trusted(anchors, Knowledge([ruled_out, right])) == anchors[1:]
    assert still_trusted(anchors, Knowledge()) == anchors


def test_a_right_sample_is_paired_with_the_wrong_one_that_parts_from_it_last() -> None:
    tokens = [(1, 2, 3, 4, EOS), (9, 2, 3, 7, EOS), (1, 2, 8, 4, EOS), (1, 2, 3, 7, EOS)]
    rollouts = tuple(rollout("5", tokens=ids) for ids in tokens)
    [pair] = build_pairs([Group(PROMPTS[0], (1,), rollouts, (1.0, 0.0, 0.0, 0.0), (True,) * 4)], 1, random.Random(0))
    assert (pair.chosen_ids, pair.rejected_ids) == (tokens[0], tokens[3])


def test_pairs_join_right_with_wrong_and_never_more_than_asked() -> None:
    rollouts = tuple(rollout("5", tokens=(10 + i, EOS)) for i in range(6))
    mixed = Group(PROMPTS[0], (1, 7), rollouts, (1.0, 0.0, 1.0, -1.0, 0.0, 0.0), (True,) * 6)
    flat = replace(mixed, rewards=(1.0,) * 6)
    wrong = replace(mixed, rewards=(0.0, 0.0, -1.0, 0.0, 0.0, 0.0))
    for count in (1, 3, 99):
        pairs = build_pairs([mixed, flat, wrong], count, random.Random(0))
        assert len(pairs) == min(count, 4)  # every wrong one once
        assert all(p.prompt_ids == (1, 7) and p.verified for p in pairs)
        assert {p.chosen_ids[0] for p in pairs} <= {10, 12} and {p.rejected_ids[0] for p in pairs} <= {11, 13, 14, 15}
        assert len({p.rejected_ids for p in pairs}) == len(pairs)


def test_open_pairs_need_a_gap_and_avoid_the_worst() -> None:
    def group(*rewards: float) -> Group:
        rollouts = tuple(rollout(None, tokens=(10 + i, EOS)) for i in range(len(rewards)))
        return Group(PROMPTS[0], (1,), rollouts, rewards, (False,) * len(rewards))

    # mean 0.58, standard deviation 0.15: 0.4 is nearest to mean - 2·sd = 0.28; the freak of 0.0 is left alone
    (pair,) = build_pairs([group(0.9, 0.4, 0.0, *[0.6] * 20)], 4, random.Random(0))
    assert (pair.chosen_ids[0], pair.rejected_ids[0], pair.verified) == (10, 11, False)
    assert build_pairs([group(0.50, 0.55, 0.52)], 4, random.Random(0)) == []  # differences that mean nothing
    same = replace(group(0.9, 0.1), rollouts=(rollout("5"), rollout("5")))
    assert build_pairs([same], 4, random.Random(0)) == []


def test_a_judgement_takes_the_place_of_the_reward_model() -> None:
    prompts = [Prompt(name, PROMPTS[0].messages) for name in ("judged", "verified")]
    knowledge = Knowledge([verdict("verified", "5", "right")])
    sampled = [[rollout("5"), rollout("6"), rollout("6", finished=False)] for _ in prompts]
    judged = {"judged": Judgement((0.8, 0.1, 0.0), (0.7, 0.6, 0.0))}
    config = replace(RL, missing_eos_penalty=0.5)
    groups = score_groups(prompts, [[1]] * 2, sampled, knowledge, None, config, judged)
    assert groups[0].rewards == pytest.approx((0.8, 0.1, -0.5)) and groups[1].rewards == (1.0, 0.0, -0.5)
    assert groups[0].trust == (0.7, 0.6, 0.0) and groups[0].verified == (False,) * 3
    assert groups[1].weights == (1.0, 1.0, 1.0) and all(groups[1].verified)


def test_pairs_that_the_answer_model_orders_weigh_what_it_trusts() -> None:
    rollouts = tuple(rollout(a, tokens=(n, EOS)) for n, a in enumerate("5566"))
    rewards, trust = (0.8, 0.8, 0.1, 0.1), (0.7, 0.0, 0.6, 0.4)
    group = Group(PROMPTS[0], (1,), rollouts, rewards, (False,) * 4, trust)
    pairs = build_pairs([group], 4, random.Random(0))
    assert {(p.chosen_ids, p.rejected_ids, p.weight) for p in pairs} == {
        ((0, EOS), (2, EOS), 0.6),
        ((0, EOS), (3, EOS), 0.4),
    }
    assert not any(pair.verified for pair in pairs)
    assert build_pairs([replace(group, trust=(0.0,) * 4)], 4, random.Random(0)) == []


# ---- learners ----


class Toy:
    """A tiny policy, its reference, and responses that are better when they hold a token whose id ends in 7."""

    def __init__(self, path: Path, config: RlConfig, far: bool = False) -> None:
        self.tokenizer = load_tokenizer(path)
        self.policy, copy, third = (load_causal_lm(path, ModelConfig()) for _ in range(3))
        if far:  # the policy has left its reference
            with torch.no_grad():
                for parameter in copy.parameters():
                    parameter.mul_(1.3)
        self.role, self.reference = Role(self.policy), Role(copy).frozen()
        self.critic = Critic(Role(third)) if config.advantage == "gae" else None
        self.ids = [tuple(encode_prompt(self.tokenizer, prompt.messages)) for prompt in PROMPTS]
        self.learner: Learner = (
            DpoLearner(self.role, self.reference, config, PAD)
            if config.algorithm == "dpo"
            else PpoLearner(self.role, self.reference, self.critic, config, PAD)
        )

    def sample(self, seed: int) -> list[Group]:
        sampling = Sampling(1.0, NEW_TOKENS, SAMPLES, 64)
        drawn = sample_responses(self.policy, self.tokenizer, PROMPTS, sampling, torch.Generator().manual_seed(seed))
        return [
            Group(prompt, ids, tuple(rows), tuple(map(toy_reward, rows)), (True,) * len(rows))
            for prompt, ids, rows in zip(PROMPTS, self.ids, drawn, strict=True)
        ]

    def update(
        self, groups: Sequence[Group], anchors: Sequence[Anchor] = (), scale: float = 1.0, seed: int = 0
    ) -> Metrics:
        return self.learner.update(groups, anchors, random.Random(seed), scale)

    def learn(self, steps: int, anchors: Sequence[Anchor] = ()) -> list[Metrics]:
        return [self.update(self.sample(seed), anchors, seed=seed) for seed in range(steps)]

    def weights(self) -> Tensor:
        return flat(p.detach().clone() for p in self.policy.parameters())

    def gradients(self) -> Tensor:
        """What the last step's gradients were, clipped; the learner clears them only at the next step."""
        learning = [*self.role.trainable().values(), *(self.critic.trainable().values() if self.critic else ())]
        return flat(p.grad for p in learning if p.grad is not None)


def toy_reward(row: Rollout) -> float:
    return float(any(token % 10 == 7 for token in row.token_ids))


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.fixture
def toy(tiny_model_dir: Path) -> Callable[..., Toy]:
    return lambda config=RL, far=False: Toy(tiny_model_dir, config, far)


@pytest.mark.parametrize("advantage", ["leave_one_out", "gae"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_minibatch_is_on_policy(toy: Callable[..., Toy], advantage: Any, temperature: float) -> None:
    trial = toy(replace(RL, advantage=advantage, temperature=temperature))
    metrics = trial.update(trial.sample(0))
    assert metrics["ratio"] == pytest.approx(1, abs=1e-5) and metrics["clipped"] == 0
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)  # the policy is its reference as yet
    if temperature == 1.0:
        assert metrics["sampler_mismatch"] == pytest.approx(0, abs=1e-6)
    else:  # they were sampled at 1, and the metric tells
        assert metrics["sampler_mismatch"] > 1e-4
    assert 0 < metrics["reward"] < 1 and metrics["grad_norm"] > 0


def test_later_passes_leave_the_old_policy(toy: Callable[..., Toy]) -> None:
    trial = toy(replace(RL, epochs=4))
    metrics = trial.update(trial.sample(0))
    assert abs(metrics["ratio"] - 1) > 1e-3 and metrics["approx_kl"] > 1e-4 and metrics["clipped"] > 0


@pytest.mark.parametrize("advantage", ["leave_one_out", "gae"])
def test_ppo_raises_the_toy_reward(toy: Callable[..., Toy], advantage: Any) -> None:
    trial = toy(replace(RL, advantage=advantage, learning_rate=2e-2, epochs=2, minibatch_size=32))
    history = [metrics["reward"] for metrics in trial.learn(7)]
    assert history[0] < 0.6 and history[-1] > 0.9, history


def test_dpo_raises_the_toy_reward_and_not_by_lowering_the_chosen(toy: Callable[..., Toy]) -> None:
    trial = toy(replace(DPO, nll_coef=0.2, learning_rate=1e-2, epochs=2, pairs_per_step=16))
    history = trial.learn(7)
    rewards = [metrics["reward"] for metrics in history]
    assert rewards[0] < 0.6 and rewards[-1] > 0.9, rewards
    assert history[-1]["chosen_log_ratio"] > 0 and history[-1]["correct"] > 0.5
    assert history[-1]["chosen_logprob"] > history[0]["chosen_logprob"]


def test_dpo_starts_at_log_two(toy: Callable[..., Toy]) -> None:
    trial = toy(DPO)
    metrics = trial.update(trial.sample(0))
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["pairs"] == 32 and metrics["chosen_log_ratio"] == pytest.approx(0, abs=1e-4)
    with_nll = toy(replace(DPO, nll_coef=0.5))
    metrics = with_nll.update(with_nll.sample(0))
    assert metrics["loss"] == pytest.approx(math.log(2) + 0.5 * metrics["nll"], abs=1e-4)


@pytest.mark.parametrize("config", [RL, DPO])
def test_flat_groups_take_no_step(toy: Callable[..., Toy], config: RlConfig) -> None:
    trial = toy(config)
    before = trial.weights()
    groups = [replace(group, rewards=(1.0,) * SAMPLES) for group in trial.sample(0)]
    metrics = trial.update(groups)
    assert torch.equal(trial.weights(), before)
    assert metrics["reward"] == 1.0 and metrics["mixed_groups"] == 0.0 and "ratio" not in metrics


def test_a_flat_group_beside_mixed_ones_changes_nothing(toy: Callable[..., Toy]) -> None:
    with_flat, without = toy(), toy()
    groups = with_flat.sample(0)
    groups[2] = replace(groups[2], rewards=(0.0,) * SAMPLES)
    with_flat.update(groups)
    without.update(groups[:2] + groups[3:])
    torch.testing.assert_close(with_flat.gradients(), without.gradients(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("config", [RL, DPO])
def test_anchors_hold_the_policy_where_it_was(toy: Callable[..., Toy], config: RlConfig) -> None:
    anchors = [Anchor(f"fact {i}", (1, 40 + i, 9), (20 + i, 7, 30 + i, EOS), None) for i in range(4)]
    moved = {}
    for coefficient in (0.0, 3.0):
        trial = toy(replace(config, anchor_coef=coefficient, anchor_prompts=4, learning_rate=2e-3))
        metrics = trial.learn(4, anchors)
        with torch.no_grad():
            moved[coefficient] = float(anchor_loss(trial.role, trial.reference, anchors, PAD, 4.0))
        assert (metrics[-1].get("anchor_kl", 0.0) > 0) == (coefficient > 0)
    assert moved[3.0] < 0.5 * moved[0.0], moved


def test_the_kl_coefficient_pulls_towards_the_reference(toy: Callable[..., Toy]) -> None:
    kl = []
    for coefficient in (0.0, 1.0):
        trial = toy(replace(RL, kl_coef=coefficient, learning_rate=1e-2, epochs=2, minibatch_size=32))
        kl.append(trial.learn(4)[-1]["kl"])
    assert kl[1] < 0.5 * kl[0], kl


def test_kl_in_the_reward_counts_against_it(toy: Callable[..., Toy]) -> None:
    """Far from the reference, with flat scores but one, the KL alone decides what is better."""
    for advantage in ("leave_one_out", "gae"):
        trial = toy(replace(RL, advantage=advantage, kl_in="reward", kl_coef=1.0), far=True)
        assert isinstance(trial.learner, PpoLearner)
        groups = trial.sample(0)
        with_kl, _ = trial.learner._collect(groups)
        trial.learner.kl_coef = 0.0
        without, _ = trial.learner._collect(groups)
        kl = ((with_kl.old_logprobs - with_kl.reference_logprobs) * with_kl.mask).sum(1)
        change = (with_kl.advantages - without.advantages).mean(1)
        assert torch.corrcoef(torch.stack([kl, change]))[0, 1] < -0.3, advantage


@pytest.mark.parametrize(("target", "rises"), [(1e-3, True), (1e6, False)])
def test_the_kl_controller_moves_towards_its_target(toy: Callable[..., Toy], target: float, rises: bool) -> None:
    trial = toy(replace(RL, kl_coef=0.1, kl_target=target, kl_horizon=1000), far=True)
    assert isinstance(trial.learner, PpoLearner)
    groups = trial.sample(0)
    trial.update(groups)
    # at most 20% of the way that so many responses are of the horizon (https://arxiv.org/abs/1909.08593, sec. 2.2)
    expected = 0.1 * (1 + (0.2 if rises else -0.2) * len(groups) * SAMPLES / 1000)
    assert trial.learner.kl_coef == pytest.approx(expected)
    assert trial.update(groups)["kl_coef"] == pytest.approx(expected)
    assert toy(RL).learner.kl_coef == RL.kl_coef  # type: ignore[union-attr]


@pytest.mark.parametrize("config", [RL, replace(RL, advantage="gae"), DPO])
def test_gradients_that_are_not_finite_stop_the_run_the_third_time(toy: Callable[..., Toy], config: RlConfig) -> None:
    trial = toy(config)
    groups = trial.sample(0)
    with torch.no_grad():
        trial.policy.model.norm.weight[0] = math.nan
    before = trial.weights().nan_to_num()
    for _ in range(2):
        metrics = trial.update(groups)
        assert torch.equal(trial.weights().nan_to_num(), before)  # such a step is skipped
        assert metrics["skipped_steps"] == 1  # and counted
    with pytest.raises(
        UserError, match=r"rl: the gradient was not finite 3 steps in a row; lower rl\.learning_rate=0.005"
    ):
        trial.update(groups)


@pytest.mark.parametrize("config", [RL, DPO])
def test_a_finite_gradient_forgives_the_bad_ones(toy: Callable[..., Toy], config: RlConfig) -> None:
    trial = toy(config)
    groups = trial.sample(0)
    trial.learner.optimizer.bad_steps = 2
    assert trial.update(groups)["skipped_steps"] == 0
    assert trial.learner.optimizer.bad_steps == 0


def test_warming_up_moves_the_critic_alone(toy: Callable[..., Toy]) -> None:
    trial = toy(replace(RL, advantage="gae", kl_target=1.0))
    assert trial.critic is not None
    policy, critic = trial.weights(), flat(p.detach().clone() for p in trial.critic.trainable().values())
    metrics = trial.learner.update(trial.sample(0), (), random.Random(0), 1.0, warmup=True)
    assert torch.equal(trial.weights(), policy) and metrics["value_loss"] > 0
    assert not torch.equal(flat(p.detach() for p in trial.critic.trainable().values()), critic)


def test_the_critic_learns_what_the_reward_is(toy: Callable[..., Toy]) -> None:
    trial = toy(replace(RL, advantage="gae", gae_lambda=1.0, value_learning_rate=2e-3))
    groups = trial.sample(0)
    losses = [trial.learner.update(groups, (), random.Random(0), 1.0, warmup=True)["value_loss"] for _ in range(8)]
    assert losses[-1] < 0.7 * losses[0], losses


def test_the_critic_reads_the_prefix_only(toy: Callable[..., Toy]) -> None:
    trial = toy(replace(RL, advantage="gae"))
    assert trial.critic is not None
    with torch.no_grad():
        trial.critic.head.weight.normal_(generator=torch.Generator().manual_seed(0))
        responses = [[10, 11, 12, 13, EOS], [10, 11, 40, 41, EOS]]
        for share in (False, True):
            values = trial.critic(pad_sequences([[1, 8, 9]] * 2, responses, PAD, share))
            torch.testing.assert_close(values[0, :3], values[1, :3])  # V_2 stands before token 2, which differs
            assert (values[0, 3:] - values[1, 3:]).abs().min() > 1e-4
        (alone,) = trial.critic(pad_sequences([[1, 8, 9]], [responses[0][:2]], PAD))
        torch.testing.assert_close(values[0, :2], alone)


@pytest.mark.parametrize("config", [RL, replace(RL, advantage="gae", kl_coef=0.1, kl_target=0.01, kl_horizon=100), DPO])
def test_a_checkpoint_continues_identically(toy: Callable[..., Toy], tmp_path: Path, config: RlConfig) -> None:
    trial, again = toy(config), toy(config)
    anchors = [Anchor("fact", (1, 40), (20, 7, EOS), None)]
    stage = RunDirectory(tmp_path).stage("rl")
    assert checkpoint.load(stage, again.role, again.learner) is None
    trial.update(trial.sample(0), seed=0)
    state = Progress(2, 5, True, {"p0": 0.25}, anchors, {"reward": 0.5, "kl": float("inf")})
    checkpoint.save(stage, trial.role, trial.learner, state, keep=2)
    assert checkpoint.load(stage, again.role, again.learner) == state
    groups = trial.sample(1)
    first, second = (one.update(groups, anchors, 0.5, seed=1) for one in (trial, again))
    assert first == second
    assert torch.equal(trial.weights(), again.weights())
    assert trial.learner.state_dict().keys() == again.learner.state_dict().keys()


@pytest.fixture
def rotated(toy: Callable[..., Toy], tmp_path: Path) -> tuple[StageDirectory, Toy]:
    """A stage with checkpoints of steps 1 to 3, of which two are kept."""
    trial, stage = toy(), RunDirectory(tmp_path).stage("rl")
    for step in (1, 2, 3):
        trial.update(trial.sample(step), seed=step)
        checkpoint.save(stage, trial.role, trial.learner, Progress(step=step), keep=2)
    return stage, trial


def tear(stage: StageDirectory, step: int) -> Path:
    path = checkpoint.folder_of(stage, step) / checkpoint.STATE
    path.write_bytes(path.read_bytes()[:1000])
    return path


def names(stage: StageDirectory) -> set[str]:
    return {path.name for path in checkpoint.folder_of(stage, 0).parent.iterdir()}


def test_the_newest_checkpoints_are_kept_whatever_their_age(rotated: tuple[StageDirectory, Toy]) -> None:
    stage, trial = rotated
    assert names(stage) == {"checkpoint-2", "checkpoint-3"}
    for step in (12, 9):  # by step, not by name or time
        checkpoint.save(stage, trial.role, trial.learner, Progress(step=step), keep=3)
    assert names(stage) == {"checkpoint-3", "checkpoint-9", "checkpoint-12"}
    found = checkpoint.load(stage, trial.role, trial.learner)
    assert found is not None and found.step == 12
    checkpoint.save(stage, trial.role, trial.learner, Progress(step=12, planned=True), keep=3)  # once more, of one step
    assert names(stage) == {"checkpoint-3", "checkpoint-9", "checkpoint-12"}
    assert checkpoint.load(stage, trial.role, trial.learner) == Progress(step=12, planned=True)


def test_where_a_run_was_stopped_it_goes_on_but_nothing_else_depends_on_it(rotated: tuple[StageDirectory, Toy]) -> None:
    """A rule that goes back to a checkpoint must find the same ones as in a run that was never stopped."""
    stage, trial = rotated
    stopped = Progress(step=4, last={"reward": 1.0})
    checkpoint.save(stage, trial.role, trial.learner, stopped, 2, checkpoint.EXTRA)
    assert names(stage) == {"checkpoint-2", "checkpoint-3", "stopped-4"}
    assert checkpoint.load(stage, trial.role, trial.learner) == stopped
    assert checkpoint.load(stage, trial.role, trial.learner, at_most=4) == Progress(step=3)
    checkpoint.prune(stage, stopped, 2)
    assert names(stage) == {"checkpoint-2", "checkpoint-3", "stopped-4"}
    checkpoint.save(stage, trial.role, trial.learner, Progress(step=4, planned=True), 2)
    assert names(stage) == {"checkpoint-3", "checkpoint-4"}


def test_what_a_kill_kept_from_being_deleted_goes_at_the_next_start(
    rotated: tuple[StageDirectory, Toy], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, trial = rotated
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "prune", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        checkpoint.save(stage, trial.role, trial.learner, Progress(step=4), 2)
    assert names(stage) == {"checkpoint-2", "checkpoint-3", "checkpoint-4"}
    found = checkpoint.load(stage, trial.role, trial.learner)
    assert found == Progress(step=4)
    checkpoint.prune(stage, found, 2)
    assert names(stage) == {"checkpoint-3", "checkpoint-4"}


def test_a_torn_checkpoint_is_passed_over_for_the_one_before(
    rotated: tuple[StageDirectory, Toy],
    toy: Callable[..., Toy],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("trlhf"), "propagate", True)
    stage, trial = rotated
    expected = toy()
    for step in (1, 2):
        expected.update(expected.sample(step), seed=step)
    tear(stage, 3)
    with caplog.at_level(logging.WARNING, "trlhf"):
        assert checkpoint.load(stage, trial.role, trial.learner) == Progress(step=2)
    assert "checkpoint-3 cannot be read (" in caplog.text and "going on from checkpoint-2 instead" in caplog.text
    assert names(stage) == {"checkpoint-2"}
    assert torch.equal(trial.weights(), expected.weights())
    groups = expected.sample(3)
    assert trial.update(groups, seed=3) == expected.update(groups, seed=3)


def test_a_deletion_cut_short_is_finished(rotated: tuple[StageDirectory, Toy]) -> None:
    stage, trial = rotated
    checkpoint.folder_of(stage, 1).mkdir()  # of which the state is deleted already
    found = checkpoint.load(stage, trial.role, trial.learner)
    assert found == Progress(step=3)
    checkpoint.prune(stage, found, keep=2)
    assert names(stage) == {"checkpoint-2", "checkpoint-3"}


def test_checkpoints_that_are_all_torn_are_a_users_error(rotated: tuple[StageDirectory, Toy]) -> None:
    stage, trial = rotated
    path = tear(stage, 3)
    tear(stage, 2)
    with pytest.raises(UserError) as caught:
        checkpoint.load(stage, trial.role, trial.learner)
    told = str(caught.value)
    assert told.startswith(f"{path}: this checkpoint cannot be read (")
    assert told.endswith(
        f"), and none before it; delete the folder {stage.path}/checkpoints to start the rl stage again "
        "(labels already bought are kept)"
    )
    assert names(stage) == {"checkpoint-2", "checkpoint-3"}


def test_the_checkpoints_go_when_the_stage_is_complete(rotated: tuple[StageDirectory, Toy]) -> None:
    stage, _ = rotated
    stage.tidy()
    assert names(stage) == {"checkpoint-2", "checkpoint-3"}
    stage.complete({})
    assert not checkpoint.folder_of(stage, 3).parent.exists()
