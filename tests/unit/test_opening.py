"""The models that can be evaluated: folders, adapters, GGUF files; with or without a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trlhf
from trlhf.config import Config, build_config
from trlhf.errors import UserError
from trlhf.files import write_jsonl
from trlhf.models import load_causal_lm, load_tokenizer
from trlhf.opening import Candidate, open_model, open_tokenizer

TEXT = "User: what is 2 plus 3? AI:"
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def config_for(path: Path, **more: Any) -> Config:
    return build_config({"stage": "eval", "evaluation": {"model": str(path)}, "hardware": {"device": "cpu"}, **more})


def opened(path: Path) -> tuple[Any, Any]:
    config, candidate = config_for(path), Candidate("model", str(path), "")
    return open_model(candidate, config), open_tokenizer(candidate, config)


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**tokenizer(TEXT, return_tensors="pt")).logits
    return found


# ---- adapters ----


@pytest.fixture
def adapted(tiny_model_dir: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A folder with an adapter that changes the tiny model, and one with the two merged by hand."""
    from peft import LoraConfig, get_peft_model

    base = load_causal_lm(tiny_model_dir, Config().model)
    base.config._name_or_path = base.name_or_path = str(tiny_model_dir)
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    merged = load_causal_lm(tiny_model_dir, Config().model)
    state = merged.state_dict()
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            delta = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # alpha / r
            state[name.removeprefix("base_model.model.") + ".weight"] += delta.detach()
    merged.save_pretrained(tmp_path / "merged")
    load_tokenizer(tiny_model_dir).save_pretrained(tmp_path / "merged")
    return tmp_path / "adapter", tmp_path / "merged"


def test_an_adapter_is_its_base_with_the_change_merged_in(adapted: tuple[Path, Path], tiny_model_dir: Path) -> None:
    adapter, merged = adapted
    model, tokenizer = opened(adapter)
    assert not any("lora" in name for name, _ in model.named_modules()) and not model.training
    expected, plain = logits(*opened(merged)), logits(*opened(tiny_model_dir))
    assert torch.allclose(logits(model, tokenizer), expected, atol=1e-5)
    assert (expected - plain).abs().max() > 0.1
    assert tokenizer.chat_template == load_tokenizer(tiny_model_dir).chat_template  # the base's, which it has not


def test_an_adapter_that_cannot_be_put_on(adapted: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, _ = adapted
    values = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**values, "base_model_name_or_path": None}))
    with pytest.raises(UserError, match=r"cannot be put on .*; is that its base"):
        opened(adapter)  # the configured base, which has other sizes
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"there is no adapter_model\.safetensors"):
        opened(adapter)


# ---- GGUF ----


