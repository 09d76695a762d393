"""The stages over one run directory: what is done again, how long it took, and which questions a new start asks."""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers.utils import logging as transformers_logging

import trlhf
from trlhf import first_labels
from trlhf.closing import news_of
from trlhf.config import Config, EvaluationConfig, LabelerConfig, ModelConfig, RlConfig, build_config
from trlhf.fitting import fit_task
from trlhf.labelers.exact import ExactVerifier
from trlhf.labelling import Archive, settle_questions
from trlhf.ledger import Ledger
from trlhf.models import encode_prompt, load_tokenizer
from trlhf.rl import buy, checkpoint
from trlhf.rl.checkpoint import Progress
from trlhf.rl.round import RlInputs, Round
from trlhf.roles import Role
from trlhf.run import BEGUN, CHECKPOINTS, RunDirectory, StageDirectory
from trlhf.targeting import Candidate
from trlhf.tasks import Task
from trlhf.types import Prompt, Question, Rollout


class Killed(BaseException):
    """What SIGKILL is to a process."""


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    """Put back what a run in this process sets."""
    threads, bars = torch.get_num_threads(), transformers_logging.is_progress_bar_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()


@pytest.fixture
def evaluate(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run ``stage=eval`` on four prompts with the tiny model."""

    def call(*more: str) -> dict[str, Any]:
        overrides = [
            *("stage=eval", f"model.name={tiny_model_dir}", "template.system=Sums.", f"run.dir={tmp_path / 'run'}"),
            *("data.test_prompts=4", "evaluation.max_new_tokens=4", "hardware.device=cpu", "hardware.threads=1"),
        ]
        return trlhf.run([*overrides, *more]).summary

    return call


def complete(run_dir: Path, stage: str, model: Path) -> None:
    shutil.copytree(model, RunDirectory(run_dir).stage(stage).path / "model")
    RunDirectory(run_dir).stage(stage).complete({})


def test_models_that_were_made_since_are_evaluated_too(
    evaluate: Callable[..., dict[str, Any]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    complete(run_dir, "sft", tiny_model_dir)
    assert list(evaluate()["accuracy"]) == ["base", "sft"]
    complete(run_dir, "rl", tiny_model_dir)
    summary = evaluate()
    assert list(summary["accuracy"]) == ["base", "sft", "rl"] and list(summary["paired"]) == ["base→sft", "sft→rl"]
    before = {path: path.stat().st_mtime_ns for path in (run_dir / "eval").iterdir()}
    assert evaluate() == summary
    assert {path: path.stat().st_mtime_ns for path in (run_dir / "eval").iterdir()} == before
    assert (run_dir / "trlhf.log").read_text().count("stage eval is complete already") == 1


@pytest.mark.parametrize("stopped", ["killed", "told to stop"])
def test_a_stage_that_ended_before_its_summary_was_written_is_noted_later(
    evaluate: Callable[..., dict[str, Any]],
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped: str,
) -> None:
    run = RunDirectory(tmp_path / "run")
    complete(run.path, "sft", tiny_model_dir)
    update = RunDirectory.update_summary
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(StageDirectory, "tidy", lambda _: (_ for _ in ()).throw(Killed))
        if stopped == "killed":
            patch.setattr(RunDirectory, "update_summary", lambda run, news: "seconds" in news or update(run, news))
        evaluate()
    assert run.stage("eval").done and "accuracy" not in run.summary()
    before = {path: path.stat().st_mtime_ns for path in (run.path / "eval").glob("*.json*")}
    (run.path / "eval" / CHECKPOINTS).mkdir()  # as if it had some: a kill while they were deleted
    summary = evaluate()
    assert {path: path.stat().st_mtime_ns for path in (run.path / "eval").glob("*.json*")} == before
    assert list(summary["accuracy"]) == list(summary["plans"]) == ["base", "sft"] and summary["seconds"]["eval"] > 0
    assert not run.interrupted("eval") and not (run.path / "eval" / CHECKPOINTS).exists()


def test_what_each_stage_adds_to_the_summary() -> None:
    assert news_of("sft", {"demonstrations": 3, "loss": 1.0}) == {"demonstrations": 3}
    assert news_of("reward", {"held_out": {"n": 2}, "fit": {}}) == {"reward": {"held_out": {"n": 2}}}
    labels = {"budget": 9.0, "spent": 4.0, "remaining": 5.0}
    news = news_of("rl", {"labels": labels, "stopped": None, "held_out_accuracy": [0.5], "steps": 1})
    assert news == {"labels": {"budget": 9.0, "spent": 4.0}, "rl": {"stopped": None, "held_out_accuracy": [0.5]}}


def test_no_bar_of_a_library_is_shown_while_a_model_loads(
    evaluate: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trlhf import models

    def as_in_a_fresh_process(*_: Path) -> None:  # where the library is loaded after the log is set up
        transformers_logging.enable_progress_bar()

    monkeypatch.setattr("trlhf.pipeline.setup_logging", as_in_a_fresh_process)
    load, shown = models.load_causal_lm, list[bool]()

    def noted(*arguments: Any) -> Any:
        shown.append(transformers_logging.is_progress_bar_enabled())
        return load(*arguments)

    monkeypatch.setattr(models, "load_causal_lm", noted)
    evaluate()
    assert shown == [False]


def test_one_model_at_a_time_is_evaluated(
    evaluate: Callable[..., dict[str, Any]], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trlhf import models

    load, loaded = models.load_causal_lm, list[weakref.ref[Any]]()

    def noted(*arguments: Any) -> Any:
        assert all(model() is None for model in loaded), "two models would lie in memory together"
        model = load(*arguments)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(models, "load_causal_lm", noted)
    complete(tmp_path / "run", "sft", tiny_model_dir)
    assert list(evaluate()["plans_by_kind"]) == ["base", "sft"] and len(loaded) == 2


def test_the_model_that_was_sampled_from_is_gone_when_the_reward_model_loads_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cycles would keep it, as those of adapters do: two whole models would not fit on one card."""
    from trlhf import roles

    load, loaded = roles.load_causal_lm, list[weakref.ref[Any]]()

    def noted(*arguments: Any, **named: Any) -> Any:
        assert all(model() is None for model in loaded), "two models would lie in memory together"
        model = load(*arguments, **named)
        model.__dict__["itself"] = [model]
        loaded.append(weakref.ref(model))
        return model

    sizes = ["data.sft_prompts=8", "sft.epochs=1", "data.pool_prompts=40", "reward.labels=4", "rl.max_new_tokens=8"]
    sizes += ["reward.samples_per_prompt=2", "hardware.device=cpu", "hardware.threads=1", f"run.dir={tmp_path / 'run'}"]
    trlhf.run(["stage=sft", *sizes])
    monkeypatch.setattr(roles, "load_causal_lm", noted)
    gc.disable()  # it might have come by itself
    try:
        trlhf.run(["stage=reward", *sizes])
    finally:
        gc.enable()
    assert len(loaded) == 2


# ---- time ----


def test_seconds_add_up_over_errors_and_kills(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)

    def spent() -> float:
        return float(run.summary()["seconds"]["rl"])

    with pytest.raises(ZeroDivisionError), run.clock("rl"):
        time.sleep(0.03)
        raise ZeroDivisionError
    first = spent()
    assert 0.03 <= first < 1 and run.interrupted("rl")
    now = time.time()

    def killed_100_s_after_it_began() -> None:
        (tmp_path / "rl" / "metrics.jsonl").write_text("{}\n")
        os.utime(tmp_path / "rl" / BEGUN, (now - 500, now - 500))
        os.utime(tmp_path / "rl" / "metrics.jsonl", (now - 400, now - 400))

    killed_100_s_after_it_began()
    with suppress(Killed), run.clock("rl"):
        killed_100_s_after_it_began()  # once more, before it came to add the first 100 s to the summary
        kept = {path: path.read_bytes() for path in (tmp_path / "rl" / BEGUN, tmp_path / "summary.json")}
        raise Killed
    for path, content in kept.items():
        path.write_bytes(content)
    killed_100_s_after_it_began()
    with run.clock("rl"):
        assert run.interrupted("rl")
    assert 199.9 <= spent() - first < 201 and not run.interrupted("rl")
    with run.clock("rl"):
        pass
    assert spent() - first < 201


# ---- prompts that leave no room ----


def numbered(text: str, number: int) -> Prompt:
    return Prompt(f"p{number}", ({"role": "user", "content": text},))


def test_prompts_that_leave_no_room_are_left_out_and_named(tiny_model_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_model_dir)
    prompts = [numbered("2 plus 3?" + " plus 4" * number, number) for number in (0, 5, 1, 9)]
    lengths = [len(encode_prompt(tokenizer, prompt.messages)) for prompt in prompts]
    config = Config(  # the second is as long as it may be
        model=ModelConfig(max_length=lengths[1] + 8),
        rl=RlConfig(max_new_tokens=8),
        evaluation=EvaluationConfig(max_new_tokens=8),
        labeler=LabelerConfig(name="exact"),
    )
    answers = {"p0": "5", "p5": "25", "p9": "41"}
    task = Task([], prompts, prompts, answers, _pool_answers=answers)
    fitted = fit_task(task, config, tokenizer, ["reward", "eval"])
    assert [prompt.id for prompt in fitted.pool] == ["p0", "p5"]
    assert [prompt.id for prompt in fitted.test] == ["p0", "p5", "p1"]
    assert [prompt.id for prompt in fitted.too_long] == ["p9"]
    assert [report.dropped for report in fitted.reports] == [
        {"no gold answer, which labeler=exact needs": ["p1"]},
        {f"with rl.max_new_tokens=8 more tokens they exceed model.max_length={lengths[1] + 8}": ["p9"]},
        {
            f"with evaluation.max_new_tokens=8 more tokens they exceed model.max_length={lengths[1] + 8}, "
            "so they count as wrong": ["p9"]
        },
    ]
    untouched = fit_task(task, config, tokenizer, ["sft"])
    assert (untouched.pool, untouched.test, untouched.reports) == (task.pool, task.test, [])


# ---- checkpoints ----


def test_a_checkpoint_that_a_kill_left_set_aside_is_found(tmp_path: Path) -> None:
    stage, model = RunDirectory(tmp_path).stage("rl"), torch.nn.Linear(2, 2)
    policy = Role(cast("Any", model))
    learner: Any = torch.nn.Linear(1, 1)
    checkpoint.save(stage, policy, learner, Progress(round=2, step=5), keep=2)
    folder = checkpoint.folder_of(stage, 5)
    folder.rename(folder.with_name(f".{folder.name}.old"))  # killed between two renames
    cast("Any", model).device = torch.device("cpu")
    assert checkpoint.load(stage, policy, learner) == Progress(round=2, step=5)


# ---- questions ----

POOL = [numbered(f"{number} plus 3?", number) for number in range(8)]
GOLD = {prompt.id: str(number + 3) for number, prompt in enumerate(POOL)}


NOBODY: Any = None  # plays no role: what is tested asks no model


def candidates(shift: int) -> list[Candidate]:
    """Every prompt with two samples; another ``shift`` gives other answers."""
    return [
        Candidate(prompt, tuple(Rollout(prompt.id, f"It is {n + shift}.", answer=str(n + shift)) for _ in range(2)))
        for n, prompt in enumerate(POOL)
    ]


AT_RANDOM = dict(acquisition="uniform", update="plain", label_prompts="pool", gate=False, round_share=0.0)


class Dies(ExactVerifier):
    def answer(self, questions: Sequence[Question]) -> list[str]:
        raise KeyboardInterrupt


def test_questions_are_chosen_once(tmp_path: Path) -> None:
    stage = RunDirectory(tmp_path).stage("rl")
    question = Question("preference", POOL[0], ("a", "b"), None, "why: 'ß'", 2, 1)
    assert settle_questions(stage, "q.jsonl", lambda: [question]) == [question]
    assert settle_questions(stage, "q.jsonl", lambda: []) == [question]


def test_a_killed_reward_stage_asks_the_same_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path
) -> None:
    config, stage = build_config({"reward": {"labels": 4}}), RunDirectory(tmp_path).stage("reward")
    with Ledger(tmp_path / "ledger.sqlite", 4) as ledger:
        monkeypatch.setattr(first_labels, "_candidates", lambda *_: candidates(3))
        with pytest.raises(KeyboardInterrupt):
            first_labels.buy_first_labels(config, stage, tiny_model_dir, POOL, ledger, Dies(GOLD))
        assert ledger.remaining == 0 and ledger.labels() == []
        monkeypatch.setattr(first_labels, "_candidates", lambda *_: candidates(4))  # sampling went another way
        archive, labels = first_labels.buy_first_labels(
            config, stage, tiny_model_dir, POOL, ledger, ExactVerifier(GOLD)
        )
        assert len(labels) == 4 and ledger.spent == 4 and {label.outcome for label in labels} == {"right"}
        rows, _ = archive.apply(labels)
        assert [row.right for row in rows] == [True] * 4  # the samples that the labels are about


