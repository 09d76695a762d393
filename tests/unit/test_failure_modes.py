"""The rows of the failure-mode benchmark, judged on figures that are made up; and the worlds that they are run in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failure_cells import Site
from failure_figures import length_matched_gain
from failure_modes import from_label_efficiency, judge, table
from failure_rows import CROSSINGS, MANY, NOISES, ROWS
from failure_worlds import (
    JUNK,
    Biased,
    World,
    junk_prompts,
    length_biased,
    length_lover,
    living_in,
)

import trlhf.rl.buy
import trlhf.tasks
from trlhf.config import Config
from trlhf.files import write_json
from trlhf.labelers.exact import ExactVerifier
from trlhf.rl.answer_table import AnswerTable
from trlhf.targeting import Answers, fit_answers
from trlhf.types import Prompt, Question

KINDS = ("shop", "colour", "opposite", "list", "line")
Record = dict[str, Any]


def record(right: Sequence[float] = (0.5,) * 5, tokens: float = 20.0, **more: Any) -> Record:
    """Figures of a run on 40 prompts of each kind; of lists and lines ``right`` is the taste."""
    rng, rates = np.random.default_rng(0), dict(zip(KINDS, right, strict=True))
    kinds = [kind for kind in KINDS for _ in range(40)]
    correct = [None if k in ("list", "line") else bool(rng.random() < rates[k]) for k in kinds]
    return {
        "kinds": kinds,
        "right": correct,
        "correct": correct[:40],
        "accuracy": float(np.mean([bool(x) for x in correct[:40]])),
        "taste": [rates[k] + rng.normal(0, 0.01) if k in ("list", "line") else None for k in kinds],
        "tokens": [int(tokens + rng.integers(0, 4)) for _ in kinds],
        "plans": {"reasoning": 1.0, "other": 0.0},
        "labels": {"first": 51.0},
        "stopped": None,
        **more,
    }


def cells(row: str, **by_arm: Record) -> dict[Site, Record]:
    """Figures of a row's sites: those of ``world_arm`` or ``arm``, else the same for all."""
    sites = [site for seed in ROWS[row].seeds for site in ROWS[row].sites(seed)]
    return {s: by_arm.get(f"{s.world}_{s.arm}", by_arm.get(s.arm, record())) for s in sites}


def passed(row: str, **by_arm: Record) -> bool:
    return ROWS[row].judge(cells(row, **by_arm)).passed


def test_scrambled_scores_must_be_told_from_real_ones() -> None:
    assert passed("no_better_than_random", full=record([0.9] * 5), scrambled=record([0.4] * 5))
    assert not passed("no_better_than_random", full=record(), scrambled=record())


