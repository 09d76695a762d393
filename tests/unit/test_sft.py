"""Stage 1: what the loss covers, that it learns, packs without leaks, goes on after a kill, and refuses bad input."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.sft_trainer import SFTTrainer

from trlhf import files
from trlhf.config import Config, build_config
from trlhf.errors import UserError
from trlhf.models import encode_prompt, load_tokenizer
from trlhf.preemption import Preempted, watch
from trlhf.run import RunDirectory, StageDirectory
from trlhf.sft.checkpoints import newest_whole, seal
from trlhf.sft.encode import IGNORED, EncodedDemonstration, check_encoded, encode_demonstrations
from trlhf.sft.train import _dataset, train_sft
from trlhf.types import Demonstration, Prompt

# peft asks transformers by a name that transformers has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _demonstration(question: str, answer: str, source: str = "sft.jsonl:1") -> Demonstration:
    return Demonstration(
        ({"role": "user", "content": question}, {"role": "assistant", "content": answer}), source=source
    )


def _sums(count: int) -> list[Demonstration]:
    return [
        _demonstration(f"{i} plus {i + 1}?", f"Plan: add. {i} + {i + 1} = {2 * i + 1}.", f"sft.jsonl:{i + 1}")
        for i in range(count)
    ]


def _config(base: Path, **groups: Any) -> Config:
    sft = {"epochs": 2.0, "batch_size": 4, "microbatch_size": 2, "save_steps": 2, **groups.pop("sft", {})}
    model_values = {"name": str(base), "max_length": 320, **groups.pop("model", {})}
    template = {"system": "Sums.", **groups.pop("template", {})}
    return build_config(
        {"model": model_values, "sft": sft, "template": template, "hardware": {"device": "cpu"}, "seed": 1, **groups}
    )


def _stage(path: Path) -> StageDirectory:
    return RunDirectory(path).stage("sft")


def _weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "sft" / "model" / "model.safetensors")


def _distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


def test_the_loss_covers_the_response_and_its_eos_and_nothing_else(tiny_model_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_model_dir)
    (row,), _ = encode_demonstrations(tokenizer, [_demonstration("2 plus 3?", "Plan: add. 5.")], 320)
    counted = [token for token in row.labels if token != IGNORED]
    assert tokenizer.decode(counted) == " Plan: add. 5.</s>"
    assert counted[-1] == tokenizer.eos_token_id
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "2 plus 3?"}])
    assert list(row.input_ids[: len(prompt)]) == prompt and row.labels[: len(prompt)] == [IGNORED] * len(prompt)


def test_the_trainers_loss_is_the_mean_over_response_tokens(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = _config(tiny_model_dir, sft={"epochs": 1.0, "warmup_ratio": 0.0})
    demonstrations = [*_sums(3), _demonstration("Say ten words?", "a b c d e f g h i j", "sft.jsonl:4")]
    train_sft(demonstrations, config, _stage(tmp_path))
    logged = json.loads((tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()[0])["loss"]

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sft" / "model")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    rows, _ = encode_demonstrations(tokenizer, demonstrations, 320)
    total, count = 0.0, 0
    for row in rows:  # one by one, from the definition: no padding, no microbatches
        with torch.no_grad():
            logprobs = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        for position, counts in enumerate(row.completion_mask):
            if counts:
                total -= float(logprobs[position - 1, row.input_ids[position]])
                count += 1
    assert logged == pytest.approx(total / count, abs=1e-5)


def test_packing_changes_no_token_of_the_loss(tiny_model_dir: Path, tmp_path: Path) -> None:
    losses = {}
    for packing in (False, True):
        sft = {"packing": packing, "batch_size": 8, "microbatch_size": 8, "warmup_ratio": 0.0}
        config = _config(tiny_model_dir, sft=sft, model={"max_length": 170})
        metrics = train_sft(_sums(8), config, _stage(tmp_path / str(packing)))
        lines = (tmp_path / str(packing) / "sft" / "metrics.jsonl").read_text().splitlines()
        losses[packing] = [json.loads(line)["loss"] for line in lines]
        assert metrics["sequences"] == (2 if packing else 8)
        assert metrics["steps"] == 2
    assert losses[True] == pytest.approx(losses[False], abs=1e-5)


def test_packed_neighbours_are_invisible(tiny_model_dir: Path) -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from trlhf.sft.train import _dataset

    config = _config(tiny_model_dir, sft={"packing": True}, model={"max_length": 1024})
    rows, _ = encode_demonstrations(load_tokenizer(tiny_model_dir), _sums(3), 1024)
    packed = _dataset(rows, config)
    assert len(packed) == 1 and len(packed[0]["seq_lengths"]) == 3
    batch = DataCollatorForLanguageModeling(pad_token_id=3, padding_free=True)([packed[0]])
    for attention in ("sdpa", "eager"):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, attn_implementation=attention).eval()
        with torch.no_grad():
            # as the trainer calls it: with a cache, transformers does not look for packed rows
            together = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
            start = 0
            for length in packed[0]["seq_lengths"]:
                alone = model(batch["input_ids"][:, start : start + length]).logits[0]
                assert torch.allclose(together[start : start + length], alone, atol=1e-5), attention
                start += length


def test_it_learns_a_small_batch_by_heart_and_stops(tiny_model_dir: Path, tmp_path: Path) -> None:
    from trlhf.rollout import Sampling, sample_responses

    demonstrations = _sums(4)
    sft = {"epochs": 150.0, "learning_rate": 1e-2, "microbatch_size": 4, "save_steps": 1000, "warmup_ratio": 0.1}
    metrics = train_sft(demonstrations, _config(tiny_model_dir, sft=sft), _stage(tmp_path))
    assert metrics["loss"] < 0.05 and metrics["token_accuracy"] > 0.99
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sft" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sft" / "model")
    prompts = [Prompt(demonstration.source, demonstration.messages[:1]) for demonstration in demonstrations]
    rollouts = sample_responses(
        model, tokenizer, prompts, Sampling(temperature=0.0, max_new_tokens=40), torch.Generator()
    )
    for demonstration, (rollout,) in zip(demonstrations, rollouts, strict=True):
        assert rollout.text == demonstration.messages[-1]["content"]
        assert rollout.finished, "EOS was learned"


def test_what_it_leaves_behind_is_a_model_that_plain_transformers_uses(tiny_model_dir: Path, tmp_path: Path) -> None:
    stage = _stage(tmp_path)
    metrics = train_sft(_sums(4), _config(tiny_model_dir, model={"dtype": "bfloat16"}), stage)
    assert stage.done and json.loads((stage.path / "metrics.json").read_text()) == metrics
    assert not (stage.path / "checkpoints").exists()
    assert {weight.dtype for weight in _weights(tmp_path).values()} == {torch.bfloat16}
    tokenizer = AutoTokenizer.from_pretrained(stage.path / "model")
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "<s>Sums.\nUser: Hi\nAI:"
    generation = json.loads((stage.path / "model" / "generation_config.json").read_text())
    assert generation["do_sample"] is False
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (2, 3)
    first = json.loads((stage.path / "samples.jsonl").read_text().splitlines()[0])
    assert first["text"] == "<s>Sums.\nUser: 0 plus 1?\nAI: Plan: add. 0 + 1 = 1.</s>"
    assert not list(stage.path.rglob("*.bin")), "safetensors only"


def test_lora_leaves_an_adapter_and_the_merged_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    lora = {"enabled": True, "r": 4, "target_modules": ["q_proj", "v_proj"]}
    config = _config(tiny_model_dir, model={"lora": lora}, sft={"learning_rate": 5e-2}, reward={"finetune": "lora"})
    train_sft(_sums(8), config, _stage(tmp_path))
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokens = torch.tensor([[1, 40, 41, 42]])
    untouched = base(tokens).logits
    adapted = PeftModel.from_pretrained(base, tmp_path / "sft" / "adapter")(tokens).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "sft" / "model")(tokens).logits
    assert torch.allclose(adapted, merged, atol=1e-4)
    assert not torch.allclose(untouched, merged, atol=1e-2)


@pytest.mark.parametrize("packing", [False, True])
def test_a_killed_run_goes_on_to_the_same_weights(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    config = _config(tiny_model_dir, sft={"packing": packing, "learning_rate": 1e-2})
    train_sft(_sums(12), config, _stage(tmp_path / "whole"))

    log = StageDirectory.log

    def killed(self: StageDirectory, step: int, **metrics: Any) -> None:
        log(self, step, **metrics)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StageDirectory, "log", killed)
        train_sft(_sums(12), config, _stage(tmp_path / "cut"))
    checkpoints = tmp_path / "cut" / "sft" / "checkpoints"
    assert [path.name for path in checkpoints.glob("checkpoint-*")] == ["checkpoint-2"]
    (checkpoints / "checkpoint-3").mkdir()
    (checkpoints / "checkpoint-3" / "model.safetensors").write_bytes(b"half")
    train_sft(_sums(12), config, _stage(tmp_path / "cut"))

    assert _distance(_weights(tmp_path / "whole"), _weights(tmp_path / "cut")) == 0.0
    assert _distance(_weights(tmp_path / "whole"), load_file(tiny_model_dir / "model.safetensors")) > 1e-3
    assert _lines(tmp_path / "whole") == _lines(tmp_path / "cut")


def _lines(directory: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without how long each step took."""
    lines = (directory / "sft" / "metrics.jsonl").read_text().splitlines()
    times = ("seconds", "tokens_per_second")
    return [{key: value for key, value in json.loads(line).items() if key not in times} for line in lines]


