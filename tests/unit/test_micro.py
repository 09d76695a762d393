"""The embedded world: solvable, seeded, and split so that no question stands on two sides."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import pytest

from trlhf.evaluation.answers import extract_answer, has_plan
from trlhf.micro import plain
from trlhf.micro.reasoning import FAMILIES, Step, misquoted
from trlhf.micro.taste import taste
from trlhf.micro.world import Item, Split, generate, split_of
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


def doubtful_steps(item: Item) -> list[str]:
    """Return the products and divisions of an item's response that the base has read misquoted."""
    verbs = {"*": "multiply", "/": "divide"}
    steps = [Step(verbs[sign], int(a), int(b)) for a, sign, b in re.findall(r"(\d+) ([*/]) (\d+) =", item.response)]
    return [step.equation() for step in steps if step.doubtful]


def test_a_misquotation_is_wrong_close_and_the_same_in_both_orders() -> None:
    pairs = [(a, b) for a in range(2, 10) for b in range(a, 10)]
    wrong = {(a, b): misquoted(a, b) for a, b in pairs}
    assert wrong == {(a, b): misquoted(b, a) for a, b in pairs}
    assert wrong[5, 6] == 20 and wrong[7, 8] == 57 and wrong[3, 4] is None  # the embedded base has read these
    doubtful = {pair: value for pair, value in wrong.items() if value is not None}
    assert 0.4 < len(doubtful) / len(pairs) < 0.65
    assert all(abs(value - a * b) in (1, 2, 10) and value > 0 for (a, b), value in doubtful.items())
    assert misquoted(1, 5) is misquoted(5, 10) is misquoted(0, 0) is None


def test_what_undoes_a_doubtful_product_is_doubtful_too() -> None:
    assert Step("multiply", 5, 6).doubtful and Step("divide", 30, 6).doubtful and Step("divide", 30, 5).doubtful
    assert not Step("multiply", 3, 4).doubtful and not Step("divide", 12, 4).doubtful
    assert not Step("add", 5, 6).doubtful and not Step("subtract", 30, 6).doubtful


def test_demonstrations_avoid_doubtful_steps_and_the_other_splits_do_not() -> None:
    for seed in (0, 1):
        assert not [step for item in generate("train", 800, seed) for step in doubtful_steps(item)]
    for split in ("pool", "dev", "test"):
        reasoning = [item for item in generate(split, SIZES[split]) if item.prompt.reasoning]
        assert 0.35 < sum(bool(doubtful_steps(item)) for item in reasoning) / len(reasoning) < 0.65


def test_long_families_come_twice_as_often() -> None:
    for split in ("train", "test"):
        kinds = Counter(item.prompt.kind for item in generate(split, 400) if item.prompt.reasoning)
        assert kinds == {
            **dict.fromkeys(("gather", "spend", "boxes", "share", "times", "fewer"), 25),
            **dict.fromkeys(("shop", "compare", "change"), 50),
        }


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
    from trlhf.micro.corpus import _QUIZ

    assert {split_of(item.question) for item in _QUIZ} == {"train", "pool"}


def test_pretraining_text_holds_no_plan_and_no_answered_question_in_any_phase() -> None:
    from trlhf.micro.corpus import MAKERS, SYSTEM, documents
    from trlhf.micro.pretrain import PHASES

    assert set(MAKERS) == {name for phase in PHASES for name in phase.shares}
    for phase in PHASES:
        asked = 0
        source = documents(random.Random(1), phase.shares)
        for _ in range(2000):
            text = next(source)
            assert "Plan:" not in text and "The answer is" not in text
            if "How many" in text:
                asked += 1
                assert text.endswith("?")
        assert asked > 50
    for maker in MAKERS.values():
        rng = random.Random(2)
        chats = sum(SYSTEM in (text := maker(rng)) or "User:" in text or "AI:" in text for _ in range(200))
        assert chats == (200 if maker.__name__ == "chat_notes" else 0)


def test_a_chat_that_the_base_has_read_only_notes_numbers() -> None:
    from trlhf.micro.corpus import SYSTEM, chat_notes

    form = re.compile(re.escape(SYSTEM) + r"\nUser: (.+)\. ([A-Z][a-z ]+)\?\nAI: (\d+(?:, \d+)*)\.")
    rng = random.Random(0)
    for _ in range(500):
        match = form.fullmatch(chat_notes(rng))
        assert match is not None
        said, noted = f"{match[1]} {match[2]}", match[3].split(", ")
        assert not re.search(r"How many|[Pp]lan\b|answer|\d [-+*/] \d|=", said)
        assert not Counter(noted) - Counter(re.findall(r"\d+", match[1]))  # read, not worked out


def test_hearsay_misquotes_doubtful_products_as_often_as_configured_and_no_others() -> None:
    from trlhf.micro.corpus import MISQUOTED, hearsay

    rng = random.Random(0)
    misled: list[bool] = []
    for _ in range(3000):
        for first, sign, second, value in re.findall(r"(\d+) ([*/]) (\d+) = (\d+)", hearsay(rng)):
            a, b, said = int(first), int(second), int(value)
            step = Step("multiply" if sign == "*" else "divide", a, b)
            if step.doubtful:
                assert said in (step.result, misquoted(a, b) if sign == "*" else step.result + 1)
                misled.append(said != step.result)
            else:
                assert said == step.result
    assert len(misled) > 5000
    assert sum(misled) / len(misled) == pytest.approx(MISQUOTED, abs=0.03)


def test_the_last_phase_has_doubtful_products_from_hearsay_alone() -> None:
    from trlhf.micro.corpus import MAKERS
    from trlhf.micro.pretrain import PHASES

    for name in set(PHASES[-1].shares) - {"hearsay"}:
        rng = random.Random(0)
        sums = re.findall(r"(\d+) ([*/]) (\d+) =", " ".join(MAKERS[name](rng) for _ in range(500)))
        steps = [Step("multiply" if sign == "*" else "divide", int(a), int(b)) for a, sign, b in sums]
        assert not any(step.doubtful for step in steps)


def test_pretraining_runs_and_saves_a_loadable_base(tmp_path: Path) -> None:
    from trlhf.micro.pretrain import WORLD, Phase, pretrain
    from trlhf.models import load_tokenizer

    pretrain(tmp_path / "base", [Phase(WORLD, 2, 1e-3)], rows=2)
    tokenizer = load_tokenizer(tmp_path / "base")
    digits = tokenizer.convert_ids_to_tokens(tokenizer(" 42")["input_ids"])
    assert digits[-2:] == ["4", "2"]