def test_a_finished_grid_of_label_efficiency_answers_that_too(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    assert from_label_efficiency(path) is None
    write_json(path, {"real_or_scrambled": None})
    assert from_label_efficiency(path) is None
    write_json(path, {"real_or_scrambled": {"area": {"value": 0.05, "low": 0.01, "high": 0.09}, "seeds": [0, 1]}})
    found = from_label_efficiency(path)
    assert found is not None and found.passed and "+5.0 [+1.0, +9.0]" in found.figure


def test_junk_may_not_draw_more_labels_than_chance_gives_it() -> None:
    def bought(junk: int, right: float = 0.5) -> Record:
        return record([right] * 5, junk={"verdicts": 50, "junk": junk})

    assert passed("garbage_outliers", full=bought(3, 0.9), uniform_ppo=bought(8))
    assert not passed("garbage_outliers", full=bought(9, 0.9), uniform_ppo=bought(8))
    assert not passed("garbage_outliers", full=bought(3, 0.4), uniform_ppo=bought(8))


def noisy(told: float, true: float, right: float = 0.9) -> Record:
    return record([right] * 5, rounds=[{"estimated_flip_rate": told}], label_errors={"share": true})


@pytest.mark.parametrize("told, right, expected", [(0.24, 0.9, True), (0.26, 0.9, False), (0.24, 0.3, False)])
def test_noise_is_known_within_five_points_and_targeting_no_worse(told: float, right: float, expected: bool) -> None:
    runs = {f"{world}_full": noisy(0.2, 0.2) for world in NOISES} | {"noise_20_full": noisy(told, 0.2, right)}
    assert passed("label_noise", **runs, uniform_ppo=record([0.5] * 5)) is expected
    assert {site.world for site in cells("label_noise") if site.arm == "uniform_ppo"} == set(CROSSINGS)


def believed(rates: Sequence[float], rewards: Sequence[float]) -> Record:
    curve = [
        {"step": n + 1, "accuracy": rate, "correct": record([rate] * 5)["correct"]} for n, rate in enumerate(rates)
    ]
    steps = [{"round": n + 1, "reward": reward} for n, reward in enumerate(rewards)]
    return record([rates[-1]] * 5, curve=curve, steps=steps, rounds=[{"held_out_accuracy": 0.9}])


def test_over_optimisation_is_seen_and_stopped() -> None:
    falling, kept = believed([0.95, 0.7, 0.2], [0.3, 0.5, 0.7]), believed([0.95, 0.95], [0.3, 0.5])
    assert passed("over_optimisation", believed=falling, guarded=kept)
    assert not passed("over_optimisation", believed=falling, guarded=falling)
    assert not passed("over_optimisation", believed=kept, guarded=kept)
    assert not passed("over_optimisation", believed=believed([0.95, 0.2], [0.7, 0.3]), guarded=kept)


def test_length_must_stay_and_something_be_gained_without_it() -> None:
    start, better = record(), record([0.9] * 5)
    assert passed("length_hacking", sft=start, full=better)
    assert not passed("length_hacking", sft=start, full=record([0.9] * 5, tokens=30))
    assert not passed("length_hacking", sft=start, full=record([0.4] * 5))


def test_gain_at_equal_length_leaves_out_what_length_explains() -> None:
    """Long responses are liked more: a policy that only grows longer has gained nothing."""

    def run(tokens: list[int], extra: float) -> Record:
        liked = [0.1 * n + extra for n in tokens]
        return {"kinds": ["list"] * len(tokens), "tokens": tokens, "taste": liked}

    before, longer = run([4, 5, 6, 7] * 5, 0.0), [5, 6, 7, 8] * 5
    assert length_matched_gain([(before, run(longer, 0.0))], "taste", 1)["value"] == pytest.approx(0)
    better = length_matched_gain([(before, run(longer, 0.25))], "taste", 1)
    assert better["value"] == pytest.approx(0.25) and better["low"] > 0.2 and better["n"] == 20


def asked(*fallen: bool | None) -> Record:
    """Rounds that could not test yet (None), passed the test (False) or fell back (True)."""
    rounds = [
        {
            **{"round": n + 1, "trust_test": "not tested yet: few" if x is None else "a test"},
            **{"fallback": "labels at random" if x else None, "uniform_verdicts": 9, "labels_bought": 90},
        }
        for n, x in enumerate(fallen)
    ]
    return record(rounds=rounds)


def test_useless_confidence_is_found_out_within_a_round() -> None:
    assert passed("useless_uncertainty", noisy_trust_full=asked(None, None, True), asking_full=asked(None, None, False))
    late = cells("useless_uncertainty", full=asked(None, False, True))
    found = ROWS["useless_uncertainty"].judge(late)
    assert found.passed and "tested from round 2 on (9 uniform verdicts, 141 of 256 labels spent)" in found.figure
    assert not passed("useless_uncertainty", full=asked(None, False, False, True))
    assert not passed("useless_uncertainty", full=asked(None, None))


def test_dpo_may_not_displace_what_it_chose() -> None:
    def steps(*ratios: float) -> Record:
        return record(steps=[{"round": n // 2, "chosen_log_ratio": x} for n, x in enumerate(ratios)])

    assert passed("displacement", dpo=steps(0.1, 0.2, -0.1, 0.3))
    assert not passed("displacement", dpo=steps(0.1, 0.2, -0.3, 0.1))


def test_no_kind_of_plain_prompt_may_fall_by_more_than_a_standard_error() -> None:
    start = record([0.5, 1, 1, 0.5, 0.5])
    assert passed("forgetting", sft=start, full=start, dpo=start)
    for forgot in ([0.5, 0.7, 1, 0.5, 0.5], [0.5, 1, 1, 0.5, 0.4]):
        assert not passed("forgetting", sft=start, full=record(forgot), dpo=start)
        assert not passed("forgetting", sft=start, full=start, dpo=record(forgot))


def test_plans_belong_to_reasoning_alone() -> None:
    assert passed("mode_collapse")
    assert not passed("mode_collapse", dpo=record(plans={"reasoning": 0.94, "other": 0.0}))
    assert not passed("mode_collapse", full=record(plans={"reasoning": 1.0, "other": 0.06}))


def test_every_look_at_a_gold_answer_is_a_label() -> None:
    def calls(labels: int, answered: int, pool: int, test: int) -> Record:
        told = {"labels": labels, "labeler": answered, "pool_answers_read": pool, "test_answers_read": test}
        return record(calls=told)

    assert passed("leaked_labels", full=calls(9, 9, 9, 0)) and passed("leaked_labels", full=calls(9, 9, 5, 0))
    for leaking in (calls(9, 10, 9, 0), calls(9, 9, 10, 0), calls(9, 9, 9, 1)):
        assert not passed("leaked_labels", full=leaking)


def test_leaks_are_looked_for_in_the_runs_of_all_rows() -> None:
    row, leaking = ROWS["leaked_labels"], {"labels": 9, "labeler": 9, "pool_answers_read": 12, "test_answers_read": 0}
    found = cells("leaked_labels", full=record(calls=leaking | {"pool_answers_read": 9}))
    assert judge(row, list(found), found)["passed"] is True
    elsewhere = found | {Site("junk", "full", 64, 0): record(calls=leaking)}
    assert judge(row, list(found), elsewhere)["passed"] is False
    assert judge(ROWS["mode_collapse"], list(found)[:2], elsewhere)["values"]["runs"] == 1


def test_a_row_without_its_runs_is_neither_passed_nor_failed() -> None:
    row, site = ROWS["mode_collapse"], Site("with_taste", "full", MANY, 0)
    entry = judge(row, [site], {})
    assert entry["passed"] is None and entry["missing"] == ["with_taste/full-256-0"]
    assert "| not run |" in table({"mode_collapse": entry})
    failed = judge(row, [site], {site: record(plans={"reasoning": 0.5, "other": 0.0})})
    assert (
        failed["passed"] is False
        and "| at least 50.0% of" in table({"x": failed})
        and "**fail**" in table({"x": failed})
    )


def load(world: World) -> tuple[trlhf.tasks.Task, list[Any]]:
    config = Config()
    with living_in(world) as loaded:
        return trlhf.tasks.load_task(config), loaded


def test_junk_is_a_seventh_of_the_pool_and_has_no_right_answer() -> None:
    task, _ = load(World(junk=True))
    junk = [prompt for prompt in task.pool if prompt.id.startswith("junk/")]
    assert len(junk) / len(task.pool) == pytest.approx(0.15, abs=0.001) and {prompt.kind for prompt in junk} == set(
        JUNK
    )
    told = task.labeler(Config()).answer([Question("verdict", prompt, ("The answer is 4.",), "4") for prompt in junk])
    assert set(told) == {"wrong"}
    assert junk_prompts(6, 0) == junk_prompts(6, 0) != junk_prompts(6, 1)


def test_a_world_ends_where_it_is_left() -> None:
    original = trlhf.tasks.load_task, trlhf.rl.buy.look
    load(World(junk=True, noisy_trust=True))
    assert (trlhf.tasks.load_task, trlhf.rl.buy.look) == original


def test_reads_of_gold_answers_are_counted() -> None:
    task, ((_, known),) = load(World())
    prompt = next(prompt for prompt in task.pool if prompt.reasoning)
    labeler = task.labeler(Config())
    labeler.answer([Question("verdict", prompt, ("The answer is 4.",), "4")] * 3)
    assert known._pool_answers.reads == 3 == labeler.calls and known.test_answers.reads == 0  # type: ignore[attr-defined]
    assert known.given == [labeler]
    list(task.test_answers.items())
    assert known.test_answers.reads == len(task.test_answers) > 0


def verdicts(task: trlhf.tasks.Task, response: str, right: bool) -> list[Question]:
    gold = dict.items(task._pool_answers)
    prompts = {prompt.id: prompt for prompt in task.pool}
    return [Question("verdict", prompts[name], (response,), answer if right else "-1") for name, answer in gold]


@pytest.mark.parametrize(
    "response, right, least, most",
    [("x", True, 0.3, 0.45), ("x" * 500, True, 0, 0), ("x", False, 0, 0.02), ("x" * 500, False, 0.35, 0.45)],
)
def test_the_length_biased_person_calls_long_responses_right(
    response: str, right: bool, least: float, most: float
) -> None:
    task, _ = load(World(person=length_biased))
    questions = verdicts(task, response, right)
    told = task.labeler(Config()).answer(questions)
    assert least <= np.mean([x != ("right" if right else "wrong") for x in told]) <= most
    assert told == task.labeler(Config()).answer(questions)


def test_a_biased_person_is_asked_through_the_honest_one() -> None:
    prompt = Prompt("a", ({"role": "user", "content": "?"},))
    honest = ExactVerifier({"a": "4"})
    person = Biased(honest, lambda question, truth: 1.0, 0)
    assert person.answer([Question("verdict", prompt, ("4",), "4"), Question("gold", prompt)]) == ["wrong", "4"]
    assert person.calls == honest.calls == 2


def test_the_length_lover_takes_the_longer_of_two_like_lists() -> None:
    task, _ = load(World(person=length_lover))
    lists = next(prompt for prompt in task.pool if prompt.kind == "line")
    question = Question("preference", lists, ("no line", "no line at all, and long"))
    assert task.labeler(Config()).answer([question]) == ["B"]


def test_noise_takes_the_place_of_confidence_but_not_of_what_is_likelier() -> None:
    rng, count = np.random.default_rng(0), 60
    numbers = np.repeat(np.arange(count), 2)
    answers = Answers(rng.normal(size=(120, 3)), rng.uniform(0.1, 0.9, 120), numbers, np.ones(120), np.ones(count))
    names = tuple(map(str, range(120)))
    table = AnswerTable(answers, names, np.full(120, 4), names, tuple(range(count)), np.full(count, 8))
    real = trlhf.rl.buy.look(table, fit_answers(answers), 8)
    with living_in(World(noisy_trust=True)):
        noisy = trlhf.rl.buy.look(table, fit_answers(answers), 8)
    assert ((noisy.probabilities > 0.5) == (real.probabilities > 0.5)).all()
    confidence = np.abs(np.array([noisy.probabilities, real.probabilities]) - 0.5)
    assert abs(np.corrcoef(confidence)[0, 1]) < 0.2 and confidence[0].max() > 0.45
