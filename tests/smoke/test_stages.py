"""Whole runs, very small: what they leave behind, what they ask, and that a killed one ends as if nothing had been."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from same_end import differences
from transformers import AutoModelForCausalLM, AutoTokenizer

import trlhf
from trlhf.__main__ import main
from trlhf.errors import UserError
from trlhf.labelers.simulated import SimulatedPerson
from trlhf.ledger import Ledger, question_key
from trlhf.rl import checkpoint
from trlhf.rl.checkpoint import Progress
from trlhf.run import STAGES, RunDirectory, StageDirectory
from trlhf.sft.templates import load_template
from trlhf.types import Label, Prompt, Question

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
ROOT = Path(trlhf.__file__).parents[1]
BUDGET = 20
RECIPE = ["experiment=cerebrum-7b", "model=micro", "evaluation.suites=[]"]
SIZES = [
    "data.sft_prompts=48",
    "data.pool_prompts=48",
    "data.test_prompts=12",
    "sft.epochs=1",
    "sft.batch_size=8",
    "sft.microbatch_size=8",
    "reward.labels=10",
    "reward.finetune=frozen",
    "reward.samples_per_prompt=4",
    "rl.rounds=1",
    "rl.steps_per_round=2",
    "rl.prompts_per_step=6",
    "rl.samples_per_prompt=4",
    "rl.minibatch_size=12",
    "rl.microbatch_size=12",
    "rl.value_warmup_steps=0",
    "rl.max_new_tokens=16",
    "rl.unverified_share=0.3",  # so that the refitted reward model matters
    "targeting.samples_per_prompt=4",
    "targeting.candidates=12",
    f"targeting.budget={BUDGET}",
    "evaluation.max_new_tokens=24",
    "labeler.noise=0.4",  # so small a policy is never right; a person who errs says so at times: rewards of both kinds
    "hardware.device=cpu",
    "hardware.threads=1",  # bit for bit
]
# Two rounds with a value model: every state that a continued run needs is in play, and steps lie between checkpoints.
LONGER = [
    *SIZES,
    "rl.rounds=2",
    "rl.save_steps=3",
    "rl.advantage=gae",
    "rl.value_warmup_steps=1",
]


def command(directory: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "trlhf", *overrides, f"run.dir={directory}"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def start(directory: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run the command line from a folder that is not the project's."""
    elsewhere = directory.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    done = subprocess.run(
        command(directory, *overrides), cwd=elsewhere, env=environment(), capture_output=True, text=True, check=False
    )
    assert list(elsewhere.iterdir()) == [], "a run left something outside its folder"
    return done


def run(directory: Path, *overrides: str) -> dict[str, Any]:
    """Run in this process."""
    return trlhf.run([*overrides, f"run.dir={directory}"]).summary


def labels_of(directory: Path) -> list[Label]:
    with Ledger(directory / "ledger.sqlite", BUDGET) as ledger:
        assert ledger.unanswered() == []
        return ledger.labels()


@pytest.fixture(scope="module")
def questions() -> Iterator[list[Question]]:
    """Whatever the simulated person is asked in `prepared` and `undisturbed`."""
    seen: list[Question] = []
    yield seen


@contextmanager
def noted(questions: list[Question]) -> Iterator[None]:
    answer = SimulatedPerson.answer

    def counted(self: SimulatedPerson, asked: Sequence[Question]) -> list[str]:
        questions.extend(asked)
        return answer(self, asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimulatedPerson, "answer", counted)
        yield


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, questions: list[Question]) -> Path:
    """The 7B recipe's run, with the embedded base; its sft and reward stages are complete."""
    directory = tmp_path_factory.mktemp("prepared") / "run"
    with noted(questions):
        for stage in ("sft", "reward"):
            run(directory, *RECIPE, *SIZES, f"stage={stage}")
    return directory


@pytest.fixture
def copied(prepared: Path, tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(prepared, tmp_path / name))

    return copy