def write_gguf(folder: Path, path: Path) -> None:
    """Write a saved model as one GGUF file, in 32-bit floats, as llama.cpp names and orders things."""
    import gguf

    model, tokenizer = load_causal_lm(folder, Config().model), load_tokenizer(folder)
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = set(tokenizer.all_special_tokens)
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token, _ in vocabulary]
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for name in ("bos", "eos", "unk", "pad"):
        getattr(writer, f"add_{name}_token_id")(getattr(tokenizer, f"{name}_token_id"))
    writer.add_chat_template(tokenizer.chat_template)
    plain = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, weight in model.state_dict().items():
        array = weight.numpy().astype(np.float32)
        if name in plain:
            writer.add_tensor(plain[name], array)
            continue
        _, _, layer, part = name.removesuffix(".weight").split(".", 3)
        if part in ("self_attn.q_proj", "self_attn.k_proj"):  # llama.cpp rotates neighbours, transformers halves
            count = heads if part == "self_attn.q_proj" else kv_heads
            rows, columns = array.shape
            array = array.reshape(count, 2, rows // count // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        writer.add_tensor(f"blk.{layer}.{parts[part]}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_the_model_that_was_written(tiny_model_dir: Path, tmp_path: Path) -> None:
    write_gguf(tiny_model_dir, tmp_path / "tiny.gguf")
    model, tokenizer = opened(tmp_path / "tiny.gguf")
    own, own_tokenizer = opened(tiny_model_dir)
    assert tokenizer(TEXT)["input_ids"] == own_tokenizer(TEXT)["input_ids"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (own_tokenizer.eos_token_id, own_tokenizer.pad_token_id)
    assert torch.allclose(logits(model, tokenizer), logits(own, own_tokenizer), atol=1e-5)
    assert model.dtype == torch.float32 and isinstance(tokenizer.chat_template, str)


# ---- one model without a run, and suites beside a run ----


@pytest.fixture
def evaluate(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(3)]
    write_jsonl(tmp_path / "mine.jsonl", [*rows, {"question": "Which?", "options": ["(A)x", "(B)y"], "label": "A"}])

    def call(*more: str) -> dict[str, Any]:
        overrides = [
            *("stage=eval", "evaluation=file", f"evaluation.file={tmp_path / 'mine.jsonl'}", "hardware.threads=1"),
            *(
                f"run.dir={tmp_path / 'run'}",
                "data.test_prompts=4",
                "evaluation.max_new_tokens=4",
                "hardware.device=cpu",
            ),
        ]
        return trlhf.run([*overrides, *more]).summary

    return call


def test_any_path_is_evaluated_without_a_run(
    evaluate: Callable[..., dict[str, Any]], adapted: tuple[Path, Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    write_gguf(tiny_model_dir, tmp_path / "tiny.gguf")
    for number, path in enumerate((*adapted, tmp_path / "tiny.gguf")):
        summary = evaluate(f"evaluation.model={path}", f"run.dir={tmp_path / str(number)}")
        assert "accuracy" not in summary, "of other models' questions nothing was asked"
        assert summary["suites"]["file"]["file"]["model"]["n"] == 4
    samples = (tmp_path / "0/eval/suites/model/file/file.jsonl").read_text().splitlines()
    assert json.loads(samples[3])["gold"] == "A" and len(samples) == 4


def test_a_models_own_template_that_cannot_be_rendered_is_told(
    evaluate: Callable[..., dict[str, Any]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ messages | nosuch }}")
    with pytest.raises(UserError, match=r"the model's own chat template cannot be rendered \(No filter .*; mend it"):
        evaluate(f"evaluation.model={model}")


def test_without_a_suite_a_model_answers_the_held_out_prompts(
    evaluate: Callable[..., dict[str, Any]], tiny_model_dir: Path
) -> None:
    summary = evaluate(f"evaluation.model={tiny_model_dir}", "evaluation.suites=[]", "evaluation.file=null")
    assert list(summary["accuracy"]) == ["model"] and "suites" not in summary


def test_suites_join_a_run_and_no_task_is_done_twice(
    evaluate: Callable[..., dict[str, Any]], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trlhf.evaluation import reasoning
    from trlhf.run import RunDirectory

    asked: list[int] = []
    answer = reasoning.answer_questions

    def counted(*arguments: Any) -> Any:
        asked.append(1)
        return answer(*arguments)

    monkeypatch.setattr(reasoning, "answer_questions", counted)
    base = f"model.name={tiny_model_dir}"
    assert list(evaluate(base, "evaluation.suites=[]", "evaluation.file=null")["accuracy"]) == ["base"] and not asked
    summary = evaluate(base)  # the same run, with a suite now
    assert list(summary["suites"]["file"]["file"]) == ["base"] and len(asked) == 1
    assert evaluate(base) == summary and len(asked) == 1
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(tiny_model_dir, run.stage("sft").path / "model")
    run.stage("sft").complete({})
    summary = evaluate(base)  # a model that was made since: only it is asked
    assert list(summary["suites"]["file"]["file"]) == ["base", "sft"] and len(asked) == 2
    assert summary["suites"]["file"]["file"]["base"] == summary["suites"]["file"]["file"]["sft"]
    assert list(summary["accuracy"]) == ["base", "sft"]
    assert "base: file of file is done already" in (run.path / "trlhf.log").read_text()
    with pytest.raises(UserError, match=r"evaluation\.limit was 0, now 2"):
        evaluate(base, "evaluation.limit=2")
