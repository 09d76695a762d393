"""Stage 1: learn to answer as the demonstrations do, through TRL's SFTTrainer."""

from __future__ import annotations

import dataclasses
import logging
import pickle
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
import transformers
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.data_utils import pack_dataset
from trl.trainer.sft_config import SFTConfig as TrlConfig
from trl.trainer.sft_trainer import SFTTrainer

from trlhf import files, preemption
from trlhf.console import quiet_libraries
from trlhf.crew import together
from trlhf.distributed import any_rank, world
from trlhf.embeddings import make_room, rows_by_layer
from trlhf.errors import UserError
from trlhf.merging import greedy, save_model
from trlhf.models import attention_of, choose_device, load_causal_lm, lora_config, model_path
from trlhf.run import CHECKPOINTS
from trlhf.sft.checkpoints import newest_whole
from trlhf.sft.encode import IGNORED, EncodedDemonstration, check_encoded, encode_demonstrations
from trlhf.sft.even import EvenTrainer, filled
from trlhf.sft.report import AllStepsDone, StageCallback
from trlhf.sft.templates import base_tokenizer
from trlhf.sft.unpadded import UnpaddedTrainer
from trlhf.sharding import is_sharded, make_whole
from trlhf.types import Demonstration, RowReport

if TYPE_CHECKING:
    from trlhf.config import Config
    from trlhf.run import StageDirectory

SAMPLES = 8
_log = logging.getLogger(__name__)


def train_sft(demonstrations: Sequence[Demonstration], config: Config, stage: StageDirectory) -> dict[str, Any]:
    """Fine-tune the base model on demonstrations; leave ``model/`` (and ``adapter/`` with LoRA) in the stage's folder.

    The loss is the mean negative log-likelihood over the response tokens of a whole optimizer step, EOS included, in
    nats; microbatches and packing do not change it. In ``bfloat16`` full fine-tuning keeps float32 weights and computes
    in bfloat16, since AdamW's small steps would vanish in bfloat16 weights; the model is saved in ``model.dtype``.

    A run that was stopped goes on from its newest whole checkpoint, with the batches, optimizer and random states that
    an undisturbed run would have had.

    Args:
        demonstrations: chats that end in the assistant's turn.
        config: the whole configuration.
        stage: folder of the stage.

    Returns:
        The metrics that are also in ``metrics.json``.

    Raises:
        UserError: no usable demonstration, a tokenizer or template that cannot do, an unreadable base, a loss that
            is not finite, or a full disk.
    """
    quiet_libraries()
    tokenizer = _tokenizer(config)
    encoded, report = _encode(demonstrations, tokenizer, config)
    _write_samples(demonstrations, tokenizer, stage)

    start = newest_whole(stage.path / CHECKPOINTS)
    stage.rewind(start[1] if start else 0)
    if start:
        _log.info("sft: going on from step %d (%s)", start[1], start[0])
    trainer: Any = together(_fit, encoded, config, stage.path, start[0] if start else None, stage=stage)
    _save(trainer.model, tokenizer, config, stage)

    metrics: dict[str, Any] = {
        "demonstrations": len(encoded),
        "rows": dataclasses.asdict(report),
        "response_tokens": sum(sum(row.completion_mask) for row in encoded),
        "sequences": len(trainer.train_dataset) - getattr(trainer, "fillers", 0),
        "steps": trainer.state.global_step,
        "loss": _last(trainer, "loss"),
        "token_accuracy": _last(trainer, "mean_token_accuracy"),
    }
    stage.complete(metrics)
    return metrics


def _tokenizer(config: Config) -> PreTrainedTokenizerBase:
    tokenizer = base_tokenizer(config)
    tokenizer.padding_side = "right"
    return tokenizer


def _encode(
    demonstrations: Sequence[Demonstration], tokenizer: PreTrainedTokenizerBase, config: Config
) -> tuple[list[EncodedDemonstration], RowReport]:
    if len(demonstrations) > config.sft.max_prompts:
        _log.warning(
            "sft: %d demonstrations are more than sft.max_prompts=%d; a few thousand good ones are meant to be enough",
            len(demonstrations),
            config.sft.max_prompts,
        )
    encoded, report = encode_demonstrations(tokenizer, demonstrations, config.model.max_length, config.sft.multi_turn)
    check_encoded(encoded, int(tokenizer.eos_token_id))
    _log.info(report.describe())
    return encoded, report