@pytest.mark.parametrize(("epochs", "steps"), [(2.0, 4), (1.5, 3)])
def test_a_run_killed_after_its_last_step_only_saves(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: float, steps: int
) -> None:
    """Also where the last epoch is a part of one: the trainer would begin it again, and take a step too many."""
    config = _config(tiny_model_dir, sft={"epochs": epochs, "microbatch_size": 1, "batch_size": 2})
    demonstrations = _sums(3)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StageDirectory, "complete", killed)
        train_sft(demonstrations, config, _stage(tmp_path))
    before = _weights(tmp_path)
    metrics = train_sft(demonstrations, config, _stage(tmp_path))
    assert _distance(before, _weights(tmp_path)) == 0.0
    assert metrics["steps"] == steps and metrics["loss"] is not None
    log = (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(1, steps + 1))


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x" * step)
        if step < 10:
            seal(folder)
    assert newest_whole(tmp_path) == (tmp_path / "checkpoint-4", 4)
    assert not (tmp_path / "checkpoint-10").exists()
    (tmp_path / "checkpoint-4" / "model.safetensors").write_bytes(b"x")
    assert newest_whole(tmp_path) == (tmp_path / "checkpoint-2", 2)
    assert newest_whole(tmp_path / "nothing") is None


def test_an_older_checkpoint_that_was_half_deleted_goes_too(tmp_path: Path) -> None:
    """The trainer's rotation goes by time: the deletion made it young, so a whole one would be deleted in its place."""
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("model.safetensors", "optimizer.pt"):
            (folder / name).write_bytes(b"x")
        seal(folder)
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    assert newest_whole(tmp_path) == (tmp_path / "checkpoint-4", 4)
    assert not (tmp_path / "checkpoint-2").exists()


