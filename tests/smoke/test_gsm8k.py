"""All stages on a little GSM8K, made up and (where at hand) real, with no right verdict."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import trlhf
from trlhf.compose import compose
from trlhf.config import Config
from trlhf.labelers.exact import ExactVerifier
from trlhf.tasks import load_task
from trlhf.types import Question

FILES = {"train.jsonl": 32, "test.jsonl": 20, "example_model_solutions.jsonl": 20}  # lines of the cut
SIZES = [
    "data.sft_prompts=16",
    "data.pool_prompts=12",
    "data.test_prompts=8",
    "sft.epochs=1",
    "reward.max_labelled=40",
    "reward.holdout=0.4",
    "rl.rounds=1",
    "rl.steps_per_round=2",
    "rl.prompts_per_step=4",
    "rl.samples_per_prompt=4",
    "rl.minibatch_size=16",
    "rl.microbatch_size=16",
    "rl.value_warmup_steps=0",
    "rl.max_new_tokens=96",
    "targeting.samples_per_prompt=4",
    "targeting.candidates=8",
    "targeting.budget=8",
    "evaluation.max_new_tokens=48",
    "hardware.device=cpu",
]


# ---- a made-up GSM8K: a dozen stories, told with other numbers ----

STORIES = [  # who and what; the total is of a times b; then c more or fewer
    ("Mira fills {a} jars with {b} plums each. Then she eats {c} plums. How many plums are left?", "plums", "-"),
    ("A bus makes {a} trips with {b} riders each, and {c} riders walk. How many riders are there?", "riders", "+"),
    ("Otto buys {a} packs of {b} nails and loses {c} nails. How many nails has he?", "nails", "-"),
    ("A wall has {a} rows of {b} tiles. A mason adds {c} tiles. How many tiles are there now?", "tiles", "+"),
    ("Lena reads {a} pages a day for {b} days, and {c} pages on Sunday. How many pages?", "pages", "+"),
    ("{a} hens lay {b} eggs each. A fox takes {c} eggs. How many eggs remain?", "eggs", "-"),
    ("A choir has {a} rows of {b} singers, and {c} singers are ill. How many singers sing?", "singers", "-"),
    ("Ravi saves ${b} a week for {a} weeks and gets ${c} from his aunt. How many dollars has he?", "dollars", "+"),
    ("A baker fills {a} trays with {b} rolls and burns {c} rolls. How many rolls can he sell?", "rolls", "-"),
    ("There are {a} tables with {b} chairs, and {c} more chairs. How many chairs are there?", "chairs", "+"),
    ("Nina runs {b} laps on each of {a} days, and {c} laps today. How many laps has she run?", "laps", "+"),
    ("A farmer packs {a} boxes of {b} pears and gives away {c} pears. How many pears stay?", "pears", "-"),
]


def problem(number: int) -> dict[str, Any]:
    """Return a question, its solution in GSM8K's notation without the final line, and the answer."""
    (story, thing, sign), a, b, c = STORIES[number % 12], 4 + number, 3 + number % 5, 2 + number % 7
    product, answer = a * b, a * b + c if sign == "+" else a * b - c
    worked = (
        f"There are {a}*{b} = <<{a}*{b}={product}>>{product} {thing} at first.\n"
        f"So in the end there are {product}{sign}{c} = <<{product}{sign}{c}={answer}>>{answer} {thing}."
    )
    return {"question": story.format(a=a, b=b, c=c), "worked": worked, "answer": answer, "sum": (a, b, c)}


def make_gsm8k(folder: Path) -> None:
    """Write train.jsonl, test.jsonl, and of the test problems two right solutions and two that only add."""
    folder.mkdir()
    problems = [problem(number) for number in range(FILES["train.jsonl"] + FILES["test.jsonl"])]
    train, test = problems[: FILES["train.jsonl"]], problems[FILES["train.jsonl"] :]

    def save(name: str, rows: Sequence[Any]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    for name, part in (("train.jsonl", train), ("test.jsonl", test)):
        save(name, [{"question": p["question"], "answer": f"{p['worked']}\n#### {p['answer']}"} for p in part])
    rows = []
    for p in test:
        right = {"is_correct": True, "solution": f"{p['worked']}\nA: {p['answer']}"}
        numbers = "+".join(map(str, p["sum"]))
        wrong = {"is_correct": False, "solution": f"It is {numbers} = <<{numbers}={sum(p['sum'])}>>{sum(p['sum'])}"}
        wrong["solution"] += f"\nA: {sum(p['sum'])}"
        models = {"small": wrong, "small_checked": right, "large": right, "large_checked": wrong}
        rows.append({"question": p["question"], "ground_truth": f"{p['worked']}\nA: {p['answer']}", **models})
    save("example_model_solutions.jsonl", rows)


def cut_gsm8k(folder: Path, shared_data: Callable[[str], Path]) -> None:
    """Write the first lines of the real files."""
    folder.mkdir()
    for name, count in FILES.items():
        lines = shared_data(f"gsm8k/{name}").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:count]), encoding="utf-8")


def one(*overrides: str) -> Config:
    (config,) = compose(overrides).configs
    return config


@pytest.fixture(scope="module", params=["made_up", "real"])
def gsm8k(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shared_data: Callable[[str], Path]
) -> Path:
    folder = tmp_path_factory.mktemp("data") / str(request.param)
    if request.param == "real":
        cut_gsm8k(folder, shared_data)
    else:
        make_gsm8k(folder)
    return folder


