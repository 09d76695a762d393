"""SFT: real tokens a second against TRL's SFTTrainer, as it comes and packed; the loss of one step is the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from throughput_setting import Arm, Done, Setting, Watch, alternate, build, compared, prompts, responses, tokenizer
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.trainer_utils import SaveStrategy
from trl import SFTConfig as TrlConfig
from trl import SFTTrainer

import trlhf.sft.train as ours
from trlhf.config import Config, HardwareConfig, ModelConfig, RunConfig
from trlhf.config import SftConfig as OurConfig
from trlhf.console import quiet_libraries
from trlhf.models import encode_prompt
from trlhf.run import StageDirectory
from trlhf.sft.encode import IGNORED, EncodedDemonstration
from trlhf.sft.report import StageCallback

BATCH, MICROBATCH = 16, 8  # demonstrations an optimizer step, and a forward pass
MAX_LENGTH = 512
DEFAULT, PLAIN, PACKED = "TRL, default", "TRL, nothing recomputed", "TRL, packed, nothing recomputed"
TOLERANCE = 1e-4  # nats a token, between the losses of one step


class Clock(TrainerCallback):
    """Notes how long a trainer's own loop took, without what it sets up before and after."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.watch = Watch()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.took = self.watch.read()


def demonstrations(count: int, ids: PreTrainedTokenizerBase) -> list[EncodedDemonstration]:
    """Return demonstrations of random words, as long as GSM8K's questions and solutions."""
    made = []
    for prompt, response in zip(prompts(count, ids), responses(count, ids), strict=True):
        tokens = encode_prompt(ids, prompt.messages)
        made.append(EncodedDemonstration((*tokens, *response), (0,) * len(tokens) + (1,) * len(response), prompt.id))
    return made


def trl_arm(
    name: str,
    rows: Sequence[EncodedDemonstration],
    setting: Setting,
    build_model: Callable[[], Any],
    adapters: Any = None,
    **options: Any,
) -> Arm:
    """Return an arm that trains TRL's trainer on tokens and labels, one pass over the rows."""

    def prepare() -> Callable[[], Done]:
        arguments = trl_arguments(setting, **options)
        data = Dataset.from_dict(
            {"input_ids": [list(row.input_ids) for row in rows], "labels": [row.labels for row in rows]}
        )
        if options.get("packing"):
            from trl.data_utils import pack_dataset

            data = pack_dataset(data, arguments.max_length, "bfd")
        clock = Clock()
        trainer = SFTTrainer(
            model=build_model(),
            args=arguments,
            train_dataset=data,
            processing_class=tokenizer(),
            peft_config=adapters,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        return lambda: _train(trainer, clock, rows)

    return Arm(name, prepare)


def trl_arguments(setting: Setting, **options: Any) -> TrlConfig:
    """Return TRL's arguments where they decide what is computed; all others keep their defaults."""
    options = {"per_device_train_batch_size": MICROBATCH, "gradient_accumulation_steps": BATCH // MICROBATCH} | options
    return TrlConfig(
        output_dir=str(setting.folder / "trl"),
        num_train_epochs=1,
        learning_rate=1e-4,
        use_cpu=setting.device == "cpu",
        dataloader_pin_memory=setting.device != "cpu",
        dataset_kwargs={"skip_prepare_dataset": True},
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **{"bf16": False, "max_length": MAX_LENGTH} | options,
    )


def our_arm(
    rows: Sequence[EncodedDemonstration],
    setting: Setting,
    build_model: Callable[[], Any],
    config: Config | None = None,
) -> Arm:
    """Return an arm that trains as the SFT stage does, without reading and writing models."""

    def prepare() -> Callable[[], Done]:
        folder = setting.folder.resolve()
        how = config or our_config(setting, folder)
        stage = StageDirectory(folder / "sft", folder)
        clock = Clock()
        callback = StageCallback(stage)
        trainer = ours.make_trainer(build_model(), rows, tokenizer(), how, folder / "checkpoints", callback)
        trainer.args.save_strategy = SaveStrategy.NO  # as TRL's arms: none of them writes the model
        trainer.add_callback(clock)

        def work() -> Done:
            with callback:
                return _train(trainer, clock, rows)

        return work

    return Arm("trlhf", prepare)


def our_config(setting: Setting, folder: Path) -> Config:
    """Return the SFT stage's configuration of the same steps."""
    return Config(
        run=RunConfig(dir=str(folder)),
        model=ModelConfig(max_length=MAX_LENGTH),
        sft=OurConfig(epochs=1, learning_rate=1e-4, batch_size=BATCH, microbatch_size=MICROBATCH, save_steps=10**6),
        hardware=HardwareConfig(device="cuda" if setting.device == "cuda" else "cpu"),
    )


def _train(trainer: SFTTrainer, clock: Clock, rows: Sequence[EncodedDemonstration]) -> Done:
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tokens = sum(len(row.input_ids) for row in rows)
    return Done(tokens, {"first_loss": losses[0], "steps": trainer.state.global_step}, clock.took)


def exact_loss(rows: Sequence[EncodedDemonstration], model: Any) -> float:
    """Return the mean negative log-likelihood of the response tokens, one row at a time."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([list(row.input_ids)], device=model.device)
            logits = model(input_ids=ids).logits[0, :-1].double()
            labels = torch.tensor(row.labels[1:], device=model.device)
            total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
            count += int((labels != IGNORED).sum())
    return total / count


def measure(setting: Setting) -> dict[str, Any]:
    """Measure every arm; the loss of a step over all rows of a small set is compared with the plain sum.

    Raises:
        AssertionError: some arm's loss is another one.
    """
    quiet_libraries()
    ids = tokenizer()
    rows = demonstrations(setting.size(64, 32, 16), ids)

    def arms(data: Sequence[EncodedDemonstration]) -> list[Arm]:
        def fresh() -> Any:
            return build(setting).train()

        packed = {"packing": True, "packing_strategy": "bfd", "per_device_train_batch_size": 1}
        mean = sum(len(row.input_ids) for row in data) / len(data)
        per_step = max(1, round(BATCH * mean / MAX_LENGTH))
        return [
            trl_arm(DEFAULT, data, setting, fresh),
            trl_arm(PLAIN, data, setting, fresh, activation_checkpointing=False),
            trl_arm(
                PACKED,
                data,
                setting,
                fresh,
                activation_checkpointing=False,
                **packed | {"gradient_accumulation_steps": per_step},
            ),
            our_arm(data, setting, fresh),
        ]

    small = rows[:BATCH]
    expected = exact_loss(small, build(setting))
    for arm in arms(small):
        loss = arm.prepare()().facts["first_loss"]
        packed_step = arm.name == PACKED  # its first step holds about a step's rows, not exactly
        assert packed_step or math.isclose(loss, expected, abs_tol=TOLERANCE), (arm.name, loss, expected)
    found = alternate(arms(rows), setting)
    best = max((PLAIN, PACKED), key=lambda name: float(found[name]["per_second"]))
    cell = compared("real tokens/s", found, {DEFAULT: 2.0, best: 1.0})
    return cell | {"loss_of_one_step": expected}
