"""The rules of ``rl.stop_rules`` and ``rl.max_anchor_kl``: what they look at, when they stop, what they go back to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from trlhf.config import LABEL_RULES, UPDATE_RULES, build_config
from trlhf.errors import ConfigError
from trlhf.knowledge import Knowledge
from trlhf.rl.anchors import Anchor
from trlhf.rl.answer_table import AnswerTable
from trlhf.rl.ask_verdicts import idle_stop_rules
from trlhf.rl.checkpoint import Progress
from trlhf.rl.health import after_record, after_step, new_health, protected
from trlhf.rl.label_gain import label_gains
from trlhf.rl.monitor import measure_anchors, record_round
from trlhf.rl.outliers import count_outliers
from trlhf.rl.records import RULES, Record, broken_rule
from trlhf.rl.round import RlInputs, Round
from trlhf.run import RunDirectory
from trlhf.targeting import Candidate
from trlhf.targeting.answers import Answers
from trlhf.types import Label, Prompt, Rollout

QUIET: Record = {
    "step": 0,
    "tokens": 50.0,
    "held_out_tokens": None,
    "held_out_accuracy": None,
    "frontier_before": 100.0,
    "frontier": 90.0,
    "outliers": 1.0,
    "outliers_of": 100,
    "anchors_before": None,
    "anchors": None,
}
NAMES = [f"a{i}" for i in range(10)]


def history(*changes: dict[str, Any]) -> list[Record]:
    """Return one record a round of 8 steps, quiet but for these changes."""
    return [cast("Record", {**QUIET, "step": 8 * (i + 1), **change}) for i, change in enumerate(changes)]


TROUBLE: dict[str, tuple[list[Record], int]] = {
    "outliers_doubled": (history({}, {}, {"outliers": 15.0}), 16),
    "longer_without_accuracy": (
        history(*({"held_out_tokens": n, "held_out_accuracy": 0.5} for n in (40.0, 44.0, 51.0))),
        16,
    ),
    "frontier_used_up": (history({}, {"frontier": 50.0}, {"frontier": 9.0}), 24),
    "anchors_fell": (
        history({}, {}, {"anchors_before": dict.fromkeys(NAMES, 1.0), "anchors": {n: float(n > "a3") for n in NAMES}}),
        16,
    ),
}


def test_every_rule_that_can_be_named_exists() -> None:
    assert set(RULES) == set(UPDATE_RULES) == set(TROUBLE)
    assert set(build_config({}).rl.stop_rules) < set(UPDATE_RULES)
    assert set(build_config({}).targeting.stop_rules) < set(LABEL_RULES)


@pytest.mark.parametrize("rule", TROUBLE)
def test_a_rule_stops_and_goes_back_to_where_all_was_well(rule: str) -> None:
    records, restore = TROUBLE[rule]
    found = broken_rule(records, [rule])
    assert found is not None and found[1] == restore
    assert broken_rule(records[:-1], [rule]) is None
    assert broken_rule(records, [name for name in TROUBLE if name != rule]) is None
    health = new_health()
    for record in records:
        health = after_record(health, record, [rule])
    assert health["stopped"] == found[0] and health["restore"] == restore
    assert protected(health, [8, 16, 24]) >= {restore}


def test_a_rule_broken_in_the_first_round_goes_back_to_the_start() -> None:
    last = TROUBLE["anchors_fell"][0][-1]
    assert broken_rule([last], ["anchors_fell"]) is not None
    assert broken_rule([last], ["anchors_fell"])[1] == 0  # type: ignore[index]
    assert broken_rule(history({"frontier": 9.0}), ["frontier_used_up"])[1] == 8  # type: ignore[index]


@pytest.mark.parametrize("rule", TROUBLE)
def test_what_was_not_measured_stops_nothing(rule: str) -> None:
    nothing: dict[str, Any] = dict.fromkeys(QUIET)
    assert broken_rule(history(nothing, nothing | {"step": 16}), [rule]) is None
    records = [*TROUBLE[rule][0]]
    records[-1] = cast("Record", {**nothing, "step": 24})
    assert broken_rule(records, [rule]) is None


def test_few_anchors_stop_nothing() -> None:
    record = history({"anchors_before": dict.fromkeys(NAMES[:7], 1.0), "anchors": dict.fromkeys(NAMES[:7], 0.0)})
    assert broken_rule(record, ["anchors_fell"]) is None


def test_the_first_reason_stays() -> None:
    health = {**new_health(), "stopped": "before", "restore": 3}
    for record in TROUBLE["frontier_used_up"][0]:
        health = after_record(cast("Any", health), record, ["frontier_used_up"])  # type: ignore[assignment]
    assert (health["stopped"], health["restore"], len(cast("Any", health["records"]))) == ("before", 3, 3)


def test_the_policy_that_a_round_began_with_keeps_its_checkpoint() -> None:
    health = new_health()
    assert protected(health, [0, 4]) == {0}
    health = after_record(health, history({})[0], [])
    assert protected(health, [0, 4, 8, 12, 16]) == {8}


# ---- the anchors' KL ----


def walk(anchor_kls: Sequence[float], kls: Sequence[float] | None = None) -> Any:
    health = new_health()
    for step, (anchor_kl, kl) in enumerate(zip(anchor_kls, kls or [1.0] * len(anchor_kls), strict=True), start=1):
        metrics = {"reward": 0.5, "anchor_kl": anchor_kl, "kl_per_response": kl, "response_tokens": 10.0 * step}
        health = after_step(health, step, metrics, 50.0, 0.2)
    return health


def test_two_steps_beyond_the_anchors_bound_stop() -> None:
    health = walk([0.1, 0.1, 0.1, 0.3, 0.4])
    assert health["restore"] == 2  # step 3 was within while it moved the policy of step 2
    assert "KL 0.4 nats per token, over the budget of 0.2 in 2 steps in a row" in health["stopped"]
    assert health["stopped"].endswith("or raise rl.max_anchor_kl")
    assert health["tokens"] == [10.0, 20.0, 30.0, 40.0, 50.0]
    for fine in ([0.1, 0.3, 0.1, 0.3], [0.2, 0.2]):
        assert walk(fine)["stopped"] is None
    assert protected(walk([0.1, 0.1, 0.1, 0.3]), [0, 1, 2, 3]) == {0, 2}  # should the next be beyond as well


def test_a_policy_is_good_only_within_both_bounds() -> None:
    assert walk([0.1, 0.1, 0.3, 0.1], [1, 1, 1, 60])["good"] == 1
    assert walk([0.1, 0.1, 0.1, 0.1], [1, 60, 1, 1])["good"] == 3


# ---- what the rules look at ----


def prompt(name: str) -> Prompt:
    return Prompt(name, ({"role": "user", "content": f"what is {name}?"},))


def test_a_rounds_record_takes_what_was_measured(tmp_path: Path) -> None:
    state = Progress(round=2, step=16)
    state.health["tokens"] = [40.0, 50.0]
    inputs = RlInputs([prompt("a")], tmp_path, *cast("Any", (None, None, None, None, None)))
    trainer = Round(build_config({}), RunDirectory(tmp_path).stage("rl"), inputs, *cast("Any", (None, None)), state)
    decided = {"frontier": {"worth": 7.0}, "outliers": {"outliers": 1.5, "prompts": 60}}
    record = record_round(trainer, decided, 30.0, 0.5)
    assert record == {
        "step": 16, "tokens": 45.0, "held_out_tokens": 30.0, "held_out_accuracy": 0.5, "frontier_before": 7.0,
        "frontier": None, "outliers": 1.5, "outliers_of": 60, "anchors_before": None, "anchors": None,
    }  # fmt: skip


def test_anchors_are_asked_greedily_where_labels_verify_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Role:
        def __init__(self, answer: str) -> None:
            self.answer, self.adapter = answer, None

        def acting(self) -> Any:
            from contextlib import nullcontext

            return nullcontext(self)

    def sample(model: Any, _tokenizer: Any, prompts: Sequence[Prompt], sampling: Any, _rng: Any) -> Any:
        assert sampling.temperature == 0 and sampling.samples == 1
        return [[Rollout(p.id, "", (1,), (0.0,), True, model.answer)] for p in prompts]

    monkeypatch.setattr("trlhf.rl.monitor.sample_as", sample)
    pool = [prompt(name) for name in ("a", "b", "c")]
    state = Progress(anchors=[Anchor(name, (1,), (2,), "5") for name in ("a", "b")])
    roles = SimpleNamespace(reference=Role("5"))
    inputs = RlInputs(pool, tmp_path, *cast("Any", (roles, None, None, None, None)))
    stage = RunDirectory(tmp_path).stage("rl")
    trainer = Round(build_config({}), stage, inputs, cast("Any", Role("6")), cast("Any", None), state)
    assert measure_anchors(trainer) == (None, None)
    labels = [Label("verdict", name, ("5",), "5", "right", "me", 1.0, "", 0) for name in ("a", "c")]
    trainer.knowledge = Knowledge(labels)
    assert measure_anchors(trainer) == ({"a": 1.0}, {"a": 0.0})


def table(features: np.ndarray, counts: Sequence[int]) -> AnswerTable:
    """One prompt for every two answers."""
    n = len(features)
    answers = Answers(features, np.ones(n) / 2, np.arange(n) // 2, np.ones(n), np.ones(n // 2))
    return AnswerTable(
        answers, ("1", "2") * (n // 2), np.array(counts), ("",) * n, tuple(range(n // 2)), np.full(n // 2, 8)
    )


def test_outliers_are_counted_in_prompts_that_did_not_say_what_is_usual(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pool = [Candidate(prompt(f"p{i}"), ()) for i in range(80)]
    usual = rng.standard_normal((160, 4))
    first = count_outliers(tmp_path, table(usual, [6, 2] * 80), pool)
    assert first is not None and first["prompts"] == 40 and first["outliers"] < 4
    far = usual.copy()
    far[2::8] += 50.0  # the answer with 6 of 8 samples, of every second prompt that is counted
    later = count_outliers(tmp_path, table(far, [6, 2] * 80), pool)
    assert later is not None and later["prompts"] == 40
    assert later["outliers"] == pytest.approx(20 * 6 / 8, abs=first["outliers"] + 1e-6)
    far = usual.copy()
    far[0::4] += 50.0  # those that said what is usual
    assert count_outliers(tmp_path, table(far, [6, 2] * 80), pool) == first
    assert count_outliers(tmp_path / "few", table(usual[:60], [6, 2] * 30), pool) is None


def test_the_gain_of_a_rounds_labels_is_what_they_take_off_later_verdicts(tmp_path: Path) -> None:
    stage = RunDirectory(tmp_path).stage("rl")
    rows = [
        {"prompt_id": "a", "answer": "5", "with": 0.8, "without": 0.4},
        {"prompt_id": "b", "answer": "5", "with": 0.8, "without": 0.4},
        {"prompt_id": "never bought", "answer": "5", "with": 0.8, "without": 0.4},
    ]
    stage.write_json("round_02.json", {"uniform_slice": rows})
    stage.write_json("round_03.json", {})
    labels = [Label("verdict", n, ("5",), "5", o, "me", 1.0, "", 2) for n, o in (("a", "right"), ("b", "wrong"))]
    trainer = cast("Any", SimpleNamespace(state=SimpleNamespace(round=4), stage=stage))
    trainer.decisions = lambda number: Round.decisions(trainer, number)
    gains = label_gains(trainer, labels)
    assert gains[0] == pytest.approx([np.log(0.8 / 0.4), np.log(0.2 / 0.6)]) and len(gains[1]) == 0


# ---- keys ----


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rl": {"stop_rules": ["anchor_fell"]}}, "there is no rule anchor_fell; did you mean anchors_fell?"),
        ({"rl": {"stop_rules": ["x"]}}, "rl.stop_rules=[x]: there is no rule x; choose from outliers_doubled, "),
        ({"targeting": {"stop_rules": ["anchors_fell"]}}, "targeting.stop_rules=[anchors_fell]: there is no rule "),
        (
            {"rl": {"interpolate": True}, "model": {"quantization": "nf4", "lora": {"enabled": True}}},
            "the reference is an adapter too; set rl.interpolate=false",
        ),
    ],
)
def test_a_rule_that_does_not_exist_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(values)
    assert message in str(caught.value)


def test_no_rules_at_all_are_possible() -> None:
    assert build_config({"rl": {"stop_rules": []}}).rl.stop_rules == []
    assert json.dumps(build_config({}).rl.stop_rules)


def test_rules_that_cannot_act_are_told() -> None:
    def idle(**targeting: object) -> list[str]:
        return idle_stop_rules(build_config({"targeting": targeting}).targeting)

    assert idle() == [] == idle(acquisition="apl", stop_rules=[])
    assert idle(acquisition="apl", stop_rules=list(LABEL_RULES)) == ["labels_buy_too_little"]
    assert idle(acquisition="frontier", stop_rules=list(LABEL_RULES)) == list(LABEL_RULES)