def test_a_killed_round_asks_the_same_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targeting = AT_RANDOM | {"budget": 6}
    config = build_config({"targeting": targeting, "reward": {"labels": 1}, "rl": {"rounds": 2}})
    stage = RunDirectory(tmp_path).stage("rl")

    def attempt(shift: int, labeler: ExactVerifier, ledger: Ledger) -> None:
        refit: Any = None
        inputs = RlInputs(POOL, tmp_path, NOBODY, ledger, labeler, Archive(POOL), refit)
        trainer = Round(config, stage, inputs, refit, refit, Progress(round=2))
        monkeypatch.setattr(buy, "sample_candidates", lambda *_: candidates(shift))
        buy.buy_labels(trainer)

    with Ledger(tmp_path / "ledger.sqlite", 6) as ledger:
        with pytest.raises(KeyboardInterrupt):
            attempt(3, Dies(GOLD), ledger)
        attempt(4, ExactVerifier(GOLD), ledger)
        assert {label.outcome for label in ledger.labels()} == {"right"} and ledger.spent == 6
    decided = json.loads((stage.path / "round_02.json").read_text())
    assert decided["labels_bought"] == 6 and [q["answer"] for q in decided["questions"]] == [
        GOLD[q["prompt"]] for q in decided["questions"]
    ]


