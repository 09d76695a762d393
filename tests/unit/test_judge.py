"""From samples to answers to questions: the judge, the gate, the choice of verdicts, repeats and their noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy import ndarray

from trlhf.config import TargetingConfig
from trlhf.knowledge import Knowledge
from trlhf.rl.ask import (
    UNIFORM,
    check_uncertainty,
    choose_repeats,
    choose_targeted,
    flip_rate,
    look,
    may_be_asked,
)
from trlhf.rl.judge import REFERENCE, AnswerJudge, texts_of, verdicts_of
from trlhf.rl.round import majority
from trlhf.targeting import Candidate
from trlhf.types import Label, Prompt, Rollout

BY_ANSWERS = ("v_optimal", "scrambled", "d_optimal", "max_entropy", "double_thompson", "least_agreed", "apl")


def prompt(name: str) -> Prompt:
    return Prompt(name, ({"role": "user", "content": name},), kind=name[0])


def rollouts(name: str, answers: Sequence[str | None], finished: bool = True) -> tuple[Rollout, ...]:
    return tuple(
        Rollout(name, f"so {a}", tuple(range(n, n + 9)), (0.0,) * 9, finished, a) for n, a in enumerate(answers)
    )


def label(name: str, answer: str, outcome: str, number: int = 0, repeat: int = 0) -> Label:
    return Label("verdict", name, (f"so {answer}",), answer, outcome, "me", 1.0, "", number, repeat)


def features(prompts: Sequence[Prompt], texts: Sequence[str]) -> ndarray:
    """Eight numbers that depend on prompt and text alone."""
    rows = []
    for one, text in zip(prompts, texts, strict=True):
        rng = np.random.default_rng(sum(f"{one.id}/{text}".encode()) * 31 + len(text))
        rows.append(rng.standard_normal(8))
    return np.array(rows).reshape(-1, 8)


def candidates(count: int = 12) -> list[Candidate]:
    kinds = [["1"] * 5 + ["2"] * 3, ["1"] * 8, ["1"] * 4 + ["2"] * 3 + [None]]
    return [Candidate(prompt(f"{'abc'[n % 3]}{n}"), rollouts(f"{'abc'[n % 3]}{n}", kinds[n % 3])) for n in range(count)]


def judge_of(tmp_path: Path, pool: Sequence[Candidate], labels: Sequence[Label] = ()) -> AnswerJudge:
    prompts, texts = [c.prompt for c in pool], [texts_of(c.rollouts) for c in pool]
    judge = AnswerJudge(features, tmp_path)
    judge.whiten_on(prompts, texts)
    judge.note_reference(prompts, texts)
    assert judge.load()
    verdicts = verdicts_of(labels)
    told = [(p, [t]) for p, t in zip(prompts, texts, strict=True) if p.id in verdicts]
    judge.fit([p for p, _ in told], [t for _, t in told], verdicts, 0.02)
    return judge


def test_a_table_lists_answers_with_counts_and_the_shares_of_the_reference(tmp_path: Path) -> None:
    pool = candidates(3)
    judge = judge_of(tmp_path, pool)
    table = judge.table([c.prompt for c in pool], [texts_of(c.rollouts) for c in pool], [8, 8, 8])
    assert table.names == ("1", "2", "1", "1", "2") and table.counts.tolist() == [5, 3, 8, 4, 3]
    assert table.answers.prompts.tolist() == [0, 0, 1, 2, 2] and table.places == (0, 1, 2)
    assert table.answers.shares.tolist() == pytest.approx([5 / 8, 3 / 8, 1, 4 / 7, 3 / 7])
    later = judge.table([pool[0].prompt], [texts_of(rollouts("a0", ["2"] * 7 + ["9"]))], [8])
    assert later.answers.shares.tolist() == pytest.approx([3 / 8, 1 / 16])  # not what the policy has become
    new = judge.table([prompt("new")], [texts_of(rollouts("new", ["2"] * 7 + ["9"]))], [8])
    assert new.answers.shares.tolist() == [0.5, 0.5]


def test_samples_without_an_answer_are_no_answers(tmp_path: Path) -> None:
    pool = [Candidate(prompt("a"), rollouts("a", [None, None])), Candidate(prompt("b"), rollouts("b", ["1"], False))]
    judge = judge_of(tmp_path, [*candidates(3), *pool])
    table = judge.table([c.prompt for c in pool], [texts_of(c.rollouts) for c in pool], [2, 1])
    assert table.names == () and table.places == ()
    judged = judge.judge([c.prompt for c in pool], [c.rollouts for c in pool], np.random.default_rng(0))
    assert [x.rewards for x in judged] == [(0, 0), (0,)] and [max(x.trust) for x in judged] == [0, 0]


def test_verdicts_decide_rewards_and_trust(tmp_path: Path) -> None:
    pool = candidates(6)
    told = [label("a0", "1", "wrong"), label("a3", "1.0", "right"), label("c2", "7", "right")]
    judge = judge_of(tmp_path, pool, told)
    judged = judge.judge([c.prompt for c in pool], [c.rollouts for c in pool], np.random.default_rng(0))
    wrong, agreed, elsewhere, right = judged[:4]
    assert max(wrong.rewards[:5]) < 0.05 and min(wrong.rewards[5:]) > 0.5  # what is left is probably right
    assert min(right.rewards[:5]) > 0.9 and max(right.rewards[5:]) < 0.1 and min(right.trust) > 0.8  # 1.0 is 1
    assert max(elsewhere.rewards) < 0.1  # an answer that no sample gives was found right
    assert len(set(agreed.rewards)) == 1
    for judgement, candidate in zip(judged, pool, strict=True):
        probability = {r.answer: x for r, x in zip(candidate.rollouts, judgement.rewards, strict=True)}
        total = sum(x for answer, x in probability.items() if answer is not None)
        assert total <= 1 + 1e-5
        expected = [abs(2 * x - total) for x in judgement.rewards]
        assert judgement.trust == pytest.approx(expected, abs=1e-5)


def test_a_judge_that_starts_again_is_the_same(tmp_path: Path) -> None:
    pool, told = candidates(9), [label("a0", "1", "wrong"), label("c2", "1", "right")]
    first = judge_of(tmp_path, pool, told)
    again = AnswerJudge(features, tmp_path)
    assert again.load() and json.loads((tmp_path / REFERENCE).read_text())["a0"] == {"1": 5 / 8, "2": 3 / 8}
    chosen = [c for c in pool if c.prompt.id in ("a0", "c2")]
    again.fit([c.prompt for c in chosen], [[texts_of(c.rollouts)] for c in chosen], verdicts_of(told), 0.02)
    assert first.model is not None and again.model is not None
    np.testing.assert_array_equal(first.model.mean, again.model.mean)
    assert not AnswerJudge(features, tmp_path / "elsewhere").load()


def outlook_of(tmp_path: Path, pool: Sequence[Candidate], labels: Sequence[Label] = ()):  # type: ignore[no-untyped-def]
    judge = judge_of(tmp_path, pool, labels)
    assert judge.model is not None
    table = judge.table([c.prompt for c in pool], [texts_of(c.rollouts) for c in pool], [len(c.rollouts) for c in pool])
    return look(table, judge.model, 8)


OPEN = TargetingConfig(label_prompts="pool", gate=False)


@pytest.mark.parametrize("acquisition", BY_ANSWERS)
def test_every_acquisition_asks_once_a_prompt_about_what_is_open(tmp_path: Path, acquisition: str) -> None:
    pool = candidates()
    told = [label("a0", "1", "right"), label("a3", "1", "wrong")]
    outlook, known = outlook_of(tmp_path, pool, told), Knowledge(told)
    allowed = may_be_asked(outlook, pool, known, OPEN, [])
    outlook.implicit = np.linspace(1, 0, len(allowed))
    chosen = choose_targeted(outlook, allowed, pool, 7, acquisition, 0.02, np.random.default_rng(0), 3)
    asked = [x.question for x in chosen]
    assert len(asked) == 7 == len({q.prompt.id for q in asked}) and {q.round for q in asked} == {3}
    assert "a0" not in {q.prompt.id for q in asked}
    for q in asked:
        assert known.known(q.prompt.id, q.answer) is None
        owner = next(c for c in pool if c.prompt.id == q.prompt.id)
        assert any(r.text == q.responses[0] and r.answer == q.answer for r in owner.rollouts)
    assert choose_targeted(outlook, allowed, pool, 0, acquisition, 0.02, np.random.default_rng(0), 3) == []


def test_v_optimal_asks_where_samples_disagree_and_tells_what_it_expects(tmp_path: Path) -> None:
    pool = candidates()
    outlook = outlook_of(tmp_path, pool)
    allowed = may_be_asked(outlook, pool, Knowledge(), OPEN, [])
    chosen = choose_targeted(outlook, allowed, pool, 6, "v_optimal", 0.02, np.random.default_rng(0), 1)
    assert {x.question.prompt.id[0] for x in chosen} <= {"a", "c"}  # all samples of b agree
    assert all(x.value is not None and x.value > 0 and "resolves" in x.question.why for x in chosen)
    scrambled = choose_targeted(outlook, allowed, pool, 6, "scrambled", 0.02, np.random.default_rng(0), 1)
    assert {x.question.prompt.id for x in scrambled} != {x.question.prompt.id for x in chosen}


def test_the_gate_refuses_repetitions_and_outliers_in_words(tmp_path: Path) -> None:
    pool = candidates(60)
    stuttering = replace(pool[0].rollouts[0], token_ids=(3,) * 60)
    pool[0] = Candidate(pool[0].prompt, (stuttering,) * 8)
    outlook = outlook_of(tmp_path, pool)
    gated = replace(OPEN, gate=True)
    allowed = may_be_asked(outlook, pool, Knowledge(), gated, [])
    assert set(outlook.refused) == {"repetitive"} and outlook.refused["repetitive"] == ["a0"]
    assert not allowed[outlook.table.answers.prompts == 0].any() and allowed.sum() == len(allowed) - 1
    strange = outlook.table.answers.features.copy()
    strange[-1] *= 50
    table = replace(outlook.table, answers=replace(outlook.table.answers, features=strange))
    sound = [c.prompt.id for c in pool[:50]]
    allowed = may_be_asked(replace(outlook, table=table, refused={}), pool, Knowledge(), gated, sound)
    assert not allowed[-1]


def test_only_prompts_of_the_frontier_where_that_is_asked(tmp_path: Path) -> None:
    pool = candidates()
    agreed = Candidate(prompt("d"), rollouts("d", [None] * 7 + ["1"]))
    outlook = outlook_of(tmp_path, [*pool, agreed])
    frontier = replace(OPEN, label_prompts="frontier")
    outlook.mixed[-1] = 0.1
    allowed = may_be_asked(outlook, [*pool, agreed], Knowledge(), frontier, [])
    assert not allowed[-1] and allowed[:2].all()


def test_a_table_at_another_rate_of_errors_is_the_table_that_is_built_with_it(tmp_path: Path) -> None:
    pool = candidates(12)
    told = [label("a0", "1", "right"), label("b1", "1", "wrong"), label("c2", "9", "right"), label("c2", "2", "wrong")]
    judge = judge_of(tmp_path, pool, told)
    args = [c.prompt for c in pool], [texts_of(c.rollouts) for c in pool], [len(c.rollouts) for c in pool]
    before, judge.flip_rate = judge.table(*args), 0.3
    after = judge.table(*args).answers
    np.testing.assert_array_equal(before.at(0.3).likelihoods(), after.likelihoods())
    assert not np.array_equal(before.answers.likelihoods(), after.likelihoods())


def test_repeats_are_of_verdicts_asked_once() -> None:
    told = [label("a", "1", "right"), label("b", "1", "wrong"), label("b", "1", "wrong", 1, 1)]
    prompts = {name: prompt(name) for name in "ab"}
    (one,) = choose_repeats(told, prompts, 5, np.random.default_rng(0), 2)
    assert (one.question.prompt.id, one.question.repeat, one.question.round, one.part) == ("a", 1, 2, "repeat")


def test_the_noise_is_estimated_from_repeats() -> None:
    assert flip_rate([]) == (pytest.approx(0.02), 0)
    rng = np.random.default_rng(0)
    for true in (0.0, 0.1, 0.2, 0.3):
        told = []
        for n in range(400):
            for repeat in (0, 1):
                told.append(label(str(n), "1", "right" if rng.random() > true else "wrong", 0, repeat))
        estimate, pairs = flip_rate(told)
        assert pairs == 400 and abs(estimate - true) < 0.05


def test_the_judge_takes_labels_for_as_reliable_as_they_prove_to_be(tmp_path: Path) -> None:
    """Of 24 unanimous prompts half are asked twice, and a third of those are answered both ways."""
    pool = [Candidate(prompt(f"u{n}"), rollouts(f"u{n}", ["1"] * 8)) for n in range(24)]
    told = [label(f"u{n}", "1", "right", 0, repeat) for repeat in (0, 1) for n in range(24) if not repeat or n % 2]
    changed = [replace(x, outcome="wrong") if x.repeat and int(x.prompt_id[1:]) % 3 == 0 else x for x in told]
    sampled, prompts = [[texts_of(c.rollouts)] for c in pool], [c.prompt for c in pool]
    judge = judge_of(tmp_path, pool)
    judge.fit(prompts, sampled, verdicts_of(told))
    trusting = judge.flip_rate
    judge.fit(prompts, sampled, verdicts_of(changed))
    assert trusting < 0.02 < 0.06 < judge.flip_rate
    judge.fit(prompts, sampled, verdicts_of(changed), 0.01)
    assert judge.flip_rate == 0.01


def test_the_uncertainty_is_tested_on_uniform_verdicts_alone() -> None:
    rng = np.random.default_rng(0)
    p = np.linspace(0.5, 0.99, 80)
    told = [label(str(n), "1", "right" if rng.random() < q else "wrong") for n, q in enumerate(p)]
    rows = [{"prompt_id": str(n), "answer": "1", "part": UNIFORM, "probability": float(q)} for n, q in enumerate(p)]
    assert check_uncertainty(rows, told).passed
    shuffled = [row | {"probability": float(q)} for row, q in zip(rows, rng.permutation(p), strict=True)]
    assert not check_uncertainty(shuffled, told).passed
    assert check_uncertainty([row | {"part": "targeted"} for row in rows], told).n == 0


def test_the_majority_decides_where_labels_do_not() -> None:
    sampled = rollouts("a", ["1", "1", "2", None, "1"])
    assert majority(sampled, Knowledge()).rewards == (1, 1, 0, 0, 1)
    assert majority(sampled, Knowledge([label("a", "1", "wrong")])).rewards == (0, 0, 1, 0, 0)
