"""When the rl stage stops early, which policy it then keeps, and that held-out prompts are never trained on."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from trlhf.closing import news_of
from trlhf.config import Config, ModelConfig, RlConfig, build_config
from trlhf.knowledge import Knowledge
from trlhf.labelling import Archive
from trlhf.models import load_causal_lm
from trlhf.rl import checkpoint
from trlhf.rl.candidates import more_plain, sample_candidates
from trlhf.rl.checkpoint import Progress
from trlhf.rl.health import (
    Health,
    RoundResult,
    after_round,
    after_step,
    best_round,
    has_fallen,
    held_out_accuracies,
    is_over_optimised,
    new_health,
    protected,
)
from trlhf.rl.held_out import held_out_prompts, pass_rates
from trlhf.rl.monitor import measure_held_out
from trlhf.rl.round import RlInputs, Round
from trlhf.rl.train import train_rl
from trlhf.roles import Role, Roles
from trlhf.run import RunDirectory
from trlhf.types import Label, Prompt, Rollout

# ---- the KL bound ----


def walk(kls: Sequence[float | None], bound: float | None = 50.0) -> Health:
    health = new_health()
    for step, kl in enumerate(kls, start=1):
        metrics = {"reward": 0.5} | ({} if kl is None else {"kl_per_response": kl})
        health = after_step(health, step, metrics, bound)
        if health["stopped"]:
            break
    return health


@pytest.mark.parametrize(
    ("kls", "stops_after", "restore"),
    [
        ([1, 10, 49, 50.0], None, None),
        ([1, 51, 1, 51, 1], None, None),  # never twice in a row
        ([1, 2, 51, 52], 4, 1),  # step 3 measured the policy after step 2 and found it out, step 2 the one after step 1
        ([60, 60], 2, 0),
        ([1, 60, None, None, 60], 5, 0),  # steps that measured nothing count neither way
        ([1, 2, 3, math.nan, math.inf], 5, 2),
        ([1, 2, 60, 3, 60, 60], 6, 3),
        ([None, None], None, None),
    ],
)
def test_two_steps_beyond_the_bound_stop(kls: list[float | None], stops_after: int | None, restore: int | None) -> None:
    health = walk(kls)
    assert (health["stopped"] is not None) == (stops_after is not None)
    assert health["restore"] == restore
    if stops_after is not None:
        assert len(health["rewards"]) == stops_after and f"at step {stops_after}," in str(health["stopped"])


def test_the_reason_names_value_rule_and_remedies() -> None:
    reason = str(walk([1, 60, 61.25])["stopped"])
    for part in ("61.25 nats", "rl.max_kl=50 ", "2 steps in a row", "rl.learning_rate", "rl.kl_coef", "rl.anchor_coef"):
        assert part in reason
    assert walk([60, 60, 60], bound=None)["stopped"] is None


# ---- reward up, held-out accuracy down ----


def finished(step: int, reward: float, rates: Sequence[float] | None) -> RoundResult:
    named = None if rates is None else {f"p{i}": rate for i, rate in enumerate(rates)}
    return {"step": step, "reward": reward, "rates": named}


GOOD, FAIR, POOR = [0.75] * 8 + [1.0] * 2, [0.75] * 9 + [0.5], [0.5] * 7 + [0.75] * 3


def rounds(*results: tuple[float, Sequence[float] | None]) -> list[RoundResult]:
    return [finished(8 * (i + 1), reward, rates) for i, (reward, rates) in enumerate(results)]


@pytest.mark.parametrize(
    ("history", "patience", "expected"),
    [
        (rounds((0.5, GOOD), (0.6, POOR), (0.7, POOR)), 2, True),
        (rounds((0.5, GOOD), (0.6, POOR)), 2, False),  # once is not enough
        (rounds((0.5, GOOD), (0.6, POOR)), 1, True),
        (rounds((0.5, GOOD), (0.6, POOR), (0.7, FAIR)), 2, False),  # hardly below
        (rounds((0.5, GOOD), (0.6, POOR), (0.4, POOR)), 2, False),  # the reward fell too
        (rounds((0.5, GOOD), (0.6, POOR), (0.7, None)), 2, False),
        (rounds((0.5, None), (0.6, None), (0.7, None)), 2, False),
        (rounds((0.5, GOOD), (0.6, POOR), (0.7, POOR)), 0, False),  # switched off
        (rounds((0.5, POOR), (0.6, FAIR), (0.7, GOOD)), 2, False),  # all is well
        (rounds((0.5, FAIR), (0.55, GOOD), (0.6, GOOD), (0.7, POOR), (0.8, POOR)), 2, True),
        (rounds((0.5, GOOD)), 2, False),
        ([], 2, False),
    ],
)
def test_reward_up_and_held_out_accuracy_down_stops(history: list[RoundResult], patience: int, expected: bool) -> None:
    assert is_over_optimised(history, patience) is expected


def test_a_fall_is_judged_by_the_paired_differences() -> None:
    before = {"a": 1.0, "b": 0.5, "c": 0.75, "d": 1.0}
    # d = -0.25, 0, -0.25, -0.5: mean -0.25, sd 0.2041, standard error 0.1021: 2.45 standard errors
    assert has_fallen(before, {"a": 0.75, "b": 0.5, "c": 0.5, "d": 0.5})
    # d = -0.5, 0.25, -0.25, -0.5: the same mean, standard error 0.1768: 1.41
    assert not has_fallen(before, {"a": 0.5, "b": 0.75, "c": 0.5, "d": 0.5})
    assert not has_fallen({"a": 0.5, "b": 0.75}, {"a": 1.0, "b": 1.0})
    assert has_fallen(before, {name: rate - 0.25 for name, rate in before.items()})
    assert not has_fallen(before, before)
    assert not has_fallen({"a": 1.0}, {"a": 0.0}) and not has_fallen(None, before) and not has_fallen(before, None)


def test_the_best_round_is_the_earliest_of_equals() -> None:
    assert best_round(rounds((0, None), (0, FAIR), (0, GOOD), (0, GOOD), (0, POOR))) == 2
    assert best_round(rounds((0, None))) is None


def test_the_state_adds_up_rounds_and_goes_back_to_the_best() -> None:
    health, step = new_health(), 0
    series = [([0.4, 0.6], GOOD), ([0.6, 0.6], POOR), ([0.7, 0.9], POOR)]
    for rewards, rates in series:
        for reward in rewards:
            step += 1
            health = after_step(health, step, {"reward": reward, "kl_per_response": 1.0}, 50.0)
        health = after_round(health, step, {f"p{i}": rate for i, rate in enumerate(rates)}, 2)
    assert [result["reward"] for result in health["rounds"]] == pytest.approx([0.5, 0.6, 0.8])
    assert held_out_accuracies(health) == pytest.approx([0.8, 0.575, 0.575])
    assert health["restore"] == 2 and health["rewards"] == []
    for part in ("over-optimised", "in 2 rounds", "0.800", "0.500", "57.5%", "80.0%", "rl.held_out_patience=0"):
        assert part in str(health["stopped"])


def test_noise_alone_hardly_ever_stops() -> None:
    """As the rule's docstring says: 16 prompts, 8 samples, 4 rounds, and a reward that rises all the time."""
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(1000):
        p, history = rng.uniform(size=16), list[RoundResult]()
        for number in range(4):
            history.append(finished(number, float(number), (rng.binomial(8, p) / 8).tolist()))
            if is_over_optimised(history, 2):
                alarms += 1
                break
    assert alarms < 40  # 16 are expected


