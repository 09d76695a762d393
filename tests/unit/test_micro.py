"""The embedded world: solvable, seeded, and split so that no question stands on two sides."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from trlhf.evaluation.answers import extract_answer, has_plan
from trlhf.micro import plain
from trlhf.micro.reasoning import FAMILIES
from trlhf.micro.taste import taste
from trlhf.micro.world import Split, generate, split_of
from trlhf.types import Prompt

SIZES: dict[Split, int] = {"train": 800, "pool": 600, "dev": 150, "test": 400}


def questions(split: Split, seed: int = 0) -> set[str]:
    return {item.prompt.messages[-1]["content"] for item in generate(split, SIZES[split], seed)}


def test_no_question_stands_in_two_splits_whatever_the_seeds() -> None:
    splits: list[Split] = ["train", "pool", "dev", "test"]
    for first in splits:
        for second in splits:
            if first != second:
                assert not questions(first, 0) & questions(second, 7)


def test_splits_have_the_size_asked_for_and_no_question_twice() -> None:
    for split, size in SIZES.items():
        items = generate(split, size)
        assert len(items) == len({item.prompt.messages[-1]["content"] for item in items}) == size
        assert len({item.prompt.id for item in items}) == size


def test_train_and_pool_follow_the_seed_and_test_does_not() -> None:
    assert questions("train", 0) != questions("train", 1)
    assert generate("test", 50, 0) == generate("test", 50, 1)
    assert generate("pool", 50, 3) == generate("pool", 50, 3)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_every_problem_is_solved_by_its_steps(family) -> None:  # type: ignore[no-untyped-def]
    rng = random.Random(0)
    distracted = 0
    for _ in range(200):
        problem = family(rng)
        assert 1 <= len(problem.steps) <= 4
        for step in problem.steps:
            assert eval(step.equation().split("=")[0]) == step.result
            assert 0 <= step.result <= 99
        assert extract_answer(problem.solution) == problem.answer
        assert has_plan(problem.solution)
        numbers = [word for word in problem.story.replace(".", " ").split() if word.isdigit()]
        used = {str(n) for step in problem.steps for n in (step.left, step.right)}
        distracted += any(number not in used for number in numbers)
    assert distracted > 50  # distractors are there


def test_plain_prompts_are_answered_plainly() -> None:
    rng = random.Random(0)
    for kind, items in plain.every_plain().items():
        for item in items:
            reply = item.reply(rng)
            assert not has_plan(reply)
            if item.answer is not None:
                assert extract_answer(reply) == item.answer
            else:
                assert taste(Prompt("x", ({"role": "user", "content": item.question},), kind, "open"), reply) > -1


def test_taste_tells_replies_apart_and_rejects_what_misses_the_task() -> None:
    prompt = Prompt("x", ({"role": "user", "content": "Write a line about the sea."},), "line", "open", False)
    rng = random.Random(0)
    scores = {taste(prompt, plain.line_reply(rng, "sea")) for _ in range(50)}
    assert len(scores) > 20 and max(scores) - min(scores) > 0.5
    assert taste(prompt, plain.line_reply(rng, "moon")) == -3
    assert taste(prompt, "The sea is blue.") == -3
    listing = Prompt("y", ({"role": "user", "content": "List three tools."},), "list", "open", False)
    assert taste(listing, "saw, saw, drill.") == -3 == taste(listing, "saw, drill.")
    assert taste(listing, "saw, axe, drill.") > -1.01


def test_up_to_a_quarter_of_a_split_is_plain() -> None:
    for size, share in ((200, 0.25), (1500, 0.15)):
        items = generate("train", size)
        assert sum(not item.prompt.reasoning for item in items) / size == pytest.approx(share, abs=0.03)


def test_the_base_is_small_and_was_not_shown_the_test_questions() -> None:
    folder = Path(__file__).parents[2] / "trlhf" / "micro" / "base"
    assert (folder / "model.safetensors").stat().st_size < 4_000_000
    from trlhf.micro.pretrain import _QUIZ

    assert {split_of(item.question) for item in _QUIZ} == {"train", "pool"}


def test_pretraining_text_holds_no_chat_no_plan_and_no_answered_question() -> None:
    from trlhf.micro.pretrain import documents

    source = documents(random.Random(1))
    asked = 0
    for _ in range(3000):
        text = next(source)
        assert not any(mark in text for mark in ("User:", "AI:", "Plan:", "The answer is"))
        if "How many" in text:
            asked += 1
            assert text.endswith("?")
    assert asked > 100


def test_pretraining_runs_and_saves_a_loadable_base(tmp_path: Path) -> None:
    from trlhf.micro.pretrain import FIRST_WEIGHTS, Phase, pretrain
    from trlhf.models import load_tokenizer

    pretrain(tmp_path / "base", [Phase(FIRST_WEIGHTS, 2, 1e-3)], rows=2)
    tokenizer = load_tokenizer(tmp_path / "base")
    digits = tokenizer.convert_ids_to_tokens(tokenizer(" 42")["input_ids"])
    assert digits[-2:] == ["4", "2"]
