"""Against lm-eval, run by itself on a saved model: the same numbers, and the same answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trlhf
from trlhf.config import EvaluationConfig, ModelConfig
from trlhf.errors import UserError
from trlhf.evaluation import mirror
from trlhf.evaluation.harness import Outcome, run_task
from trlhf.evaluation.suites import SUITES
from trlhf.files import write_jsonl
from trlhf.models import MICRO_BASE, load_causal_lm, load_tokenizer

THINGS = ["plums", "jars", "riders", "nails", "tiles", "pages", "eggs", "singers", "rolls", "chairs", "laps", "pears"]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Read no data set that an earlier test, or the user, has left in the cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mirror with made-up questions in the form of AGIEval and GSM8K."""
    folder = tmp_path_factory.mktemp("data")
    sums = [(3 + number, 2 + 5 * number % 7, thing) for number, thing in enumerate(THINGS)]
    choices = [
        {
            "passage": f"Ann has {a} {thing}. " * (1 + a % 3) if a % 2 else None,
            "question": f"How many {thing} are {a} and {b} {thing}?",
            "options": [f"({'ABCD'[place]}){a + b + (place - a) % 4} {thing}" for place in range(4)],
            "label": "ABCD"[a % 4],
        }
        for a, b, thing in sums
    ]
    for name in mirror.AGIEVAL:
        write_jsonl(folder / "raw" / f"{name}.jsonl", choices)
    solved = [
        {"question": f"What are {a} and {b} {thing}?", "answer": f"{a}+{b} = <<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"}
        for a, b, thing in sums
    ]
    write_jsonl(folder / "raw/train.jsonl", solved[:8])
    write_jsonl(folder / "raw/test.jsonl", solved[8:])
    mirror.main([str(folder / "mirror"), f"agieval={folder / 'raw'}", f"gsm8k={folder / 'raw'}"])
    return folder / "mirror"


def ours(copies: Path, suite: str, place: int, batch_size: int) -> Outcome:
    model = load_causal_lm(MICRO_BASE, ModelConfig())
    config = EvaluationConfig(mirror=str(copies), batch_size=batch_size)
    return run_task(model, load_tokenizer(MICRO_BASE), SUITES[suite].tasks[place], config, "test", 0)


def theirs(copies: Path, task: str, shots: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run lm-eval as its users do: a saved model by its path, in a folder with copies of the data."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(copies)
    folder = Path(lm_eval.__file__).parent / "tasks" / task.split("_")[0]
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(MICRO_BASE), "dtype": "float32"},
        tasks=[task],
        num_fewshot=shots,
        batch_size=1,
        device="cpu",
        task_manager=TaskManager(include_path=[folder], include_defaults=False),
        bootstrap_iters=0,
    )
    return dict(found)