def test_a_policy_that_loses_a_fifth_of_its_accuracy_is_found() -> None:
    rng, found = np.random.default_rng(0), 0
    for _ in range(200):
        p, history = rng.uniform(0.5, 1, size=16), list[RoundResult]()
        for number, scale in enumerate((1.0, 1.0, 0.8, 0.7)):
            history.append(finished(number, float(number), (rng.binomial(8, p * scale) / 8).tolist()))
        found += is_over_optimised(history, 2)
    assert found > 160


# ---- which checkpoints stay ----


def test_what_a_stop_would_go_back_to_is_protected() -> None:
    health = new_health()
    assert protected(health, [4, 8, 12]) == set()
    health["rounds"] = rounds((0.5, GOOD), (0.5, POOR))
    assert protected(health, [8, 12, 16]) == {8} and protected(health, [12, 16]) == set()
    health["good"], health["beyond"] = 13, 1
    assert protected(health, [8, 12, 16]) == {8, 12}
    assert protected({**health, "good": 3}, [8, 12, 16]) == {8}


# ---- held-out prompts ----


def prompt(name: str, task: Any = "exact", reasoning: bool = True) -> Prompt:
    return Prompt(name, ({"role": "user", "content": f"what is {name}?"},), task=task, reasoning=reasoning)


