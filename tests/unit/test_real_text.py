"""Verdicts on real solutions, bought by arm: on made-up solutions whose marks are known, and a cut of the real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from real_text import compare, main, table
from real_text_data import Solutions, features_of, group
from real_text_loop import ARMS, FIRST, UNIFORM, Measure, Settings, agreement, curves, learn

from trlhf.data import LabelledResponse
from trlhf.errors import UserError
from trlhf.files import read_json
from trlhf.reward.features import Pooled
from trlhf.types import Label, Prompt, Question

SETTINGS = Settings(budgets=(16, 24, 48), batch=16, held_out=40, pooling="mean", dimension=8)
QUESTIONS = 120


@dataclass(frozen=True)
class Watched(Solutions):
    """Solutions that remember what was asked."""

    asked: tuple[list[Question]] = ([],)

    def buy(self, question: Question) -> Label:
        self.asked[0].append(question)
        return super().buy(question)


def made_up(signal: float, seed: int = 0) -> Watched:
    """Questions with two answers of two solutions each; ``signal`` moves the hidden states of right ones."""
    rng = np.random.default_rng(seed)
    labelled, states = [], []
    for number in range(QUESTIONS):
        prompt = Prompt(f"q{number}", ({"role": "user", "content": f"Question {number}?"},))
        right = int(rng.integers(2))
        for n in range(4):
            answer = n // 2
            text = f"Way {n} goes there. The answer is {answer + 10 * number}."
            labelled.append(LabelledResponse(prompt, text, answer == right))
            states.append(rng.standard_normal(8) + signal * (1 if answer == right else -1) * np.eye(8)[0])
    candidates, marks = group(labelled)
    rows = {(label.prompt.id, label.response): n for n, label in enumerate(labelled)}
    response = torch.tensor(np.array(states)).float()
    pooled = Pooled(torch.cat([response, response[:, :4]], 1), torch.zeros(len(labelled), 4))
    return Watched(tuple(candidates), marks, rows, pooled, (9,) * len(labelled), ([],))


def asked_by(arm: str, solutions: Watched, seed: int = 0) -> list[tuple[str, str | None]]:
    solutions.asked[0].clear()
    learn(solutions, {arm: ARMS[arm]}, SETTINGS, seed)
    return [(question.prompt.id, question.answer) for question in solutions.asked[0]]


def test_solutions_of_a_question_with_one_answer_share_its_mark() -> None:
    prompt = Prompt("q", ({"role": "user", "content": "?"},))
    texts = [
        "So 3. The answer is 3.",
        "The answer is 3.0.",
        "The answer is 4.",
        "Then he went home, as did all whom he had met on his way there.",
    ]
    marked = [
        LabelledResponse(prompt, text, right) for text, right in zip(texts, (True, True, False, False), strict=True)
    ]
    ((candidate,), marks) = group(marked)
    assert [rollout.answer for rollout in candidate.rollouts] == ["3", "3", "4", None]
    assert marks == {("q", "3"): True, ("q", "4"): False}
    with pytest.raises(UserError, match="answer 3 is marked right and wrong"):
        group([*marked, LabelledResponse(prompt, "It is 3. The answer is 3.", False)])


def test_a_split_is_by_question_and_its_number_decides_it() -> None:
    solutions = made_up(1.0)
    first, other = solutions.split(40, 0), solutions.split(40, 1)
    names = [{candidate.prompt.id for candidate in part} for part in first]
    assert (len(names[0]), len(names[1])) == (QUESTIONS - 40, 40) and not names[0] & names[1]
    assert first == solutions.split(40, 0) and first != other


def test_components_come_from_questions_that_may_be_asked_about() -> None:
    solutions = made_up(1.0)
    held_in, held_out = solutions.split(40, 0)
    rows = [solutions.rows[rollout.prompt_id, rollout.text] for c in held_out for rollout in c.rollouts]
    response = solutions.pooled.response.clone()
    response[rows] += 100.0
    moved = replace(solutions, pooled=Pooled(response, solutions.pooled.prompt))
    kept = np.setdiff1d(np.arange(len(response)), rows)
    before, after = (features_of(each, held_in, "mean", 5) for each in (solutions, moved))
    assert before.shape == (4 * QUESTIONS, 5)
    np.testing.assert_allclose(after[kept], before[kept], atol=1e-12)
    assert (after[rows] != before[rows]).any()


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_buys_what_it_may_and_nothing_twice(arm: str) -> None:
    solutions = made_up(1.0)
    asked = asked_by(arm, solutions)
    held_in = {candidate.prompt.id for candidate in solutions.split(SETTINGS.held_out, 0)[0]}
    assert len(asked) == len(set(asked)) == SETTINGS.budgets[-1] and {name for name, _ in asked} <= held_in
    assert asked[:FIRST] == asked_by(UNIFORM, solutions)[:FIRST], "all arms start from the same verdicts"
    assert all(len({name for name, _ in batch}) == len(batch) for batch in (asked[:16], asked[16:24], asked[24:40]))
    assert asked == asked_by(arm, solutions), "a split decides everything"


def test_a_decided_question_is_not_asked_about_again() -> None:
    solutions = made_up(1.0)
    decided = set()
    for name, answer in asked_by("max_entropy", solutions):
        assert name not in decided
        if solutions.marks[name, answer or ""]:
            decided.add(name)


def test_arms_differ() -> None:
    solutions = made_up(1.0)
    chosen = {arm: tuple(sorted(asked_by(arm, solutions)[FIRST:], key=str)) for arm in ARMS}
    alike = {arm for arm in ARMS if "no gate" not in arm and arm not in ("uniform, gate", "v_optimal, frontier")}
    assert len({chosen[arm] for arm in alike}) == len(alike)


def test_a_repetitive_solution_is_not_asked_about_behind_the_gate() -> None:
    solutions = made_up(1.0)
    looping = [
        replace(c, rollouts=tuple(replace(rollout, token_ids=(7,) * 40) for rollout in c.rollouts)) if n % 2 else c
        for n, c in enumerate(solutions.candidates)
    ]
    watched = replace(solutions, candidates=tuple(looping))
    numbers = {
        arm: [int(name[1:]) for name, _ in asked_by(arm, watched)[FIRST:]] for arm in ("v_optimal", "uniform, gate")
    }
    assert all(number % 2 == 0 for found in numbers.values() for number in found)
    assert any(int(name[1:]) % 2 for name, _ in asked_by("v_optimal, no gate", watched)[FIRST:])


@pytest.mark.parametrize("arm", [UNIFORM, "v_optimal"])
def test_what_the_verdicts_say_of_hidden_states_is_learned(arm: str) -> None:
    settings = replace(SETTINGS, heads=2, heads_budgets=(48,))
    told = learn(made_up(2.0), {arm: ARMS[arm]}, settings, 0)[arm]
    assert [row["labels"] for row in told] == [16, 24, 48] and "heads_auc" not in told[0]
    for metric in ("auc", "within", "features_within", "heads_auc", "heads_within"):
        assert (told[-1][metric] or 0) > 0.9, metric
    noise = learn(made_up(0.0), {arm: ARMS[arm]}, settings, 0)[arm][-1]
    for metric in ("auc", "within", "features_within", "heads_auc", "heads_within"):
        assert 0.3 < (noise[metric] or 0) < 0.7, metric


def test_agreement_needs_no_verdict() -> None:
    solutions = made_up(0.0)
    marks = {(name, answer): int(answer) % 10 == 0 for name, answer in solutions.marks}  # the first answer is right
    three = [replace(c, rollouts=c.rollouts[:3]) for c in solutions.candidates]
    assert agreement(replace(solutions, marks=marks), three) == {"auc": 1.0, "within": 1.0}
    one = [replace(c, rollouts=c.rollouts[1:]) for c in solutions.candidates]
    assert agreement(replace(solutions, marks=marks), one) == {"auc": 0.0, "within": 0.0}
    assert agreement(solutions, solutions.candidates) == {"auc": 0.5, "within": 0.5}


def cells(**metrics: dict[str, list[list[float]]]) -> dict[tuple[str, int], list[Measure]]:
    """Return cells from metric → arm → values by split and budget."""
    found: dict[tuple[str, int], list[Measure]] = {}
    for metric, by_arm in metrics.items():
        for arm, splits in by_arm.items():
            for seed, values in enumerate(splits):
                rows = found.setdefault((arm, seed), [{} for _ in values])
                for row, value in zip(rows, values, strict=True):
                    row[metric] = None if np.isnan(value) else value
    return found


def test_arms_are_compared_split_by_split() -> None:
    plain = [[0.5, 0.6, 0.7], [0.6, 0.7, 0.8], [0.4, 0.5, 0.6]]
    better = [[a, b + 0.1, c + 0.04 * n] for n, (a, b, c) in enumerate(plain)]
    found = compare(cells(auc={UNIFORM: plain, "v_optimal": better}), (16, 32, 64))["auc"]["v_optimal"]
    assert [point["value"] for point in found["less_uniform"]] == pytest.approx([0, 0.1, 0.04])
    assert (found["less_uniform"][1]["low"], found["less_uniform"][1]["high"]) == pytest.approx((0.1, 0.1))
    assert found["area_less_uniform"]["value"] == pytest.approx((0 + 2 * 0.1 + 0.04) / 4)
    low, high = found["area_less_uniform"]["low"], found["area_less_uniform"]["high"]  # splits: 0.05, 0.06, 0.07
    assert 0.0499 < low < 0.06 < high < 0.0701
    assert found["area"]["splits"] == 3


def test_a_metric_counts_where_it_was_measured() -> None:
    nan = float("nan")
    given = cells(auc={UNIFORM: [[0.5, 0.6]]}, heads_auc={UNIFORM: [[nan, 0.55]], "v_optimal": [[nan, 0.65]]})
    found = compare(given, (16, 64))
    assert found["heads_auc"]["v_optimal"]["budgets"] == [64]
    assert found["heads_auc"]["v_optimal"]["area_less_uniform"]["value"] == pytest.approx(0.1)
    assert "v_optimal" not in found["auc"]
    assert np.isnan(curves(given, UNIFORM, "heads_auc")[0, 0])
    assert "| v_optimal | 0.650 | 0.650 | +0.100 [+0.100, +0.100] |" in table(found, "heads_auc")


def test_a_cut_of_the_real_solutions(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shared_data("gsm8k/example_model_solutions.jsonl").parent
    for _ in range(2):  # the second time from the cache
        given = ["--quick", "--data", str(folder), "--cache", str(tmp_path), "--output", str(tmp_path / "out.json")]
        assert main(given) == 0
    results = read_json(tmp_path / "out.json")
    assert results["solutions"]["read"] == 400 and results["solutions"]["questions"] == 100
    assert len(list(tmp_path.glob("features-*.safetensors"))) == 1
    curve = results["compared"]["auc"]["v_optimal"]["curve"]
    assert [point["splits"] for point in curve] == [2, 2] and curve[-1]["value"] > 0.7  # agreement alone: 0.88


def test_a_folder_without_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no example_model_solutions\.jsonl; give the folder"):
        main(["--quick", "--data", str(tmp_path)])
