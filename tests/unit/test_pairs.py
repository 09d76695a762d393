"""Which comparisons are asked for: the acquisitions, the gate, repeats in the other order, what is held still."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from trlhf.config import build_config
from trlhf.errors import UserError
from trlhf.labelling import Archive
from trlhf.ledger import Ledger, question_key
from trlhf.rl import ask_pairs, buy
from trlhf.rl.anchors import Anchor, release
from trlhf.rl.ask_pairs import REPEATED, turned, worth_learning
from trlhf.rl.checkpoint import Progress
from trlhf.rl.liking import LikingJudge, open_weights
from trlhf.rl.round import RlInputs, Round, decisions_file
from trlhf.run import RunDirectory
from trlhf.targeting import Candidate
from trlhf.targeting.pairs import Options, all_pairs, choose_pairs, disagreement, pick_pairs
from trlhf.targeting.preferences import Compared, fit_preferences
from trlhf.targeting.swaps import Noise
from trlhf.types import Label, Prompt, Question, Rollout

RNG = np.random.default_rng
MODELLED = ("double_thompson", "v_optimal", "d_optimal", "max_entropy")


def options(prompts: int = 6, each: int = 4, seed: int = 0) -> Options:
    numbers = np.repeat(np.arange(prompts), each)
    features = RNG(seed).normal(size=(len(numbers), 5))
    return Options(features, numbers, np.ones(len(numbers), int), ["line", "list"] * (prompts // 2))


def model(n: int = 12) -> Any:
    rng = RNG(1)
    rows = rng.normal(size=(2, n, 5))
    return fit_preferences(Compared(rows[0], rows[1], rng.choice([0.0, 0.5, 1.0], n)), Noise(0.02, 0.02))


@pytest.mark.parametrize("acquisition", MODELLED)
def test_one_pair_a_prompt_of_its_own_responses(acquisition: str) -> None:
    given = options()
    picks = pick_pairs(given, model(), acquisition, 4, RNG(0))
    asked = [int(given.prompts[pick.first]) for pick in picks]
    assert len(picks) == 4 == len(set(asked))
    assert all(
        given.prompts[pick.second] == x and pick.first != pick.second for x, pick in zip(asked, picks, strict=True)
    )
    assert (picks[0].value is not None) == acquisition.endswith("optimal")


@pytest.mark.parametrize("acquisition", MODELLED)
def test_either_response_may_come_first(acquisition: str) -> None:
    orders = {
        pick.first < pick.second
        for seed in range(8)
        for pick in pick_pairs(options(), model(), acquisition, 4, RNG(seed))
    }
    assert orders == {True, False}


def test_thompson_asks_where_a_person_can_tell_responses_apart() -> None:
    given, known = options(), model()
    value = disagreement(given, known)
    picks = pick_pairs(given, known, "double_thompson", 3, RNG(0))
    assert {int(given.prompts[pick.first]) for pick in picks} == set(np.argsort(-value)[:3].tolist())


def test_disagreement_counts_equal_samples_as_never_told_apart() -> None:
    rows = np.zeros((3, 5))
    given = Options(rows, np.array([0, 1, 1]), np.array([4, 2, 2]), ["a", "a"])
    apart = model().told_apart(rows[:1], rows[:1])[0]
    np.testing.assert_allclose(disagreement(given, model()), [0, apart * 4 / 6])
    assert [pair.tolist() for pair in all_pairs(given)] == [[1], [2]]


def test_apl_wants_the_largest_difference_of_implicit_rewards_where_entropy_is_large() -> None:
    given = options(prompts=2, each=3)
    (pick,) = pick_pairs(given, model(), "apl", 1, RNG(0), np.array([1.0, 2.0]), np.array([9.0, 0, 0, 0, 1, 5]))
    assert {pick.first, pick.second} == {3, 5}
    with pytest.raises(ValueError, match="apl needs the entropy"):
        pick_pairs(given, model(), "apl", 1, RNG(0))
    with pytest.raises(ValueError, match="acquisition='frontier' chooses no pairs"):
        pick_pairs(given, model(), "frontier", 1, RNG(0))


def prompt(name: str) -> Prompt:
    return Prompt(name, ({"role": "user", "content": name},), "line", "open", False)


POOL = [prompt(f"o{n}") for n in range(12)]


def preference(name: str, first: str, second: str, outcome: str = "A", repeat: int = 0) -> Label:
    return Label("preference", name, (first, second), None, outcome, "s", 1.0, "", 0, repeat)


def test_a_repeat_asks_the_same_two_in_the_other_order_once() -> None:
    labels = [preference("o1", "x", "y"), preference("o2", "x", "y"), preference("o2", "y", "x", "B", 1)]
    (repeat,) = turned(labels, POOL, 5, RNG(0), 3)
    assert (repeat.prompt.id, repeat.responses, repeat.repeat, repeat.why) == ("o1", ("y", "x"), 1, REPEATED)
    assert question_key(repeat) != question_key(Question("preference", POOL[1], ("x", "y")))


def of_kind(name: str, kind: str) -> Prompt:
    return Prompt(name, [{"role": "user", "content": name}], task="open", kind=kind)


def test_a_kind_is_learned_or_held_whole() -> None:
    liking = {"good": (0.8, 0.5), "dull": (0.1, 0.1), "junk": (0.1, 0.5), "unknown": (0.9, 0.0)}
    prompts = [of_kind("good", "line"), of_kind("dull", "line"), of_kind("junk", "list"), of_kind("unknown", "list")]
    assert worth_learning(liking, [*prompts, of_kind("never seen", "line")]) == {"line"}
    assert worth_learning({"junk": (0.0, 0.0)}, prompts) == set() and worth_learning({}, prompts) == set()
    assert worth_learning({"junk": (0.3, 0.3)}, prompts) == {"list"}
    anchors = [Anchor(name, (1,), (2,), None) for name in liking]
    assert release(anchors, {"good", "dull"}) == anchors[2:]


@pytest.mark.parametrize("acquisition", [*MODELLED, "apl"])
def test_what_was_compared_is_not_asked_for_again(acquisition: str) -> None:
    given = options(4, 3)
    bought = {frozenset(pair) for pair in zip(*(x.tolist() for x in all_pairs(given)), strict=True)}
    left = [frozenset({0, 2}), frozenset({4, 5})]
    given = given._replace(asked=frozenset(bought.difference(left)))
    picks = pick_pairs(given, model(), acquisition, 4, RNG(0), np.ones(4), np.arange(12.0))
    assert {frozenset({pick.first, pick.second}) for pick in picks} == set(left), "two prompts have a pair left"
    assert pick_pairs(given._replace(asked=frozenset(bought)), model(), acquisition, 4, RNG(0), np.ones(4)) == []


def test_random_pairs_are_new_and_as_many_as_wanted() -> None:
    asked = {(candidate.prompt.id, frozenset(r.text for r in candidate.rollouts[:2])) for candidate in sampled(0)}
    for candidates in ([c for c in sampled(0)], [Candidate(c.prompt, c.rollouts[:3]) for c in sampled(0)]):
        chosen = choose_pairs(candidates, 9, RNG(1), 1, asked)
        assert len(chosen) == 9 and not {(q.prompt.id, frozenset(q.responses)) for q in chosen} & asked
    exhausted = [Candidate(c.prompt, c.rollouts[:2]) for c in sampled(0)]
    exhausted[3] = sampled(0)[3]
    assert [q.prompt.id for q in choose_pairs(exhausted, 4, RNG(1), 1, asked)] == [exhausted[3].prompt.id]


def test_apl_cuts_prompts_by_entropy_and_widens_for_many_labels() -> None:
    given = Options(np.zeros((9, 5)), np.repeat([0, 1, 2, 3], [3, 2, 2, 2]), np.ones(9, int), ["line"] * 4)
    rewards, entropy = np.arange(9.0) ** 2, np.array([0.1, 0.4, 0.3, 0.2])
    asked = [
        [int(given.prompts[p.first]) for p in pick_pairs(given, model(), "apl", n, RNG(0), entropy, rewards)]
        for n in (1, 2, 3)
    ]
    assert asked == [[2], [2, 1], [3, 2, 1]]


def test_open_prompts_are_drawn_where_much_can_be_told_and_none_is_out_of_reach() -> None:
    weights = open_weights(["good", "dull", "new"], {"good": (0.8, 0.5), "dull": (0.4, 0.5)})
    np.testing.assert_allclose(weights, np.array([0.404, 0.204, 0.004]) / 0.612)
    assert open_weights(["a", "b"], {}).tolist() == [0.5, 0.5]


def features(prompts: Any, responses: Any) -> np.ndarray:
    """Length and first letter of a response, some of its letters, and two columns of typicality."""
    letters = [[float(text.count(letter)) for letter in "abcdef"] for text in responses]
    return np.array(
        [[*row, float(len(text)), -float(text.count("e"))] for row, text in zip(letters, responses, strict=True)]
    )


class Letters:
    """A person who likes the letter a; counts what is asked."""

    name = "letters"

    def __init__(self) -> None:
        self.asked: list[Question] = []

    def answer(self, questions: Any) -> list[str]:
        self.asked += questions
        gains = [q.responses[0].count("a") - q.responses[1].count("a") for q in questions]
        return ["A" if gain > 0 else "B" if gain < 0 else "tie" for gain in gains]


def sampled(seed: int) -> list[Candidate]:
    rng = RNG(seed)
    return [
        Candidate(p, tuple(Rollout(p.id, "".join(rng.choice(list("abcdef"), 4)), (5, 6, n + 7)) for n in range(6)))
        for p in POOL
    ]


def a_round(path: Path, ledger: Ledger, person: Letters, monkeypatch: pytest.MonkeyPatch, **targeting: Any) -> Round:
    config = build_config(
        {"targeting": {"budget": 16, "preference_share": 1.0, "repeat_share": 0.25, **targeting},
         "reward": {"labels": 8}, "rl": {"rounds": 2}}
    )  # fmt: skip
    nobody = cast("Any", None)
    inputs = RlInputs(POOL, path, nobody, ledger, person, Archive(POOL), nobody, liking=features)
    monkeypatch.setattr(buy, "sample_candidates", lambda *_: sampled(2))
    monkeypatch.setattr(ask_pairs, "more_open", lambda *_: [])
    return Round(config, RunDirectory(path).stage("rl"), inputs, nobody, nobody, Progress(round=2))


def test_a_round_asks_chosen_pairs_and_repeats_in_the_other_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    person = Letters()
    with Ledger(tmp_path / "ledger.sqlite", 16) as ledger:
        ledger.ask([Question("preference", p, ("aa", "ff"), round=0) for p in POOL[:8]], person)
        trainer = a_round(tmp_path, ledger, person, monkeypatch)
        trainer.state.anchors = [Anchor(p.id, (1,), (2,), None) for p in POOL]
        buy.buy_labels(trainer)
        asked = person.asked[8:]
        repeats = [q for q in asked if q.repeat]
        assert len(asked) == 8 and ledger.spent == 16 and len(repeats) == 2
        assert all(q.responses == ("ff", "aa") and q.round == 2 for q in repeats)
        assert all(q.why.startswith("double_thompson: P(told apart)") for q in asked if not q.repeat)
        decided = trainer.decisions(2)
        assert (
            "10 comparisons" not in decided["preferences_say"]
            and "16 comparisons, 2 of them" in decided["preferences_say"]
        )
        assert decided["open_prompts_learned"] == len(POOL) - len(trainer.state.anchors) > 0
        assert decided["open_kinds_learned"] == [POOL[0].kind]
        trainer.prepare()
        assert trainer.open == POOL
        trainer.stage.write_json(decisions_file(2), decided | {"open_kinds_learned": ["another"]})
        with pytest.raises(UserError, match="no open prompt is of a kind that they tell apart"):
            trainer.prepare()
        trainer.stage.write_json(decisions_file(2), decided)
        again = a_round(tmp_path, ledger, person, monkeypatch)  # as after a kill: nothing is asked twice
        again.state.anchors = [Anchor(p.id, (1,), (2,), None) for p in POOL]
        buy.buy_labels(again)
        assert ledger.spent == 16 and len(person.asked) == 16 and again.state == trainer.state
        assert again.decisions(2) == decided


def test_a_judge_knows_what_the_person_likes_and_says_how_sure_it_is(tmp_path: Path) -> None:
    judge = LikingJudge(features, tmp_path)
    candidates = sampled(0)
    judge.scale_on(POOL, [c.rollouts for c in candidates])
    labels = []
    for c in candidates:
        for two in zip(c.rollouts, c.rollouts[1:], strict=False):
            texts = (two[0].text, two[1].text)
            (outcome,) = Letters().answer([Question("preference", c.prompt, texts)])
            labels.append(preference(c.prompt.id, *texts, outcome))
    judge.fit(POOL, labels)
    group = [Rollout("o0", text) for text in ("aaab", "cdcd", "cdcd", "aacd")] + [Rollout("o0", "aaaa", finished=False)]
    (found,), (seen,) = judge.judge([POOL[0]], [group], RNG(0))
    assert min(found.rewards[0], found.rewards[3]) > found.rewards[1] == found.rewards[2] > found.rewards[4]
    assert sum(found.rewards[:5]) == pytest.approx(2.5, abs=1e-4)
    assert found.rewards[4] == 0 and set(found.trust) == {1.0} and 0 < seen[0] < 1 and 0 < seen[1] <= 1
    first, again = judge.cache.copy(), LikingJudge(features, tmp_path, judge.cache)
    assert again.load()
    again.fit(POOL, labels)
    assert again.model is not None and judge.model is not None and np.array_equal(again.model.mean, judge.model.mean)
    assert again.cache.keys() == first.keys()
