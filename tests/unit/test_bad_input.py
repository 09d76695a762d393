"""Bad input through the command line: exit status 2, one clear message, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import trlhf
from trlhf.__main__ import main
from trlhf.errors import UserError
from trlhf.labelers.exact import ExactVerifier
from trlhf.ledger import Ledger
from trlhf.rl import checkpoint
from trlhf.run import RunDirectory
from trlhf.sft import train as sft_train
from trlhf.types import Prompt, Question

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
CHAT = {"messages": [{"role": "user", "content": "2 plus 3?"}, {"role": "assistant", "content": "Plan: add. It is 5."}]}
SUM = {"question": "2 plus 3?", "answer": "5"}
LONG = {"question": "plus 1 " * 300, "answer": "301"}
Rows = Sequence[object]
Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Put back what a run in this process sets."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def given(tmp_path: Path, tiny_model_dir: Path) -> Callable[..., list[str]]:
    """Write data files, and return the overrides that read them with the tiny model into ``tmp_path/run``."""

    def write(name: str, rows: Rows | str) -> str:
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    def overrides(
        stage: str = "all",
        *more: str,
        chats: Rows | str = (CHAT,) * 4,
        pool: Rows | str = (SUM,),
        test: Rows | str = (SUM,),
    ) -> list[str]:
        files = {"sft": chats, "pool": pool, "test": test}
        return [
            f"stage={stage}",
            "data=file",
            *(f"data.{name}={write(f'{name}.jsonl', rows)}" for name, rows in files.items()),
            f"model.name={tiny_model_dir}",
            "model.max_length=320",
            "template.system=Sums.",
            *("sft.epochs=1", "sft.batch_size=1", "sft.microbatch_size=1", "sft.save_steps=1"),
            *("rl.max_new_tokens=4", "evaluation.max_new_tokens=4"),
            *("hardware.device=cpu", "hardware.threads=1", f"run.dir={tmp_path / 'run'}"),
            *more,
        ]

    return overrides


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Run the command line, expect exit status 2, and return what it said in its one message."""

    def call(overrides: Sequence[str]) -> str:
        monkeypatch.setattr(sys, "argv", ["trlhf", *overrides])
        with pytest.raises(SystemExit) as stopped:
            main()
        told = capsys.readouterr().err
        assert stopped.value.code == 2, told
        assert told.startswith("trlhf: ") and told.count("trlhf: ") == 1 and "Traceback" not in told
        return told.removeprefix("trlhf: ").strip()

    return call


def stages_done(run_dir: Path) -> list[str]:
    return sorted(path.parent.name for path in run_dir.glob("*/done"))