def _last(trainer: SFTTrainer, name: str) -> float | None:
    """Return a metric of the last optimizer step; the trainer's history survives a restart, unlike our own memory."""
    values = [float(entry[name]) for entry in trainer.state.log_history if "loss" in entry and name in entry]
    return values[-1] if values else None


def _dataset(encoded: Sequence[EncodedDemonstration], config: Config) -> Dataset:
    """Return the rows as TRL's collator takes them: ``input_ids`` and ``labels``; ``seq_lengths`` where packed."""
    ids = np.concatenate([np.asarray(row.input_ids, dtype=np.int32) for row in encoded])
    counts = np.concatenate([np.frombuffer(bytes(row.completion_mask), dtype=np.bool_) for row in encoded])
    ends = np.cumsum([0, *(len(row.input_ids) for row in encoded)])
    columns = {"input_ids": ids, "labels": np.where(counts, ids, np.int32(IGNORED))}
    # Lists of Python integers, as Dataset.from_dict takes them, would take ten times as much memory.
    dataset = Dataset(
        pyarrow.table({name: pyarrow.LargeListArray.from_arrays(ends, values) for name, values in columns.items()})
    )
    # Best-fit decreasing keeps every demonstration whole and, by its position ids, blind to its neighbours.
    return pack_dataset(dataset, config.model.max_length, "bfd") if config.sft.packing else dataset


def _fit(
    encoded: Sequence[EncodedDemonstration],
    config: Config,
    folder: Path,
    checkpoint: Path | None,
    stage: StageDirectory | None = None,
) -> SFTTrainer:
    """Train, all processes together.

    Args:
        encoded: the demonstrations in tokens.
        config: the whole configuration.
        folder: of the stage.
        checkpoint: to go on from.
        stage: on the process that writes.
    """
    quiet_libraries()
    tokenizer = _tokenizer(config)
    transformers.set_seed(config.seed)
    with StageCallback(stage) as callback:
        model, new_tokens = _load_base(config, tokenizer)
        trainer = make_trainer(model, encoded, tokenizer, config, folder / CHECKPOINTS, callback, new_tokens)
        _train(trainer, checkpoint, folder, callback)
    make_whole(trainer.model)  # if accelerate divided it: one process saves it
    return trainer


def make_trainer(
    model: PreTrainedModel,
    encoded: Sequence[EncodedDemonstration],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    output: Path,
    callback: StageCallback,
    new_tokens: Sequence[int] = (),
) -> SFTTrainer:
    """Return TRL's trainer of a model on demonstrations in tokens.

    Args:
        model: learns, or gets the adapter that does.
        encoded: at least one.
        tokenizer: pads.
        config: the whole configuration.
        output: folder of the checkpoints.
        callback: is told of every step.
        new_tokens: ids of tokens that the base had no row for; beside an adapter they are trained.
    """
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL reports every trainer to the hub unless told not to
    dataset = _dataset(encoded, config)
    arguments = _arguments(config, output, len(encoded) / len(dataset))
    trained = rows_by_layer(model, new_tokens)
    _, processes = world()
    kind: Callable[..., SFTTrainer] = UnpaddedTrainer
    if processes > 1:
        at_once = arguments.per_device_train_batch_size * processes
        dataset, fillers = filled(dataset, at_once, int(tokenizer.eos_token_id))
        kind = partial(EvenTrainer, fillers)
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=lora_config(config.model, trained) if config.model.lora.enabled else None,
        callbacks=[callback],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    learning: Any = trainer.model
    for module in learning.modules():
        if type(module).__name__ == "TrainableTokensWrapper":
            module.bias = None  # TRL asks the head for it; the wrapper knows only `weight`
    for parameter in learning.parameters():
        if parameter.requires_grad:  # TRL makes adapters of a quantised base bfloat16, where small steps vanish
            parameter.data = parameter.data.float()
    return trainer