def verdict(name: str, outcome: str = "right", number: int = 0) -> Label:
    return Label("verdict", name, ("5",), "5", outcome, "test", 1.0, "", number)


HELD = [f"h{i}" for i in range(6)]
POOL = [*(prompt(name) for name in HELD), *(prompt(f"t{i}") for i in range(6)), prompt("o", "open")]
LABELS = [*(verdict(name) for name in HELD), verdict("t0"), verdict("t1", "wrong")]


def test_held_out_prompts_are_those_verified_before_the_stage() -> None:
    assert [p.id for p in held_out_prompts(POOL, HELD, LABELS)] == HELD
    later = [*LABELS[1:], verdict("h0", number=1)]
    assert [p.id for p in held_out_prompts(POOL, HELD, later)] == HELD[1:]  # h0 may have been trained on by then
    assert held_out_prompts(POOL, HELD[:4], LABELS) == []  # too few
    assert held_out_prompts(POOL, [*HELD[:4], "o", "t1", "elsewhere"], LABELS) == []


def test_pass_rates_come_from_labels() -> None:
    def rollout(answer: str | None) -> Rollout:
        return Rollout("h0", "", (1,), (0.0,), True, answer)

    sampled = [[rollout("5"), rollout("6"), rollout(None), rollout("5.0")]]
    assert pass_rates(POOL[:1], sampled, Knowledge(LABELS)) == {"h0": 0.5}
    with pytest.raises(ValueError, match="no label says what is right for h0"):
        pass_rates(POOL[:1], sampled, Knowledge())


def test_nothing_of_the_stage_touches_held_out_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = [*POOL, *(prompt(f"plain{i}", reasoning=False) for i in range(3))]
    held = [*HELD, "plain0"]
    sampled = list[str]()

    def sample(_model: Any, _tokenizer: Any, prompts: Sequence[Prompt], *_: Any) -> list[list[Rollout]]:
        sampled.extend(p.id for p in prompts)
        return [[Rollout(p.id, "", (1,), (0.0,), True, "5")] for p in prompts]

    monkeypatch.setattr("trlhf.rl.candidates.sample_as", sample)
    ledger = SimpleNamespace(labels=lambda: [*LABELS, verdict("plain0")])
    inputs = RlInputs(
        pool, tmp_path, *cast("Any", (None, ledger, None, Archive(pool), lambda *_: None)), frozenset(held)
    )
    config = build_config({"rl": {"unverified_share": 0.5}})
    trainer = Round(config, RunDirectory(tmp_path).stage("rl"), inputs, FakeRole(), cast("Any", None), Progress())
    trainer.prepare()
    seen = {p.id for p in [*trainer.exact, *trainer.unverified, *trainer.open]}
    seen |= {c.prompt.id for c in [*sample_candidates(trainer, Knowledge()), *more_plain(trainer, ())]}
    assert {p.id for p in trainer.held_out} == set(held)
    assert seen == {p.id for p in pool} - set(held) and set(sampled).isdisjoint(held)


class FakeRole(Role):
    """A role whose model nobody looks at."""

    def __init__(self) -> None:
        super().__init__(cast("Any", None))


def test_held_out_prompts_are_sampled_alike_in_every_process(tiny_model_dir: Path, tmp_path: Path) -> None:
    from trlhf.models import load_tokenizer

    policy, tokenizer = Role(load_causal_lm(tiny_model_dir, ModelConfig())), load_tokenizer(tiny_model_dir)
    ledger = SimpleNamespace(labels=lambda: LABELS)
    inputs = RlInputs(POOL, tmp_path, *cast("Any", (None, ledger, None, None, None)), frozenset(HELD))
    drawn = list[list[list[Rollout]]]()

    def rates(number: int, disturb: int) -> dict[str, float] | None:
        torch.manual_seed(disturb)
        random.seed(disturb)
        config = Config(rl=RlConfig(max_new_tokens=6, samples_per_prompt=3, unverified_share=0.1))
        trainer = Round(config, RunDirectory(tmp_path).stage("rl"), inputs, policy, tokenizer, Progress(round=number))
        trainer.knowledge = Knowledge(LABELS)
        rates, tokens = measure_held_out(trainer)
        assert tokens is not None and 1 <= tokens <= 6
        return rates

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trlhf.rl.monitor.pass_rates", lambda prompts, sampled, _: drawn.append(sampled))
        rates(1, 0), rates(1, 1), rates(2, 0)
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(rollouts) for rollouts in drawn[0]] == [4 * 3] * 6
    assert rates(1, 0) == dict.fromkeys(HELD, 0.0)  # so small a model is never right