def test_log_likelihoods_are_lm_evals(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ours(copies, "agieval", 7, batch_size=5)
    expected = theirs(copies, "agieval_sat_math", 0, monkeypatch)
    result, samples = expected["results"]["agieval_sat_math"], expected["samples"]["agieval_sat_math"]
    assert found.estimate["value"] == pytest.approx(result["acc_norm,none"], abs=1e-6) and found.estimate["n"] == 12
    assert found.also["acc"]["value"] == pytest.approx(result["acc,none"], abs=1e-6)
    assert 0 < found.estimate["value"] < 1 and found.chance == 0.25
    for own, other in zip(found.samples, samples, strict=True):
        logprobs = [value[0][0] for value in other["resps"]]
        assert own["loglikelihoods"] == pytest.approx(logprobs, rel=1e-6)
        assert (own["prompt_hash"], own["acc_norm"]) == (other["prompt_hash"], other["acc_norm"])


def test_generated_answers_are_lm_evals(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five shots, drawn at random from the training questions: the same ones, and so the same answers."""
    found = ours(copies, "open-llm-v1", 5, batch_size=4)
    expected = theirs(copies, "gsm8k", 5, monkeypatch)
    assert found.estimate["value"] == expected["results"]["gsm8k"]["exact_match,strict-match"]
    samples = [row for row in expected["samples"]["gsm8k"] if row["filter"] == "strict-match"]
    assert [row["response"] for row in found.samples] == [row["resps"][0][0] for row in samples]
    assert [row["prompt_hash"] for row in found.samples] == [row["prompt_hash"] for row in samples]
    assert len({row["response"] for row in found.samples}) > 1 and found.chance is None


def test_too_long_questions_are_counted(copies: Path) -> None:
    model = load_causal_lm(MICRO_BASE, ModelConfig())
    model.config.max_position_embeddings = 81
    config = EvaluationConfig(mirror=str(copies), batch_size=4, limit=4)
    tokenizer = load_tokenizer(MICRO_BASE)
    found = run_task(model, tokenizer, SUITES["agieval"].tasks[7], config, "test", 0)
    lengths = [
        len(tokenizer(row["query"] + " " + choice)["input_ids"])
        for row in first(copies, 4)
        for choice in row["choices"]
    ]
    assert found.truncated == sum(length > 82 for length in lengths) and 0 < found.truncated < len(lengths)


def test_a_context_without_room_for_a_response_is_told(copies: Path) -> None:
    model = load_causal_lm(MICRO_BASE, ModelConfig())
    model.config.max_position_embeddings = 256
    config = EvaluationConfig(mirror=str(copies), limit=1)
    with pytest.raises(UserError, match=r"test: a response may take 256 tokens, but the model's context of 256 leaves"):
        run_task(model, load_tokenizer(MICRO_BASE), SUITES["open-llm-v1"].tasks[5], config, "test", 0)


def first(copies: Path, count: int) -> list[dict[str, Any]]:
    lines = (copies / "hails/agieval-sat-math/default/test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def test_a_copy_that_changed_is_read_again(copies: Path, tmp_path: Path) -> None:
    from trlhf.evaluation.questions import load_questions

    task = SUITES["reasoning"].tasks[0]
    counts = []
    for rows in (3, 5):
        solved = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(rows)]
        write_jsonl(tmp_path / "raw/train.jsonl", solved)
        write_jsonl(tmp_path / "raw/test.jsonl", solved)
        mirror.write_gsm8k(tmp_path / "raw", tmp_path / "mirror")
        counts.append(len(load_questions(task, str(tmp_path / "mirror"), None)[0]))
    counts.append(len(load_questions(task, str(copies), None)[0]))
    assert counts == [3, 5, 4]


def test_data_that_cannot_be_read_are_the_users_to_mend(copies: Path, tmp_path: Path) -> None:
    (tmp_path / "openai/gsm8k").mkdir(parents=True)
    model = load_causal_lm(MICRO_BASE, ModelConfig())
    with pytest.raises(UserError, match=r"gsm8k: its data .*openai/gsm8k cannot be read \(.*\); correct that copy"):
        run_task(
            model,
            load_tokenizer(MICRO_BASE),
            SUITES["open-llm-v1"].tasks[5],
            EvaluationConfig(mirror=str(tmp_path)),
            "test",
            0,
        )


def test_real_questions_are_answered_near_chance(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    """AGIEval's eight tasks and GSM8K, the first questions of each, by a model that is too small for them."""
    threads = torch.get_num_threads()
    mirror.main([str(tmp_path / "mirror"), f"agieval={shared_data('agieval')}", f"gsm8k={shared_data('gsm8k')}"])
    run = trlhf.run(
        [
            *("stage=eval", "evaluation=agieval", f"evaluation.mirror={tmp_path / 'mirror'}", "hardware.threads=1"),
            *(f"evaluation.model={MICRO_BASE}", "evaluation.suites=[agieval,reasoning]", "evaluation.limit=8"),
            *("evaluation.tasks=[" + ",".join(task.name for task in SUITES["agieval"].tasks) + ",gsm8k]",),
            *("evaluation.batch_size=16", "evaluation.max_new_tokens=24", "evaluation.majority=2"),
            *(f"run.dir={tmp_path / 'run'}", "hardware.device=cpu"),
        ]
    )
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    metrics = json.loads((run.dir / "eval/metrics.json").read_text(encoding="utf-8"))
    tasks = metrics["suites"]["agieval"]
    assert list(tasks) == [*(task.name for task in SUITES["agieval"].tasks), "average"]
    average = tasks["average"]["model"]
    assert average["n"] == 64 and abs(average["value"] - average["chance"]) < 0.2
    assert average["chance"] == pytest.approx((4 * 0.2 + 4 * 0.25) / 8)  # five options, four options
    assert [tasks[name]["model"]["n"] for name in tasks] == [8] * 8 + [64]
    for name, models in tasks.items():
        entry = models["model"]
        assert entry["at_chance"] == (entry["low"] <= entry["chance"] <= entry["high"]), name
    assert sum(models["model"]["at_chance"] for models in tasks.values()) >= 7  # of nine, and at 95% each
    assert {entry["model"]["protocol"]["harness"].split()[0] for entry in tasks.values()} == {"lm-eval"}
    reasoning = metrics["suites"]["reasoning"]
    assert list(reasoning) == ["gsm8k", "gsm8k maj@2", "gsm8k mean@2"] and reasoning["gsm8k"]["model"]["n"] == 8
    assert reasoning["gsm8k"]["model"]["value"] < 0.3
    assert set(run.summary["suites"]) == {"agieval", "reasoning"} and "accuracy" not in run.summary
    assert {row["task"] for row in metrics["published"]} >= {"gsm8k", "agieval_sat_math", "average"}