@pytest.mark.parametrize("stopped", [True, False])
def test_no_round_buys_after_one_in_which_a_rule_stopped_the_buying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    config = build_config({"targeting": AT_RANDOM | {"budget": 6}, "reward": {"labels": 1}, "rl": {"rounds": 2}})
    stage, nobody = RunDirectory(tmp_path).stage("rl"), cast("Any", None)
    stage.write_json("round_01.json", {"labels_stopped": "a label tells too little"} if stopped else {})
    monkeypatch.setattr(buy, "sample_candidates", lambda *_: candidates(3))
    with Ledger(tmp_path / "ledger.sqlite", 6) as ledger:
        inputs = RlInputs(POOL, tmp_path, NOBODY, ledger, ExactVerifier(GOLD), Archive(POOL), nobody)
        buy.buy_labels(Round(config, stage, inputs, nobody, nobody, Progress(round=2)))
        assert ledger.spent == (0 if stopped else 6)


def test_a_round_that_is_done_again_knows_no_later_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the checkpoints of the rounds after it cannot be read."""
    config = build_config(
        {
            "targeting": AT_RANDOM | {"budget": 8},
            "reward": {"labels": 1},
            "rl": {"rounds": 4},
        }
    )
    stage, refit = RunDirectory(tmp_path).stage("rl"), cast("Any", None)

    def play(ledger: Ledger, number: int) -> Progress:
        inputs = RlInputs(POOL, tmp_path, refit, ledger, ExactVerifier(GOLD), Archive(POOL), refit)
        trainer = Round(config, stage, inputs, refit, refit, Progress(round=number))
        monkeypatch.setattr(buy, "sample_candidates", lambda *_: candidates(3))
        buy.buy_labels(trainer)
        return trainer.state

    with Ledger(tmp_path / "ledger.sqlite", 8) as ledger:
        first = play(ledger, 2)
        decided = (stage.path / "round_02.json").read_text()
        play(ledger, 3)
        assert len(ledger.labels()) == 5 and play(ledger, 2) == first and len(first.pass_rates) == 2
    assert (stage.path / "round_02.json").read_text() == decided and '"budget_left": 6.0' in decided


def test_a_stage_made_again_buys_no_more_than_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = build_config(
        {
            "targeting": AT_RANDOM | {"budget": 4},
            "reward": {"labels": 1},
            "rl": {"rounds": 1},
        }
    )
    with Ledger(tmp_path / "ledger.sqlite", 4) as ledger:
        for shift, attempt in ((3, "first"), (5, "again")):  # the folder was deleted; sampling went another way
            stage, refit = RunDirectory(tmp_path / attempt).stage("rl"), cast("Any", None)
            inputs = RlInputs(POOL, tmp_path, NOBODY, ledger, ExactVerifier(GOLD), Archive(POOL), refit)
            trainer = Round(config, stage, inputs, refit, refit, Progress(round=1))
            monkeypatch.setattr(buy, "sample_candidates", lambda *_, shift=shift: candidates(shift))
            monkeypatch.setattr("trlhf.rl.buy.encode_prompt", lambda *_: [1])
            buy.buy_labels(trainer)
            assert ledger.spent == 4


def test_every_plain_prompt_of_the_pool_becomes_an_anchor_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [Prompt(f"plain {n}", ({"role": "user", "content": f"{n}?"},), reasoning=False) for n in range(5)]
    config = build_config({"targeting": {"budget": 4}, "reward": {"labels": 1}, "rl": {"rounds": 1}})
    refit: Any = None
    drawn: list[str] = []

    def sample(_policy: Any, _tokenizer: Any, prompts: list[Prompt], *_: Any) -> list[list[Rollout]]:
        drawn.extend(prompt.id for prompt in prompts)
        return [[Rollout(prompt.id, "Red.", token_ids=(7,), answer="Red")] for prompt in prompts]

    monkeypatch.setattr("trlhf.rl.candidates.sample_as", sample)
    monkeypatch.setattr("trlhf.rl.buy.encode_prompt", lambda *_: [1])
    with Ledger(tmp_path / "ledger.sqlite", 4) as ledger:
        gold = GOLD | {prompt.id: "red" for prompt in plain}
        inputs = RlInputs([*POOL, *plain], tmp_path, NOBODY, ledger, ExactVerifier(gold), Archive(POOL), refit)
        trainer = Round(config, RunDirectory(tmp_path).stage("rl"), inputs, Role(refit), refit, Progress())
        held = Candidate(plain[0], (Rollout(plain[0].id, "Blue.", token_ids=(8,), answer="Blue"),) * 2)
        monkeypatch.setattr(buy, "sample_candidates", lambda *_: [*candidates(3), held])
        buy.buy_labels(trainer)
    anchored = [anchor.prompt_id for anchor in trainer.state.anchors if anchor.prompt_id.startswith("plain")]
    assert sorted(anchored) == [prompt.id for prompt in plain] and plain[0].id not in drawn