@pytest.fixture(scope="module")
def undisturbed(prepared: Path, tmp_path_factory: pytest.TempPathFactory, questions: list[Question]) -> Path:
    """The longer run, which nobody killed."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    shutil.copytree(prepared, directory)
    with noted(questions):
        run(directory, *LONGER, "stage=rl")
    return directory


def check_contract(directory: Path, rows: dict[str, int]) -> dict[str, Any]:
    """Check what every run leaves behind; return its summary."""
    for stage in STAGES:
        folder = directory / stage
        names = {"config.yaml", "metrics.json", "samples.jsonl", "done"} | (
            {"metrics.jsonl"} if stage in rows else set()
        )
        assert names <= {path.name for path in folder.iterdir()}, stage
        assert json.loads((folder / "metrics.json").read_text())
        assert not [path for path in folder.iterdir() if path.name.startswith(".")], "temporary files are left"
    for stage, count in rows.items():
        steps = [json.loads(line)["step"] for line in (directory / stage / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, count + 1)), stage
    sample = json.loads((directory / "rl" / "samples.jsonl").read_text().splitlines()[0])
    assert {"prompt", "response", "reward"} <= sample.keys()
    summary: dict[str, Any] = json.loads((directory / "summary.json").read_text())
    assert {"accuracy", "labels", "seconds", "versions", "seed"} <= summary.keys()
    assert list(summary["accuracy"]) == ["base", "sft", "rl"]
    for entry in summary["accuracy"].values():
        assert 0 <= entry["low"] <= entry["value"] <= entry["high"] <= 1 and entry["n"] == 9
    assert summary["labels"]["budget"] == BUDGET and summary["labels"]["spent"] == len(labels_of(directory)) <= BUDGET
    assert set(summary["seconds"]) == set(STAGES) and min(summary["seconds"].values()) > 0
    assert summary["seed"] == 0 and {"trlhf", "torch", "transformers", "trl"} <= summary["versions"].keys()
    return summary


def check_model(folder: Path) -> None:
    """Check that plain transformers loads a folder and answers a chat at temperature 0."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, notes = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(notes[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), notes
    assert tokenizer.chat_template == load_template("cerebrum")
    greedy = model.generation_config
    assert not greedy.do_sample and greedy.eos_token_id == tokenizer.eos_token_id != greedy.pad_token_id
    chat = [{"role": "user", "content": "What is 2 plus 3?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answers = [model.generate(**ids, max_new_tokens=8) for _ in range(2)]
    assert torch.equal(*answers) and answers[0].shape[1] > ids["input_ids"].shape[1]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(directory / "rl" / "model" / "model.safetensors"))


def check_same_end(directory: Path, undisturbed: Path) -> None:
    """Check everything, bit for bit, against the run that nobody killed."""
    compared = differences(directory, undisturbed)
    assert {name: difference for name, difference in compared.items() if difference} == {}
    keys = [
        question_key(Question(x.kind, Prompt(x.prompt_id, ()), x.responses, x.answer, repeat=x.repeat))
        for x in labels_of(directory)
    ]
    assert len(set(keys)) == len(keys)


# ---- whole runs ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    directory = tmp_path_factory.mktemp("whole") / "run"
    return directory, start(directory, *SIZES)


def test_one_command_does_everything(whole: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    directory, done = whole
    assert done.returncode == 0, done.stderr
    check_contract(directory, {"sft": 6, "rl": 2})
    for stage in ("sft", "rl"):
        check_model(directory / stage / "model")
    assert not torch.equal(
        weights(directory)["model.norm.weight"],
        load_file(directory / "sft/model/model.safetensors")["model.norm.weight"],
    )
    shown = done.stdout + done.stderr
    assert "Accuracy at temperature 0, zero-shot, 9 held-out reasoning prompts" in shown
    assert f"of {BUDGET} spent" in shown


def test_the_same_command_again_does_nothing_again(whole: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    directory, _ = whole
    summary = json.loads((directory / "summary.json").read_text())

    def times() -> dict[str, int]:
        paths = [path for stage in STAGES for path in (directory / stage).rglob("*")]
        return {str(path): path.stat().st_mtime_ns for path in [*paths, directory / "ledger.sqlite"]}

    before = times()
    again = start(directory, *SIZES)
    assert again.returncode == 0, again.stderr
    shown = again.stdout + again.stderr
    assert [f"stage {stage} is complete already" in shown for stage in STAGES] == [True] * 4
    assert times() == before
    assert json.loads((directory / "summary.json").read_text()) == summary


def test_dpo_does_everything_too(copied: Callable[[str], Path]) -> None:
    """The first two stages are the same for both algorithms, and are taken over."""
    directory = copied("dpo")
    done = start(directory, *SIZES, "rl=dpo")
    assert done.returncode == 0, done.stderr
    check_contract(directory, {"sft": 6, "rl": 2})
    check_model(directory / "rl" / "model")
    assert "stage sft is complete already" in done.stdout + done.stderr
    rows = [json.loads(line) for line in (directory / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert all("pairs" in row for row in rows)


def test_a_missing_earlier_stage_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    monkeypatch.setattr(sys, "argv", ["trlhf", *SIZES, "stage=rl", f"run.dir={empty}"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert f"{empty}/sft/model is missing; make it first with: python -m trlhf stage=sft run.dir={empty}" in told
    assert not (empty / "ledger.sqlite").exists()


def test_a_missing_reward_stage_is_named_with_its_command(copied: Callable[[str], Path]) -> None:
    directory = copied("run")
    shutil.rmtree(directory / "reward")
    with pytest.raises(
        UserError, match=r"reward/reward\.json is missing; make it first with: python -m trlhf stage=reward"
    ):
        run(directory, *SIZES, "stage=rl")


# ---- labels ----


def test_every_answer_is_paid_and_written_down_once(undisturbed: Path, questions: list[Question]) -> None:
    """Nobody but the ledger asks: what the labeller was asked, before and in the rl stage, is what the ledger holds."""
    found = labels_of(undisturbed)
    assert Counter((q.kind, q.prompt.id, q.answer, q.responses) for q in questions) == Counter(
        (x.kind, x.prompt_id, x.answer, x.responses) for x in found
    )
    keys = [question_key(question) for question in questions]
    assert len(set(keys)) == len(keys) == len(found) <= BUDGET
    per_round = Counter(x.round for x in found)
    assert 0 < per_round[0] <= 10 and set(per_round) == {0, 1, 2}
    assert all(x.cost == 1.0 and x.why for x in found)
    assert {x.kind for x in found} == {"verdict", "preference"} and {"right", "wrong"} <= {x.outcome for x in found}


# ---- kills ----


class Killed(BaseException):
    """What SIGKILL is to a process: nothing catches it, nothing is tidied up."""


def killed_in_the_middle_of(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the run die at a place of its second round."""

    def after_questions_are_paid(self: SimulatedPerson, asked: Sequence[Question]) -> list[str]:
        if asked[0].round == 2:
            raise Killed
        return answer(self, asked)

    def after_labels_are_bought(stage: StageDirectory, policy: Any, learner: Any, state: Progress, keep: int) -> None:
        if state.round == 2:
            raise Killed
        save(stage, policy, learner, state, keep)

    def before_the_model_is_saved(*_: Any) -> None:
        raise Killed

    answer, save = SimulatedPerson.answer, checkpoint.save
    if place == "labeller":
        monkeypatch.setattr(SimulatedPerson, "answer", after_questions_are_paid)
    elif place == "ledger":
        monkeypatch.setattr(checkpoint, "save", after_labels_are_bought)
    else:
        monkeypatch.setattr("trlhf.rl.train.save_model", before_the_model_is_saved)


def test_wherever_it_dies_the_same_command_ends_the_same(
    copied: Callable[[str], Path], undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copied("run")
    for place in ("labeller", "ledger", "model"):  # each death leaves what the next start goes on from
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_in_the_middle_of(place, patch)
            run(directory, *LONGER, "stage=rl")
        assert not RunDirectory(directory).stage("rl").done
    run(directory, *LONGER, "stage=rl")
    assert RunDirectory(directory).stage("rl").done
    check_same_end(directory, undisturbed)


# ---- other models ----


def test_the_7b_recipe_runs_with_the_embedded_base(copied: Callable[[str], Path]) -> None:
    directory = copied("run")
    run(directory, *RECIPE, *SIZES)
    check_contract(directory, {"sft": 6, "rl": 2})
    config = yaml.safe_load((directory / "config.yaml").read_text())
    assert config["experiment"] == "cerebrum-7b" and config["model"]["name"] == "micro"
    assert not config["model"]["lora"]["enabled"]  # adapters belong to model=mistral-7b
    assert not (directory / "sft" / "adapter").exists()


@pytest.mark.parametrize(
    ("quantization", "dtype", "finetune"),
    [("none", "float32", "lora"), ("nf4", "float32", "lora"), ("nf4", "bfloat16", "frozen")],
)
def test_adapters_all_the_way(
    tmp_path: Path, quantization: str, dtype: str, finetune: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Four roles on one base, which is quantised or not: policy, reference, reward model and value."""
    lora = ["model.lora.enabled=true", "model.lora.r=4", "model.lora.alpha=8", f"model.quantization={quantization}"]
    lora += [f"model.dtype={dtype}", f"reward.finetune={finetune}"]
    run(tmp_path / "run", *SIZES, *lora, "reward.epochs=1", "rl.advantage=gae")
    check_contract(tmp_path / "run", {"sft": 6, "rl": 2})
    for stage in ("sft", "reward") if finetune == "lora" else ("sft",):
        assert (tmp_path / "run" / stage / "adapter" / "adapter_model.safetensors").exists()
    for stage in ("sft", "rl"):
        check_model(tmp_path / "run" / stage / "model")
    base = load_file(tmp_path / "run" / "sft" / "model" / "model.safetensors")
    changed = {name for name, tensor in weights(tmp_path / "run").items() if not torch.equal(tensor, base[name])}
    assert changed and all(name.endswith("_proj.weight") for name in changed)  # embeddings and norms have no adapters
    if quantization == "none":  # peft alone puts the adapter over the base as it is, not over its 4 bits
        check_exports(tmp_path / "run", caplog)


# ---- as people use it ----


def answers_of(generator: Any, directory: Path) -> tuple[list[str], list[str]]:
    """Return what a pipeline answers to the held-out prompts, and what the evaluation noted."""
    noted = [json.loads(line) for line in (directory / "eval" / "samples_rl.jsonl").read_text().splitlines()]
    chats = [[{"role": "user", "content": row["prompt"]}] for row in noted]
    found = [generator(chat, max_new_tokens=24, return_full_text=False)[0]["generated_text"] for chat in chats]
    return [text.strip() for text in found], [row["response"] for row in noted]


def check_exports(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check that plain transformers, and peft where there is an adapter, answer as the evaluation says they do."""
    from huggingface_hub import ModelCard
    from peft import AutoPeftModelForCausalLM
    from transformers import GenerationConfig, pipeline

    models: dict[str, Any] = {"model": str(directory / "rl" / "model")}
    if (adapter := directory / "rl" / "adapter").exists():
        models["adapter"] = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype="float32")
        models["adapter"].generation_config = GenerationConfig.from_pretrained(adapter)
    for name, model in models.items():
        tokenizer = AutoTokenizer.from_pretrained(directory / "rl" / name)
        caplog.clear()
        logger = logging.getLogger("transformers")  # which a run in this process has kept to itself
        logger.addHandler(caplog.handler)
        found, noted = answers_of(pipeline("text-generation", model=model, tokenizer=tokenizer), directory)
        logger.removeHandler(caplog.handler)
        assert found == noted and len(set(noted)) > 1, name
        assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == [], name
        assert ModelCard.load(directory / "rl" / name / "README.md").data.eval_results, name


def test_the_saved_model_answers_as_it_was_evaluated(
    whole: tuple[Path, subprocess.CompletedProcess[str]], caplog: pytest.LogCaptureFixture
) -> None:
    assert not (whole[0] / "rl" / "adapter").exists()  # every weight was trained
    check_exports(whole[0], caplog)
