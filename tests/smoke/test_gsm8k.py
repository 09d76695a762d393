"""Real text: all stages on a small cut of GSM8K, with a model that is right so seldom that no verdict says so."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import trlhf
from trlhf.compose import compose
from trlhf.config import Config
from trlhf.labelers.exact import ExactVerifier
from trlhf.types import Question

ROOT = Path(trlhf.__file__).parents[1]
GSM8K = Path(os.environ.get("TRLHF_SHARED_DATA", ROOT.parent / "shared" / "data")) / "gsm8k"
needs_gsm8k = pytest.mark.skipif(not GSM8K.is_dir(), reason=f"no real GSM8K at {GSM8K} (set TRLHF_SHARED_DATA)")
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


def one(*overrides: str) -> Config:
    (config,) = compose(overrides).configs
    return config


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "gsm8k"
    folder.mkdir()
    for name, count in FILES.items():
        lines = (GSM8K / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:count]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(cut: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every stage in which no verdict found a right answer."""
    directory = tmp_path_factory.mktemp("gsm8k") / "run"

    def wrong(self: ExactVerifier, questions: Sequence[Question]) -> list[str]:
        return ["wrong"] * len(questions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExactVerifier, "answer", wrong)
        trlhf.run(["model=micro", "data=gsm8k", f"data.path={cut}", *SIZES, f"run.dir={directory}"])
    return directory


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@needs_gsm8k
def test_all_stages_end_and_say_what_came_of_them(finished: Path) -> None:
    summary = read(finished / "summary.json")
    assert set(summary["seconds"]) == {"sft", "reward", "rl", "eval"}
    assert [summary["accuracy"][name]["n"] for name in ("base", "sft", "rl")] == [8, 8, 8]
    assert list(summary["by_kind"]["rl"]) == ["gsm8k"]
    assert 0 <= summary["labels"]["spent"] <= summary["labels"]["budget"] == 8
    assert summary["demonstrations"] == 16


@needs_gsm8k
def test_the_reward_model_learns_from_the_labels_that_come_with_the_data(finished: Path) -> None:
    metrics = read(finished / "reward" / "metrics.json")
    train, held_out = metrics["labels"]["train"], metrics["labels"]["held_out"]
    assert train["verdicts"] + held_out["verdicts"] == 40 and held_out["prompts"] == 4  # four models' solutions of each
    assert 0 <= metrics["held_out"]["verdicts"]["auc"] <= 1
    assert metrics["held_out"]["verdicts"]["accuracy"]["n"] == held_out["verdicts"] == 16
    log = (finished / "trlhf.log").read_text(encoding="utf-8")
    assert "labels that come with the data: 40 of 48 rows used" in log
    assert "40 labels come with the data, so this stage buys none" in log
    assert "held-out verdicts: AUC " in log


@needs_gsm8k
def test_without_a_right_verdict_the_reward_model_decides_and_the_log_says_so(finished: Path) -> None:
    assert read(finished / "rl" / "round_01.json")["verifiable_prompts"] == 0
    log = (finished / "trlhf.log").read_text(encoding="utf-8")
    assert "round 1: no right answer is known yet, so it learns on unverified prompts alone" in log
    rows = [json.loads(line) for line in (finished / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    samples = [json.loads(line) for line in (finished / "rl" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 * 4 and len({row["prompt_id"] for row in samples}) == 4  # a whole step of them
    assert all(row["reward"] < 1 for row in samples)


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