def _arguments(config: Config, output: Path, per_row: float) -> TrlConfig:
    """Translate the configuration; where ``per_row`` demonstrations share a row, a step takes so much fewer rows."""
    sft = config.sft
    _, processes = world()
    rows_per_step = max(1, round(sft.batch_size / per_row / processes))  # of this process
    rows_per_pass = min(rows_per_step, max(1, round(sft.microbatch_size / per_row)))
    while processes > 1 and rows_per_step % rows_per_pass:
        rows_per_pass -= 1
    on_gpu = choose_device(config) == "cuda"
    arguments = TrlConfig(
        output_dir=str(output),
        per_device_train_batch_size=rows_per_pass,
        gradient_accumulation_steps=max(1, round(rows_per_step / rows_per_pass)),
        num_train_epochs=sft.epochs,
        learning_rate=sft.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=sft.warmup_ratio,  # below 1: a share of all steps
        weight_decay=sft.weight_decay,
        max_grad_norm=sft.max_grad_norm,
        optim="adamw_torch",
        seed=config.seed,
        data_seed=config.seed,
        accelerator_config={"use_seedable_sampler": True},
        bf16=config.model.dtype == "bfloat16",
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        activation_checkpointing=config.model.gradient_checkpointing,
        use_liger_kernel=uses_liger(sft.kernels, on_gpu),
        packing=sft.packing,
        packing_strategy="bfd",
        max_length=config.model.max_length,
        dataset_kwargs={"skip_prepare_dataset": True},
        save_strategy="steps",
        save_steps=sft.save_steps,
        save_total_limit=sft.save_total_limit,
        logging_steps=1,
        logging_nan_inf_filter=False,
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process, one card: TRL refuses what transformers makes of several
    return arguments


def uses_liger(kernels: str, on_gpu: bool) -> bool:
    """Say whether ``sft.kernels`` means Liger's; ``auto`` takes them where they are installed and there is a GPU."""
    return kernels == "liger" or (kernels == "auto" and on_gpu and find_spec("liger_kernel") is not None)


def _load_base(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, list[int]]:
    """Return the base, with room for every token of the tokenizer, and the ids of the tokens it had no row for."""
    full = not config.model.lora.enabled
    loaded = dataclasses.replace(config.model, dtype="float32") if full else config.model
    loaded = dataclasses.replace(loaded, attention=attention_of(loaded, choose_device(config)))
    quantized = config.model.quantization != "none"
    device = choose_device(config) if quantized else "cpu"  # the trainer moves it, unless it is quantised
    model = load_causal_lm(model_path(config.model.name), loaded, device, quantized=quantized)
    new_tokens = make_room(model, tokenizer)
    model.config.update({name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")})
    model.generation_config = greedy(tokenizer)
    return model, new_tokens


def _train(trainer: SFTTrainer, checkpoint: Path | None, folder: Path, callback: StageCallback) -> None:
    try:
        with files.writing(folder), preemption.patient():
            with suppress(AllStepsDone):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if any_rank(preemption.requested()):
                raise preemption.Preempted.at("sft", trainer.state.global_step)
    except UserError:
        raise
    except Exception as error:  # safetensors, torch and json each raise kinds of their own
        if "PytorchStreamWriter" in str(error):  # torch's own word for a file that could not be written
            raise UserError(f"{folder}: a checkpoint cannot be written: {files.FULL}") from error
        if checkpoint is not None and (not callback.begun or isinstance(error, pickle.UnpicklingError)):
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            raise UserError(
                f"{checkpoint}: this checkpoint cannot be read ({reason}); delete the folder {checkpoint} and run the "
                "same command again"
            ) from error
        raise


def _save(model: Any, tokenizer: PreTrainedTokenizerBase, config: Config, stage: StageDirectory) -> None:
    lora = config.model.lora.enabled
    if lora:
        with stage.new_directory("adapter") as folder:
            whole = {"state_dict": dict(model.named_parameters())} if is_sharded(model) else {}  # its own has shares
            model.save_pretrained(folder, **whole)
            greedy(tokenizer).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    causal = model.get_base_model() if lora else model
    with stage.new_directory("model") as folder:
        save_model(causal, tokenizer, folder, config.model.dtype, "default" if lora else None)


def _write_samples(
    demonstrations: Sequence[Demonstration], tokenizer: PreTrainedTokenizerBase, stage: StageDirectory
) -> None:
    """Write the first demonstrations as the model reads them."""
    rows = []
    for demonstration in demonstrations[:SAMPLES]:
        chat: Any = [dict(turn) for turn in demonstration.messages]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        rows.append({"source": demonstration.source, "kind": demonstration.kind, "text": text})
    stage.write_jsonl("samples.jsonl", rows)