def test_as_many_checkpoints_are_kept_as_asked_for(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StageDirectory, "tidy", lambda _: None)
    for limit in (2, 3):
        config = _config(tiny_model_dir, sft={"save_steps": 1, "save_total_limit": limit})
        train_sft(_sums(8), config, _stage(tmp_path / str(limit)))
        found = (tmp_path / str(limit) / "sft" / "checkpoints").glob("checkpoint-*")
        assert {path.name for path in found} == {f"checkpoint-{step}" for step in range(5 - limit, 5)}


def test_sigterm_ends_the_step_saves_it_and_the_run_goes_on_to_the_same_weights(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tiny_model_dir, sft={"save_steps": 2, "learning_rate": 1e-2})
    train_sft(_sums(12), config, _stage(tmp_path / "whole"))
    backward = SFTTrainer.training_step
    passes: list[int] = []

    def told_to_stop(self: Any, *arguments: Any, **more: Any) -> Any:
        passes.append(1)
        if len(passes) == 5:  # the first of two passes of step 3, which is none of those that are saved anyway
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(self, *arguments, **more)

    with monkeypatch.context() as patch, pytest.raises(Preempted, match="at step 3 of the sft stage"), watch():
        patch.setattr(SFTTrainer, "training_step", told_to_stop)
        train_sft(_sums(12), config, _stage(tmp_path / "cut"))
    assert newest_whole(tmp_path / "cut" / "sft" / "checkpoints") == (
        tmp_path / "cut" / "sft" / "checkpoints" / "checkpoint-3",
        3,
    )
    assert not (tmp_path / "cut" / "sft" / "model").exists()
    train_sft(_sums(12), config, _stage(tmp_path / "cut"))
    assert _distance(_weights(tmp_path / "whole"), _weights(tmp_path / "cut")) == 0.0
    assert _lines(tmp_path / "whole") == _lines(tmp_path / "cut")
    final = [(tmp_path / name / "sft" / "metrics.json").read_text() for name in ("whole", "cut")]
    assert final[0] == final[1]


