"""The models that the eval stage looks at: the run's own, or one from anywhere (folder, adapter, GGUF file, hub)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trlhf import files, models
from trlhf.config import Config
from trlhf.embeddings import make_room
from trlhf.errors import UserError
from trlhf.models import choose_device, first_line, load_tokenizer, model_path
from trlhf.roles import Role
from trlhf.run import RunDirectory
from trlhf.sft.templates import apply_template, base_tokenizer

ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate.

    Attributes:
        name: ``base``, ``sft``, ``rl``; ``model`` for one from elsewhere.
        path: folder, file or hub name.
        made: what tells it from another one of that name.
    """

    name: str
    path: str
    made: str


def candidates(config: Config, run: RunDirectory) -> list[Candidate]:
    """Return ``evaluation.model`` alone, or else the base and every stage's model that exists.

    Raises:
        UserError: no stage has made a model.
    """
    if config.evaluation.model is not None:
        path = Path(config.evaluation.model).expanduser()
        return [Candidate("model", str(path) if path.exists() else config.evaluation.model, _dated(path))]
    base = Candidate("base", model_path(config.model.name), f"{config.model.name} {config.model.revision}")
    stages = [(name, run.stage(name)) for name in ("sft", "rl") if run.stage(name).done]
    if not stages and config.stage == "all":
        raise UserError(f"{run.path}: there is no model to evaluate; run stage=sft first")
    return [base, *(Candidate(name, str(stage.path / "model"), str(stage.made)) for name, stage in stages)]


def open_tokenizer(candidate: Candidate, config: Config) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, with a chat template: its own, and for the base the configured one.

    A model from elsewhere that has no template of its own gets the configured one, and an adapter without a tokenizer
    that of its base.
    """
    if candidate.name in ("sft", "rl"):
        return load_tokenizer(candidate.path)
    if candidate.name == "base":
        return base_tokenizer(config)
    path, pad = Path(candidate.path), config.model.pad_token
    source = candidate.path
    if (path / ADAPTER).is_file() and not (path / "tokenizer_config.json").is_file():
        source = _base_of(path, config)
    tokenizer = load_tokenizer(source, pad_token=pad)
    if not isinstance(tokenizer.chat_template, str):
        return apply_template(tokenizer, config.template)
    try:
        models.encode_prompt(tokenizer, [{"role": "user", "content": "What is 2 + 3?"}])
    except Exception as error:  # a template is a program, with errors of its own
        raise UserError(
            f"evaluation.model={candidate.path}: the model's own chat template cannot be rendered "
            f"({first_line(error)}); mend it, or take it out of the folder, so that template=NAME serves"
        ) from error
    return tokenizer


def open_model(candidate: Candidate, config: Config) -> PreTrainedModel:
    """Load a model for evaluation; an adapter is merged into its base, unless the base is quantised.

    Raises:
        UserError: there is no readable model, or an adapter without safetensors.
    """
    path, device = Path(candidate.path), choose_device(config)
    if not (path / ADAPTER).is_file():
        return models.load_causal_lm(candidate.path, config.model, device)
    from peft import PeftModel

    if not (path / "adapter_model.safetensors").is_file():
        raise UserError(f"adapter {path}: there is no adapter_model.safetensors in it; save it with safetensors")
    quantized = config.model.quantization != "none"
    base = models.load_causal_lm(_base_of(path, config), config.model, device, quantized=quantized)
    try:
        adapted: Any = PeftModel.from_pretrained(base, str(path), torch_device=device)
    except Exception as error:  # peft, safetensors and json each raise kinds of their own
        raise UserError(
            f"adapter {path}: cannot be put on {_base_of(path, config)} ({first_line(error)}); is that its base? "
            "base_model_name_or_path in its adapter_config.json says which"
        ) from error
    model: PreTrainedModel = adapted.get_base_model() if quantized else adapted.merge_and_unload()
    model.eval()
    return model


def open_role(candidate: Candidate, config: Config, tokenizer: PreTrainedTokenizerBase) -> Role:
    """Load a model for evaluation, with room for every token of its tokenizer."""
    model = open_model(candidate, config)
    make_room(model, tokenizer)
    return Role(model)


def _base_of(path: Path, config: Config) -> str:
    """Return the base that an adapter names, or else the configured one."""
    named = files.read_json(path / ADAPTER).get("base_model_name_or_path")
    return model_path(str(named or config.model.name))


def _dated(path: Path) -> str:
    """Return a path with the time of its newest file: another model in its place is another one."""
    found = [path] if path.is_file() else list(path.glob("*")) if path.is_dir() else []
    return f"{path} {max((item.stat().st_mtime_ns for item in found), default=0)}"