# ---- the whole loop, with a learner that follows a script ----


class Scripted:
    """Adds 1 to a weight each step, and reports what the script says."""

    def __init__(self, policy: Role, script: Sequence[dict[str, float]], dies_at: int | None) -> None:
        self.weight = next(iter(policy.trainable().values()))
        self.script, self.dies_at, self.step = script, dies_at, 0

    def update(self, *_: Any) -> dict[str, float]:
        if self.step + 1 == self.dies_at:
            raise KeyboardInterrupt
        with torch.no_grad():
            self.weight[0, 0] = float(self.step + 1)
        self.step += 1
        return self.script[self.step - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


Train = Callable[..., tuple[dict[str, Any], float]]


@pytest.fixture
def train(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Run the loop with two steps a round; return its metrics and at which step the saved policy stood."""

    def buy_labels(self: Round) -> None:
        self.stage.write_json(f"round_{self.state.round:02d}.json", {"round": self.state.round})

    def prepare(self: Round) -> None:
        self.knowledge = Knowledge(LABELS)

    monkeypatch.setattr("trlhf.rl.train.buy_labels", buy_labels)
    monkeypatch.setattr(Round, "prepare", prepare)
    monkeypatch.setattr(Round, "sample_groups", lambda self: [])

    def run(
        script: Sequence[dict[str, float]],
        right: Sequence[int] = (),
        dies_at: int | None = None,
        dies_measuring: int | None = None,
        held_out: Sequence[str] = HELD,
        name: str = "run",
        **rl: Any,
    ) -> tuple[dict[str, Any], float]:
        def sample(_model: Any, _tokenizer: Any, prompts: Sequence[Prompt], *_: Any) -> list[list[Rollout]]:
            number = learner.step // 2
            if number == dies_measuring:
                raise KeyboardInterrupt
            answers = ["5"] * right[number - 1] + ["6"] * (8 - right[number - 1])
            return [[Rollout(p.id, "", (1,), (0.0,), True, answer) for answer in answers] for p in prompts]

        monkeypatch.setattr("trlhf.rl.monitor.sample_as", sample)
        policy = Role(load_causal_lm(tiny_model_dir, ModelConfig()))
        learner = Scripted(policy, script, dies_at)
        monkeypatch.setattr("trlhf.rl.train._learner", lambda *_: learner)
        labels = SimpleNamespace(verifiable_prompts=list)
        ledger = SimpleNamespace(labels=lambda: LABELS, knowledge=lambda: labels, budget=8, spent=8.0, remaining=0.0)
        inputs = RlInputs(
            POOL,
            tiny_model_dir,
            Roles(policy, policy, None, None),
            *cast("Any", (ledger, None, Archive(POOL), None)),
            frozenset(held_out),
        )
        settings = {"rounds": len(script) // 2, "steps_per_round": 2, "save_steps": 1, "unverified_share": 0.1, **rl}
        stage = RunDirectory(tmp_path / name).stage("rl")
        metrics = train_rl(build_config({"rl": settings}), stage, inputs)
        assert stage.metrics() == metrics
        saved = load_causal_lm(stage.path / "model", ModelConfig())
        return metrics, float(next(iter(saved.parameters())).detach()[0, 0])

    return run


def steps(rewards: Sequence[float], kls: Sequence[float]) -> list[dict[str, float]]:
    return [{"reward": reward, "kl_per_response": kl} for reward, kl in zip(rewards, kls, strict=True)]


def lines(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (path / "rl/metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second")} for row in rows]


FINE = steps([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], [1.0] * 8)


def test_a_healthy_run_goes_to_its_end(train: Train, tmp_path: Path) -> None:
    metrics, saved = train(FINE, right=[2, 4, 6, 8])
    assert metrics["stopped"] is None and metrics["steps"] == 8 and saved == 8
    assert metrics["held_out_accuracy"] == [0.25, 0.5, 0.75, 1.0]
    assert [row.get("held_out_accuracy") for row in lines(tmp_path / "run")] == [
        *(None, 0.25, None, 0.5, None, 0.75, None, 1.0)
    ]
    written = json.loads((tmp_path / "run/rl/round_02.json").read_text())
    assert written["held_out"] == {"accuracy": 0.5, "pass_rates": dict.fromkeys(HELD, 0.5)}
    assert written["ended"] == {
        "step": 4, "tokens": None, "held_out_tokens": 1.0, "held_out_accuracy": 0.5, "frontier_before": None,
        "frontier": None, "outliers": None, "outliers_of": None, "anchors_before": None, "anchors": None,
        "anchor_kl": None, "stopped": None,
    }  # fmt: skip
    assert news_of("rl", metrics)["rl"] == {"stopped": None, "held_out_accuracy": [0.25, 0.5, 0.75, 1.0]}


def test_too_few_held_out_prompts_are_said_once(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("trlhf"), "propagate", True)
    with caplog.at_level(logging.INFO):
        metrics, _ = train(FINE, held_out=HELD[:4])
    assert metrics["held_out_accuracy"] == [None] * 4 and metrics["stopped"] is None
    assert caplog.text.count("held-out accuracy is not measured") == 1
    assert all("held_out_accuracy" not in row for row in lines(tmp_path / "run"))
    assert json.loads((tmp_path / "run/rl/round_01.json").read_text())["held_out"]["accuracy"] is None


def test_a_policy_beyond_its_bound_stops_and_the_last_good_one_is_saved(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("trlhf"), "propagate", True)
    script = steps([0.5] * 8, [1, 1, 1, 60, 70, 1, 1, 1])
    metrics, saved = train(script, right=[4] * 4)
    assert metrics["steps"] == 5 and metrics["rounds"] == 3 and saved == 2  # step 3 found step 2's policy within
    assert metrics["stopped"].endswith("the policy saved is that of step 2")
    assert "rl.max_kl=50" in metrics["stopped"] and metrics["stopped"] in caplog.text
    assert news_of("rl", metrics)["rl"]["stopped"] == metrics["stopped"]


def test_an_over_optimised_run_ends_with_the_policy_of_its_best_round(train: Train, tmp_path: Path) -> None:
    metrics, saved = train([*FINE, *FINE[-2:]], right=[4, 8, 4, 4, 4])
    assert metrics["steps"] == 8 and metrics["rounds"] == 4 and saved == 4
    assert metrics["stopped"].startswith("over-optimised") and "policy saved is that of step 4" in metrics["stopped"]
    assert metrics["held_out_accuracy"] == [0.5, 1.0, 0.5, 0.5]
    _, saved = train([*FINE, *FINE[-2:]], right=[4, 8, 4, 4, 4], held_out_patience=0, name="patient")
    assert saved == 10


def test_where_labels_decide_every_reward_no_prompt_is_held_out(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("trlhf"), "propagate", True)
    with caplog.at_level(logging.INFO):
        metrics, saved = train([*FINE, *FINE[-2:]], right=[4, 8, 4, 4, 4], unverified_share=0.0)
    assert saved == 10 and metrics["held_out_accuracy"] == [None] * 5
    assert caplog.text.count("held-out accuracy is not measured: labels decide the reward of every exact prompt") == 1


@pytest.mark.parametrize("kill", [{"dies_at": n} for n in (1, 3, 4, 6, 8)] + [{"dies_measuring": n} for n in (1, 2, 4)])
@pytest.mark.parametrize("save_steps", [1, 3])
def test_a_killed_run_stops_and_ends_as_if_nothing_had_been(
    train: Train, tmp_path: Path, kill: dict[str, int], save_steps: int
) -> None:
    script, right = [*FINE, *FINE[-2:]], [4, 8, 4, 4, 4]
    expected = train(script, right, save_steps=save_steps, name="undisturbed")
    with pytest.raises(KeyboardInterrupt):
        train(script, right, save_steps=save_steps, **kill)
    assert train(script, right, save_steps=save_steps) == expected
    assert lines(tmp_path / "run") == lines(tmp_path / "undisturbed")
    for number in (1, 2, 3, 4):
        name = f"rl/round_{number:02d}.json"
        assert (tmp_path / "run" / name).read_text() == (tmp_path / "undisturbed" / name).read_text()


def test_a_run_that_was_killed_after_its_stop_does_not_go_on(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = steps([0.5] * 8, [1, 1, 1, 60, 70, 1, 1, 1])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr("trlhf.rl.train.end_early", killed)
        train(script, right=[4] * 4)
    newest = max((tmp_path / "run/rl/checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    assert newest.name == "checkpoint-5"
    metrics, saved = train(script, right=[4] * 4)
    assert metrics["steps"] == 5 and saved == 2 and len(lines(tmp_path / "run")) == 5
    assert checkpoint.load(RunDirectory(tmp_path / "run").stage("rl"), *cast("Any", (None, None))) is None