def test_long_demonstrations_are_left_out_and_counted(tiny_model_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_model_dir)
    good, long = _demonstration("1?", "1.", "a:1"), _demonstration("1?", "7 " * 200, "a:2")
    endless = _demonstration("7 " * 200, "1.", "a:3")
    rows, report = encode_demonstrations(tokenizer, [good, long, endless], 320)
    assert [row.source for row in rows] == ["a:1"]
    assert report.dropped == {
        "longer than model.max_length=320 tokens": ["a:2"],
        "its prompt alone fills model.max_length=320 tokens": ["a:3"],
    }


def test_bad_input_is_refused_before_training(tiny_model_dir: Path, tmp_path: Path) -> None:
    stage = _stage(tmp_path)
    with pytest.raises(UserError, match="no demonstrations"):
        train_sft([], _config(tiny_model_dir), stage)
    with pytest.raises(UserError, match=r"all 2 demonstrations are longer than model\.max_length=16.*shortest has"):
        short = {"rl": {"max_new_tokens": 8}, "evaluation": {"max_new_tokens": 8}}
        train_sft(_sums(2), _config(tiny_model_dir, model={"max_length": 16}, **short), stage)
    with pytest.raises(UserError, match=r"sft\.jsonl:9: EOS stands inside the response"):
        train_sft([*_sums(2), _demonstration("a", "b </s> c", "sft.jsonl:9")], _config(tiny_model_dir), stage)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"tokenizer .*empty: cannot be loaded"):
        train_sft(_sums(2), _config(tmp_path / "empty"), stage)
    assert not (stage.path / "model").exists() and not stage.done


def test_masked_and_endless_rows_are_named() -> None:
    good = EncodedDemonstration((1, 5, 2), (0, 1, 1), "a:1")
    assert (list(good.input_ids), good.labels) == ([1, 5, 2], [-100, 5, 2])
    masked = [EncodedDemonstration((1, 5, 2), (0, 0, 0), f"a:{line}") for line in range(2, 9)]
    endless = EncodedDemonstration((1, 5, 2), (0, 1, 0), "a:9")
    check_encoded([good], eos_token_id=2)
    with pytest.raises(UserError, match=r"a:2, a:3, a:4, a:5, a:6 and 2 more: every label is masked"):
        check_encoded([good, *masked], eos_token_id=2)
    with pytest.raises(UserError, match=r"a:9: EOS is not the loss's last token"):
        check_encoded([good, endless], eos_token_id=2)


def test_a_tokenizer_that_pads_with_eos_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="pad token is its EOS token"):
        train_sft(_sums(2), _config(tmp_path / "model"), _stage(tmp_path))


def test_a_loss_that_is_no_number_stops_the_run(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"the loss is nan at step 1; try a smaller sft\.learning_rate"):
        train_sft(_sums(4), _config(tmp_path / "model"), _stage(tmp_path))


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file data/0")]
)
def test_a_full_disk_is_named(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("trl.trainer.sft_trainer.SFTTrainer._save_checkpoint", full)
    with pytest.raises(UserError, match=files.FULL[:16]):
        train_sft(_sums(4), _config(tiny_model_dir), _stage(tmp_path))


def test_more_demonstrations_than_promised_are_remarked(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr("trlhf.sft.train._log.warning", lambda text, *values: warned.append(text % values))
    train_sft(_sums(3), _config(tiny_model_dir, sft={"max_prompts": 2}), _stage(tmp_path))
    assert warned == [
        "sft: 3 demonstrations are more than sft.max_prompts=2; a few thousand good ones are meant to be enough"
    ]


def test_tokens_take_thirteen_bytes_each() -> None:
    """Five as a demonstration, eight in the trainer's table; lists of Python integers took about fifty."""
    rows = [EncodedDemonstration([7] * 5000 + [2], [0] * 5000 + [1]) for _ in range(20)]
    held = sum(sys.getsizeof(row.input_ids) + sys.getsizeof(row.completion_mask) for row in rows)
    table = _dataset(rows, build_config({})).data.nbytes
    assert (held + table) / (20 * 5001) < 13.2
