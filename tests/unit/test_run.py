"""The run directory: whole files or none, one writer, and continuing what was begun."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml

from trlhf import files
from trlhf.admission import open_run
from trlhf.config import Config, build_config, plain
from trlhf.errors import UserError
from trlhf.fingerprint import differences, fingerprint
from trlhf.run import RunDirectory


def config(run_dir: Path | str | None = None, **values: object) -> Config:
    return build_config({"run": {"dir": None if run_dir is None else str(run_dir)}, **values})


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        yield


def leftovers(path: Path) -> list[str]:
    return sorted(item.name for item in path.iterdir())


def test_completion_marker_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = RunDirectory(tmp_path).stage("sft")
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target).name == "metrics.json":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        stage.complete({"loss": 1.0})
    assert not stage.done
    stage.complete({"loss": np.float32(0.5), "bad": float("nan"), "where": tmp_path})
    assert stage.done
    assert stage.metrics() == {"loss": 0.5, "bad": None, "where": str(tmp_path)}


def test_full_disk_keeps_the_old_file_and_leaves_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_json(tmp_path / "a.json", {"a": 1})
    with full_disk(monkeypatch), pytest.raises(UserError) as caught:
        files.write_json(tmp_path / "a.json", {"a": 2})
    assert str(caught.value) == (
        f"{tmp_path / 'a.json'}: cannot be written: the disk is full (or its quota is); "
        "free some space and run the same command again, which continues"
    )
    assert files.read_json(tmp_path / "a.json") == {"a": 1}
    assert leftovers(tmp_path) == ["a.json"]


def test_full_disk_while_an_artifact_is_written(tmp_path: Path) -> None:
    stage = RunDirectory(tmp_path).stage("sft")
    with stage.new_directory("model") as folder:
        (folder / "weights").write_text("old")
    hidden = RuntimeError(
        'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left" })'
    )
    for error in (OSError(errno.ENOSPC, "No space left on device"), hidden):
        message = r"sft/model: cannot be written: the disk is full"
        with pytest.raises(UserError, match=message), stage.new_directory("model") as folder:
            (folder / "weights").write_text("new")
            raise error
    assert (stage.path / "model" / "weights").read_text() == "old"
    assert leftovers(stage.path) == ["model"]


def test_an_error_of_the_block_itself_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), files.new_directory(tmp_path / "model"):
        Path("/no/such/file").read_text()
    assert leftovers(tmp_path) == []


def test_new_directory_replaces_the_old_one_whole(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with files.new_directory(tmp_path / "model") as folder:
            assert leftovers(folder) == []
            (folder / content).write_text(content)
    assert leftovers(tmp_path / "model") == ["second"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    stage = RunDirectory(tmp_path).stage("rl")
    aside = stage.path / ".model.old"
    aside.mkdir(parents=True)
    (aside / "weights").write_text("old")
    stage.complete({})
    assert (stage.require("model", made_by="stage=rl") / "weights").read_text() == "old"


def test_missing_artifact_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        RunDirectory(tmp_path / "r").stage("sft").require("model", made_by="stage=sft")
    assert str(caught.value) == (
        f"{tmp_path}/r/sft/model is missing; make it first with: python -m trlhf stage=sft run.dir={tmp_path}/r "
        "(and your other overrides), or set run.dir to a run that has it"
    )


def test_an_artifact_of_a_stage_that_did_not_end_well_is_refused(tmp_path: Path) -> None:
    """The reward stage saves its model before it compares what it loads again."""
    stage = RunDirectory(tmp_path / "r").stage("reward")
    stage.write_json("reward.json", {})
    with pytest.raises(UserError) as caught:
        stage.require("reward.json", made_by="stage=reward")
    assert str(caught.value) == (
        f"{tmp_path}/r/reward is not complete, so reward.json in it cannot be trusted; finish it first with: "
        f"python -m trlhf stage=reward run.dir={tmp_path}/r (and your other overrides)"
    )
    stage.complete({})
    assert stage.require("reward.json", made_by="stage=reward") == stage.path / "reward.json"


def test_what_killed_processes_were_writing_is_swept_up_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "rl" / "model").mkdir(parents=True)
    for name in (".summary.json.7.tmp", "rl/.metrics.json.7.tmp", "rl/model/config.json", "rl/x.tmp"):
        (tmp_path / name).write_text("{")
    first, second = RunDirectory(tmp_path), RunDirectory(tmp_path)
    first.lock()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        *(".lock", "rl/model/config.json", "rl/x.tmp"),
    ]
    being_written = tmp_path / ".summary.json.8.tmp"
    being_written.write_text("{")
    with pytest.raises(UserError):
        second.lock()
    assert being_written.exists(), "a living process was disturbed"
    first.close()


def test_metrics_log_rewinds_to_a_checkpoint(tmp_path: Path) -> None:
    stage = RunDirectory(tmp_path).stage("rl")
    for step in range(1, 6):
        stage.log(step, loss=1 / step)
    with (stage.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed here
    stage.rewind(3)
    stage.log(4, loss=0.0)
    rows = [json.loads(line) for line in (stage.path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.0)]


def test_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("{}\n{\n{}\n")
    with pytest.raises(UserError, match=r"x\.jsonl:2: not JSON"):
        files.read_jsonl(path)


def test_summary_merges_group_by_group(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.update_summary({"accuracy": {"base": {"value": 0.1}}, "seed": 0})
    run.update_summary({"accuracy": {"sft": {"value": np.float64(0.5)}}, "labels": {"spent": np.int64(3)}})
    assert run.update_summary({"labels": {"spent": 4}}) == {
        "accuracy": {"base": {"value": 0.1}, "sft": {"value": 0.5}},
        "seed": 0,
        "labels": {"spent": 4},
    }
    assert RunDirectory(tmp_path).summary()["labels"] == {"spent": 4}


def test_stage_names_are_known() -> None:
    with pytest.raises(ValueError, match="none of check, sft, reward, rl, eval"):
        RunDirectory("x").stage("train")


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    code = (
        "import sys; from trlhf.run import RunDirectory\n"
        "run = RunDirectory(sys.argv[1]); run.lock(); print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=rf"another process \(pid {other.pid}\) is writing this run; wait for it"):
            open_run(config(tmp_path))
        other.kill()
        other.wait()
    open_run(config(tmp_path)).close()  # the lock died with its holder


def test_lock_ends_with_the_block(tmp_path: Path) -> None:
    with open_run(config(tmp_path)), pytest.raises(UserError, match="another process"):
        open_run(config(tmp_path))
    open_run(config(tmp_path)).close()


def test_resolved_config_is_written_for_the_planned_stages(tmp_path: Path) -> None:
    with open_run(config(tmp_path, stage="reward", seed=3)):
        assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 3
        assert (tmp_path / "reward" / "config.yaml").exists() and not (tmp_path / "sft").exists()


def test_dated_folder_and_continuing(tmp_path: Path) -> None:
    first = open_run(config(), tmp_path)
    assert first.path.parent == tmp_path and not first.continued
    other = open_run(config(), tmp_path)  # the first is alive
    assert other.path != first.path
    other.close()
    first.close()
    for name in ("sft", "reward", "rl"):
        RunDirectory(other.path).stage(name).complete({})
    again = open_run(config(), tmp_path)
    assert again.path == other.path and again.continued  # the newest unfinished
    again.stage("eval").complete({})
    again.close()
    with pytest.raises(KeyboardInterrupt), RunDirectory(other.path).clock("eval"):  # its results not in the summary yet
        raise KeyboardInterrupt
    with open_run(config(), tmp_path) as interrupted:
        assert interrupted.path == other.path
    with RunDirectory(other.path).clock("eval"):
        pass
    with open_run(config(), tmp_path) as older, open_run(config(seed=1), tmp_path) as different:
        assert older.path == first.path
        assert different.path not in (first.path, other.path) and not different.continued


def test_a_dated_folder_goes_with_a_mistake_before_any_work(tmp_path: Path) -> None:
    def fail(error: Exception, work: bool, where: Path | None = None) -> Path:
        root = tmp_path / f"{type(error).__name__}-{work}"
        with pytest.raises(type(error)), open_run(config(where), root) as run:
            if work:
                files.write_bytes(run.path / "sft" / "begun", b"0.0")
            raise error
        return run.path

    mistake = UserError("data.sft=chats.jsonl does not exist")
    assert not fail(mistake, work=False).exists()
    assert fail(mistake, work=False, where=tmp_path / "mine").exists()  # somebody named it
    assert fail(mistake, work=True).exists()
    assert fail(ValueError("a bug"), work=False).exists()  # its log is wanted


def test_another_stage_is_another_run_unless_named(tmp_path: Path) -> None:
    with open_run(config(stage="sft"), tmp_path) as first, open_run(config(stage="reward"), tmp_path) as second:
        assert first.path != second.path


def test_fingerprint_ignores_only_the_folder_and_dry_run() -> None:
    assert fingerprint(config()) == fingerprint(config("x", dry_run=True))
    assert len({fingerprint(config(**{"seed": seed})) for seed in range(3)}) == 3


def test_stages_one_after_the_other_in_one_folder(tmp_path: Path) -> None:
    for name in ("sft", "reward", "rl", "eval"):
        with open_run(config(tmp_path, stage=name)) as run:
            run.stage(name).complete({})
    with open_run(config(tmp_path)) as run:
        assert all(run.stage(name).done for name in ("sft", "reward", "rl", "eval"))


def test_changed_values_of_a_complete_stage_are_refused(tmp_path: Path) -> None:
    with open_run(config(tmp_path, stage="sft")) as run:
        run.stage("sft").complete({})
    with pytest.raises(UserError) as caught:
        open_run(config(tmp_path, stage="reward", sft={"epochs": 9.0}, seed=2))
    assert str(caught.value) == (
        f"run.dir={tmp_path} holds results of other values:\n"
        "  - stage sft (complete): seed was 0, now 2\n"
        f"  - stage sft (complete): sft.epochs was {Config().sft.epochs}, now 9.0\n"
        "give the old values, or another run.dir for the new ones; or delete the folders of these stages, which are "
        "then made again (labels are kept)"
    )
    open_run(config(tmp_path, stage="sft")).close()  # the refusal gave the lock back and changed nothing


def made(tmp_path: Path, *names: str, **values: object) -> None:
    """Complete some stages with these values."""
    for name in names:
        with open_run(config(tmp_path, stage=name, **values)) as run:
            run.stage(name).complete({})


ALLOWED: list[tuple[str, str, dict[str, object]]] = [
    ("sft", "rl", {"rl": {"beta": 0.3}}),
    ("sft", "rl", {"reward": {"labels": 10}}),
    ("sft", "rl", {"hardware": {"device": "cpu", "threads": 2}}),
    ("sft", "rl", {"dry_run": True}),
    ("sft", "rl", {"targeting": {"budget": 99}}),
    ("sft", "rl", {"evaluation": {"batch_size": 3}}),
    ("sft", "rl", {"data": {"pool_prompts": 100, "test_prompts": 9}}),
    ("reward", "rl", {"rl": {"algorithm": "dpo"}, "targeting": {"acquisition": "uniform"}}),
    ("rl", "rl", {"rl": {"microbatch_size": 32, "save_steps": 1}}),  # another machine
    ("rl", "rl", {"evaluation": {"batch_size": 3}}),
    ("rl", "eval", {"rl": {"algorithm": "dpo"}, "targeting": {"acquisition": "uniform"}, "sft": {"epochs": 9.0}}),
    ("rl", "eval", {"seed": 3, "reward": {"labels": 10}, "evaluation": {"confidence": 0.9}}),
    ("rl", "eval", {"model": {"lora": {"enabled": True}}, "data": {"test_prompts": 9}}),
    ("eval", "rl", {"evaluation": {"confidence": 0.9}}),
]
REFUSED: list[tuple[str, str, dict[str, object], str]] = [
    ("sft", "rl", {"sft": {"epochs": 9.0}}, r"stage sft \(complete\): sft\.epochs was"),
    ("sft", "reward", {"template": {"name": "chatml"}}, r"stage sft \(complete\): template\.name was 'cerebrum'"),
    ("sft", "eval", {"template": {"name": "chatml"}}, r"stage sft \(complete\): template\.name was 'cerebrum'"),
    ("sft", "eval", {"model": {"name": "me/model"}}, r"stage sft \(complete\): model\.name was 'micro'"),
    ("reward", "rl", {"rl": {"temperature": 0.5}}, r"stage reward \(complete\): rl\.temperature was 1\.0, now 0\.5"),
    ("reward", "rl", {"rl": {"max_new_tokens": 9}}, r"stage reward \(complete\): rl\.max_new_tokens"),
    ("reward", "rl", {"rl": {"rollout_batch_size": 9}}, r"stage reward \(complete\): rl\.rollout_batch_size was 128"),
    ("rl", "rl", {"rl": {"rollout_batch_size": 9}}, r"stage rl \(complete\): rl\.rollout_batch_size was 128"),
    (
        "reward",
        "all",
        {"targeting": {"preference_share": 0.9}},
        r"stage reward \(complete\): targeting\.preference_share",
    ),
    ("rl", "reward", {"reward": {"labels": 9}}, r"stage rl \(complete\): reward\.labels was"),
    ("rl", "all", {"targeting": {"budget": 99}}, r"stage rl \(complete\): targeting\.budget was"),
    ("eval", "eval", {"data": {"test_prompts": 9}}, r"stage eval \(complete\): data\.test_prompts was"),
]


def test_a_key_that_an_old_run_did_not_know_has_its_default() -> None:
    now = plain(Config())
    old = {**now, "model": {key: value for key, value in now["model"].items() if key != "quantization"}}
    assert differences("rl", ["rl"], old, now) == []
    changed = {**now, "model": {**now["model"], "quantization": "nf4"}}
    assert differences("rl", ["rl"], old, changed) == ["model.quantization was 'none', now 'nf4'"]


@pytest.mark.parametrize(("stage", "running", "values"), ALLOWED)
def test_values_that_a_result_does_not_rest_on_may_change(
    tmp_path: Path, stage: str, running: str, values: dict[str, object]
) -> None:
    made(tmp_path, stage)
    open_run(config(tmp_path, stage=running, **values)).close()


@pytest.mark.parametrize(("stage", "running", "values", "message"), REFUSED)
def test_values_that_a_result_rests_on_may_not_change(
    tmp_path: Path, stage: str, running: str, values: dict[str, object], message: str
) -> None:
    made(tmp_path, stage)
    with pytest.raises(UserError, match=message):
        open_run(config(tmp_path, stage=running, **values))


def test_gsm8k_is_split_by_one_draw(tmp_path: Path) -> None:
    """Another number of test questions would evaluate on some that the reward model has learned from."""
    data = {"name": "gsm8k", "path": "openai/gsm8k", "test_prompts": 100}
    rest: dict[str, object] = {"labeler": {"name": "exact"}, "targeting": {"preference_share": 0.0}}
    made(tmp_path, "reward", data=data, **rest)
    for running in ("rl", "eval"):
        with pytest.raises(UserError, match=r"stage reward \(complete\): data\.test_prompts was 100, now 50"):
            open_run(config(tmp_path, stage=running, data={**data, "test_prompts": 50}, **rest))


def test_a_begun_stage_with_a_checkpoint_is_kept_and_one_without_is_forgotten(tmp_path: Path) -> None:
    with open_run(config(tmp_path, stage="sft")) as run:
        run.stage("sft").log(1, loss=1.0)
    with open_run(config(tmp_path, stage="sft", seed=1)) as run:
        assert leftovers(run.stage("sft").path) == ["config.yaml"]
        with run.stage("sft").new_directory("checkpoint-1") as folder:
            (folder / "x").write_text("x")
    with pytest.raises(UserError, match=r"stage sft \(begun\): seed was 1, now 2"):
        open_run(config(tmp_path, stage="sft", seed=2))


def test_unwritable_folder_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        open_run(config(tmp_path / "file" / "run"))