@pytest.fixture
def prepared(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A run whose sft stage is complete, with one paid label in its ledger."""
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(tiny_model_dir, run.stage("sft").path / "model")
    run.stage("sft").complete({})
    with Ledger(run.ledger, 250) as ledger:
        ledger.ask([Question("verdict", Prompt("x", ()), ("5",), "5")], ExactVerifier({"x": "5"}))
    return run.path


def assert_nothing_lost(run_dir: Path) -> None:
    with Ledger(run_dir / "ledger.sqlite", 250) as ledger:
        assert [label.outcome for label in ledger.labels()] == ["right"] and ledger.spent == 1
    assert RunDirectory(run_dir).stage("sft").done and (run_dir / "sft" / "model" / "model.safetensors").exists()


# ---- files ----

BROKEN = json.dumps(CHAT) + "\n"
DATA = [
    ("sft", {"chats": ""}, r"sft\.jsonl: the file is empty; at least one row is needed"),
    ("reward", {"pool": ""}, r"pool\.jsonl: the file is empty"),
    ("sft", {"chats": BROKEN * 6 + '{"messages": \n' + BROKEN}, r"sft\.jsonl line 7: not valid JSON \(.*column \d+\)"),
    (
        "sft",
        {"chats": [{"text": "hello"}]},
        r"sft\.jsonl line 1: missing 'messages' \(or another known shape\); found 'text'\. "
        r"None of the 1 rows .* give each row 'messages'",
    ),
    ("sft", {"chats": [{"question": "2 plus 3?"}]}, r"sft\.jsonl line 1: no response to learn from"),
    (
        "eval",
        {"test": [SUM, {"question": "3 plus 3?"}]},
        r"test\.jsonl line 2: no answer, so the response to it could not be marked; give it a column 'answer'",
    ),
]


@pytest.mark.parametrize(("stage", "files", "message"), DATA)
def test_a_file_that_cannot_be_used(
    stage: str, files: dict[str, Any], message: str, given: Callable[..., list[str]], refused: Refused, tmp_path: Path
) -> None:
    told = refused(given(stage, **files))
    assert re.search(message, told), told
    assert stages_done(tmp_path / "run") == []


def test_a_data_set_of_a_mixture_without_the_needed_columns(
    given: Callable[..., list[str]], refused: Refused, tmp_path: Path
) -> None:
    """One good data set does not hide that another is of no use."""
    (tmp_path / "good.jsonl").write_text(json.dumps(CHAT) + "\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt_text": "2 plus 3?", "reply": "5"}\n' * 3)
    mixture = [f"data.mixture.{name}.path={tmp_path / name}.jsonl" for name in ("good", "bad")]
    told = refused([text for text in given("sft", *mixture) if not text.startswith("data.sft=")])
    assert told.startswith(
        "bad.jsonl line 1: missing 'messages' (or another known shape); found 'prompt_text', 'reply'."
    )
    assert "None of the 3 rows of" in told and "give each row 'messages'" in told
    assert stages_done(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{% for message in messages %}{{ message['content'] }}", "Unexpected end of template"),
        ("{{ messages[7]['content'] }}", "has no element 7"),
        ("{{ raise_exception('no chat is good enough') }}", "no chat is good enough"),
    ],
)
def test_a_template_that_cannot_be_rendered(
    given: Callable[..., list[str]], refused: Refused, tmp_path: Path, text: str, reason: str
) -> None:
    (tmp_path / "own.jinja").write_text(text)
    overrides = [text for text in given("sft") if not text.startswith("template.")]
    told = refused([*overrides, f"template={tmp_path / 'own.jinja'}"])
    assert told.startswith(f"template.name='{tmp_path}/own.jinja': the template cannot be rendered (")
    assert reason in told and told.endswith("; mend it")
    assert stages_done(tmp_path / "run") == []


def test_a_pool_without_answers_cannot_be_judged(
    given: Callable[..., list[str]], refused: Refused, prepared: Path
) -> None:
    told = refused(given("rl", pool=[{"question": "2 plus 3?"}] * 2))
    assert told == (
        "data.pool: none of the 2 prompts has a gold answer, which labeler=exact needs to judge a response; "
        "give the rows a column 'answer'"
    )
    assert_nothing_lost(prepared)


# ---- configuration ----


def test_problems_of_the_configuration_start_nothing(
    given: Callable[..., list[str]], refused: Refused, tmp_path: Path
) -> None:
    told = refused(given("all", "targeting.budget=0", "rl.betta=1"))
    assert "configuration: 2 problems, nothing was started" in told
    assert "targeting.budget=0 must be at least 1: without labels nothing can be learned; give the number of" in told
    assert "rl.betta=1: there is no such key (a leading + does not make one); did you mean rl.beta?" in told
    assert not (tmp_path / "run").exists()


# ---- tokens ----


def test_pad_that_is_eos(
    given: Callable[..., list[str]], refused: Refused, tiny_model_dir: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": settings["eos_token"]}))
    for stage in ("all", "sft"):
        told = refused(given(stage, f"model.name={base}"))
        assert told.startswith(f"tokenizer {base}: its pad token is its EOS token ('</s>'), so masking the padding")
    assert stages_done(tmp_path / "run") == []


def test_labels_that_are_all_masked(
    given: Callable[..., list[str]], refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encode = sft_train.encode_demonstrations

    def masked(*arguments: Any) -> Any:
        rows, report = encode(*arguments)
        return [type(row)(row.input_ids, (0,) * len(row.input_ids), row.source) for row in rows], report

    monkeypatch.setattr(sft_train, "encode_demonstrations", masked)
    told = refused(given("sft", chats=[CHAT]))
    assert told == (
        "sft: sft.jsonl:1: every label is masked, so there is nothing to learn from; give each row a response"
    )
    assert stages_done(tmp_path / "run") == []


TOO_LONG = [
    (
        "sft",
        {"chats": [{**LONG, "answer": "It is 301."}]},
        "sft: all 1 demonstrations are longer than model.max_length=320",
    ),
    ("all", {"pool": [LONG]}, "data.pool: all 1 prompts are too long: the shortest has "),
    ("all", {"test": [LONG, LONG]}, "data.test: all 2 prompts are too long: the shortest has "),
]


@pytest.mark.parametrize(("stage", "files", "message"), TOO_LONG)
def test_prompts_longer_than_the_context(
    stage: str, files: dict[str, Any], message: str, given: Callable[..., list[str]], refused: Refused, tmp_path: Path
) -> None:
    told = refused(given(stage, **files))
    assert told.startswith(message) and "raise model.max_length" in told
    assert not (tmp_path / "run" / "sft" / "model").exists()  # told before anything was trained


def test_one_test_prompt_longer_than_the_context_counts_as_wrong(
    given: Callable[..., list[str]], tmp_path: Path
) -> None:
    summary = trlhf.run(given("eval", test=[SUM, LONG, SUM])).summary
    assert summary["accuracy"]["base"]["n"] == 3
    folder = tmp_path / "run" / "eval"
    assert json.loads((folder / "metrics.json").read_text())["too_long"] == 1
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    (row,) = (row for row in rows if row["prompt_id"] == "test.jsonl:2")
    assert (row["response"], row["finished"], row["correct"], row["gold"]) == ("", False, False, "301")
    log = (tmp_path / "run" / "trlhf.log").read_text()
    assert (
        "left out 1: with evaluation.max_new_tokens=4 more tokens they exceed model.max_length=320, "
        "so they count as wrong (test.jsonl:2)"
    ) in log


# ---- what earlier stages left ----


def test_a_missing_earlier_stage(given: Callable[..., list[str]], refused: Refused, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for stage in ("reward", "rl"):
        told = refused(given(stage))
        assert told.startswith(
            f"{run_dir}/sft/model is missing; make it first with: python -m trlhf stage=sft run.dir={run_dir} "
        )
    assert not (run_dir / "ledger.sqlite").exists()


def test_an_unreadable_model(given: Callable[..., list[str]], refused: Refused, prepared: Path) -> None:
    (prepared / "sft" / "model" / "model.safetensors").write_bytes(b"not a model")
    told = refused(given("eval"))
    assert told.startswith(f"model {prepared}/sft/model: cannot be read (")
    assert told.endswith("if an earlier stage wrote it, delete that stage's folder and run the stage again")
    assert_nothing_lost(prepared)


def test_an_unreadable_rl_checkpoint(given: Callable[..., list[str]], refused: Refused, prepared: Path) -> None:
    RunDirectory(prepared).stage("reward").write_json("reward.json", {})
    RunDirectory(prepared).stage("reward").write_jsonl("split.jsonl", [])
    RunDirectory(prepared).stage("reward").complete({})
    state = checkpoint.folder_of(RunDirectory(prepared).stage("rl"), 4) / checkpoint.STATE
    state.parent.mkdir(parents=True)
    state.write_bytes(b"not a checkpoint")
    told = refused(given("rl"))
    assert told.startswith(f"{state}: this checkpoint cannot be read (")
    assert told.endswith(
        f"delete the folder {prepared}/rl/checkpoints to start the rl stage again (labels already bought are kept)"
    )
    assert_nothing_lost(prepared)


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the sft stage end with an error behind a checkpoint."""
    seal = sft_train.StageCallback.on_save

    def sealed(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        seal(self, args, state, control, **more)
        if state.global_step == step:
            raise UserError("stopped here")

    monkeypatch.setattr(sft_train.StageCallback, "on_save", sealed)


def test_an_unreadable_sft_checkpoint(
    given: Callable[..., list[str]], refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One that was cut short is passed over for the one before; one whose bytes are wrong is named."""
    folder = tmp_path / "run" / "sft" / "checkpoints"
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert refused(given("sft")) == "stopped here"
    torn = folder / "checkpoint-2" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:100])
    whole = folder / "checkpoint-1" / "model.safetensors"
    bytes_before = whole.read_bytes()
    whole.write_bytes(b"\xff" * len(bytes_before))
    told = refused(given("sft"))
    assert told.startswith(f"{folder / 'checkpoint-1'}: this checkpoint cannot be read (")
    assert told.endswith(f"delete the folder {folder / 'checkpoint-1'} and run the same command again")
    assert not torn.exists() and whole.exists()
    whole.write_bytes(bytes_before)
    trlhf.run(given("sft"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/sft/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4] and stages_done(tmp_path / "run") == ["sft"]


# ---- the disk ----


def test_a_disk_that_fills_up(
    given: Callable[..., list[str]], refused: Refused, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is full when the first samples are written; with space again the same command ends well."""
    sync = os.fsync

    def full(descriptor: int) -> None:
        if "samples" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        told = refused(given("eval"))
    assert told == (
        f"{prepared}/eval/samples_base.jsonl: cannot be written: the disk is full (or its quota is); "
        "free some space and run the same command again, which continues"
    )
    assert_nothing_lost(prepared)
    assert stages_done(prepared) == ["sft"]
    summary = trlhf.run(given("eval")).summary
    assert list(summary["accuracy"]) == ["base", "sft"] and stages_done(prepared) == ["eval", "sft"]
    assert_nothing_lost(prepared)


def test_a_disk_that_is_full_from_the_start(
    given: Callable[..., list[str]], refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert refused(given()).startswith(f"{tmp_path}/run/sft/config.yaml: cannot be written: the disk is full")