@pytest.fixture(scope="module")
def finished(gsm8k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every stage in which no verdict found a right answer, as with a model that is hardly ever right."""
    directory = tmp_path_factory.mktemp("gsm8k") / "run"

    def wrong(self: ExactVerifier, questions: Sequence[Question]) -> list[str]:
        return ["wrong"] * len(questions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExactVerifier, "answer", wrong)
        trlhf.run(["model=micro", "data=gsm8k", f"data.path={gsm8k}", *SIZES, f"run.dir={directory}"])
    return directory


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_all_stages_end_and_say_what_came_of_them(finished: Path) -> None:
    summary = read(finished / "summary.json")
    assert set(summary["seconds"]) == {"sft", "reward", "rl", "eval"}
    assert [summary["accuracy"][name]["n"] for name in ("base", "sft", "rl")] == [8, 8, 8]
    assert list(summary["by_kind"]["rl"]) == ["gsm8k"]
    assert 0 <= summary["labels"]["spent"] <= summary["labels"]["budget"] == 8
    assert summary["demonstrations"] == 16


def test_the_reward_model_learns_from_the_labels_that_come_with_the_data(gsm8k: Path, finished: Path) -> None:
    metrics = read(finished / "reward" / "metrics.json")
    train, held_out = metrics["labels"]["train"], metrics["labels"]["held_out"]
    assert train["verdicts"] + held_out["verdicts"] == 40 and held_out["prompts"] == 4  # four models' solutions of each
    auc = metrics["held_out"]["verdicts"]["auc"]
    assert auc is not None and 0 < held_out["right"] < 16  # both classes are held out
    if gsm8k.name == "made_up":  # where whoever multiplies is right: 1.0 as a rule, 0.5 without learning
        assert auc > 0.9 and train["right"] == 12 and held_out["right"] == 8
    assert metrics["held_out"]["verdicts"]["accuracy"]["n"] == held_out["verdicts"] == 16
    log = (finished / "trlhf.log").read_text(encoding="utf-8")
    assert "labels that come with the data: 40 of 48 rows used" in log
    assert "40 labels come with the data, so this stage buys none" in log
    assert "held-out verdicts: AUC " in log


def test_without_a_right_verdict_the_reward_model_decides_and_the_log_says_so(finished: Path) -> None:
    assert read(finished / "rl" / "round_01.json")["verifiable_prompts"] == 0
    log = (finished / "trlhf.log").read_text(encoding="utf-8")
    assert "round 1: no right answer is known yet, so it learns on unverified prompts alone" in log
    rows = [json.loads(line) for line in (finished / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    samples = [json.loads(line) for line in (finished / "rl" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 * 4 and len({row["prompt_id"] for row in samples}) == 4  # a whole step of them
    assert all(row["reward"] < 1 for row in samples)


def test_the_answers_of_the_notation_decide_what_is_right(tmp_path: Path) -> None:
    make_gsm8k(tmp_path / "made_up")
    config = one("data=gsm8k", f"data.path={tmp_path / 'made_up'}", *SIZES)
    task = load_task(config)
    shown = [prompt.messages[-1]["content"] for prompt in task.pool]
    assert not any(mark in text for text in shown for mark in ("<<", "####")), "a prompt gives nothing away"
    told = {problem(number)["question"]: problem(number)["answer"] for number in range(FILES["train.jsonl"])}
    gold = [told[text] for text in shown]
    asked = [
        Question("verdict", p, (f"The answer is {n + off}.",), str(n + off), "why")
        for p, n in zip(task.pool, gold, strict=True)
        for off in (0, 1)
    ]
    assert task.labeler(config).answer(asked) == ["right", "wrong"] * 12
    assert all(("multiply" in label.response) == label.right for label in task.labelled)


# ---- which sizes ----


def test_a_tiny_model_gets_a_budget_that_suits_it() -> None:
    config = one("model=micro", "data=gsm8k", "data.path=openai/gsm8k")
    assert (config.data.sft_prompts, config.data.test_prompts, config.targeting.budget) == (500, 100, 64)
    assert config.rl.unverified_share > 0 and config.reward.max_labelled > 0
    assert one().reward.max_labelled == 0 and one().rl.unverified_share == 0


@pytest.mark.parametrize("overrides", [["model=mistral-7b"], ["experiment=cerebrum-7b"]])
def test_a_7b_keeps_its_own(overrides: list[str]) -> None:
    generated, real = one(*overrides), one(*overrides, "data=gsm8k", "data.path=openai/gsm8k")
    assert (real.sft, real.reward, real.rl, real.evaluation) == (
        generated.sft,
        generated.reward,
        generated.rl,
        generated.evaluation,
    )
    assert (real.targeting.budget, real.targeting.candidates) == (
        generated.targeting.budget,
        generated.targeting.candidates,
    )


def test_a_budget_is_not_measured_against_labels_that_nobody_buys(tmp_path: Path) -> None:
    (tmp_path / "example_model_solutions.jsonl").touch()
    asked = ["experiment=cerebrum-7b", "data=gsm8k", "targeting.budget=64"]
    assert one(*asked, f"data.path={tmp_path}").reward.labels == 128
    with pytest.raises(trlhf.ConfigError, match=r"reward.labels=128 must not exceed targeting.budget=64"):
        one(*asked, "data.path=openai/gsm8k")
    with pytest.raises(trlhf.ConfigError, match=r"reward.labels=0 buys no labels and data.path has no example_model"):
        one("data=gsm8k", "data.path=openai/gsm8k", "reward.labels=0")
