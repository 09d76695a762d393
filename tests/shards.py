"""Updates on models that are divided among processes; `smoke/test_sharding.py` starts this and compares.

torchrun --nproc_per_node N tests/shards.py MODEL OUTPUT
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from ranks import CASES
from torch.distributed.fsdp import fully_shard
from trials import ALGORITHMS, LAYOUTS, LORA, PAD, Trial, sampled_groups, sharp_model, some_anchors

from trlhf.config import ModelConfig, build_config
from trlhf.distributed import barrier, world
from trlhf.logprobs import pad_sequences, response_logprobs
from trlhf.models import load_tokenizer, lora_config
from trlhf.rl.checkpoint import STATE, _take_up, _weights, _write_shares
from trlhf.run import RunDirectory
from trlhf.sft.train import _save
from trlhf.sharding import SHARES, hollow, local, make_whole, shard, whole

TAKEN = ("gae", "gae, five groups", "leave_one_out, a group a step", "dpo, five pairs", "dpo, a pair a step")
RESUMED = ("gae (copies)", "dpo, five pairs (copies)", "gae (adapters)")
Result = dict[str, Any]


def nothing(model: Any) -> None:
    """Divide nothing."""


def trial(path: Path, name: str, divide: Any) -> tuple[Trial, int, int]:
    """Return the trial of a case, with how many groups and anchors it has."""
    case, _, layout = name.removesuffix(")").partition(" (")
    algorithm, different, groups, anchors = CASES[case]
    config = replace(ALGORITHMS[algorithm], max_grad_norm=0.5, **different)  # small, so that gradients are clipped
    return Trial(path, config, layout, divide=divide), groups, anchors


def updates(path: Path, divide: Any) -> Mapping[str, Result]:
    """Take two updates of each kind, the second with the first one's optimizer."""
    found = {}
    for name in (f"{case} ({layout})" for case in TAKEN for layout in LAYOUTS):
        own, groups, anchors = trial(path, name, divide)
        metrics = [own.update(sampled_groups(groups, seed), some_anchors(anchors)) for seed in (0, 1)]
        found[name] = {"metrics": metrics, "weights": own.weights()}
    return found


def save(path: Path, folder: Path) -> Mapping[str, Result]:
    """Take an update, write a checkpoint, and take another."""
    found = {}
    for name in RESUMED:
        own, groups, anchors = trial(path, name, shard)
        own.update(sampled_groups(groups), some_anchors(anchors))
        inside = folder / name
        if world()[0] == 0:
            inside.mkdir()
            torch.save(hollow(_weights(own.policy, own.learner)), inside / STATE)
        barrier()
        if name.endswith("(copies)"):
            _write_shares(inside / SHARES, own.policy, own.learner)
        barrier()
        own.update(sampled_groups(groups, 1), some_anchors(anchors))
        found[name] = own.weights()
    return found


def resume(path: Path, folder: Path, divide: Any) -> Mapping[str, Result]:
    """Go on from the checkpoints of `save`."""
    found = {}
    for name in RESUMED:
        own, groups, anchors = trial(path, name, divide)
        _take_up(folder / name / STATE, own.policy, own.learner)
        own.update(sampled_groups(groups, 1), some_anchors(anchors))
        found[name] = own.weights()
    return found


def from_whole(path: Path, folder: Path) -> Mapping[str, Result]:
    """Go on, divided, from what whole models saved."""
    name = RESUMED[0]
    own, groups, anchors = trial(path, name, nothing)
    own.update(sampled_groups(groups), some_anchors(anchors))
    if world()[0] == 0:
        torch.save(_weights(own.policy, own.learner), folder / STATE)
    barrier()
    own, groups, anchors = trial(path, name, shard)
    _take_up(folder / STATE, own.policy, own.learner)
    own.update(sampled_groups(groups, 1), some_anchors(anchors))
    return {name: own.weights()}


def divided(path: Path) -> Result:
    """Return the share of its weights that this process holds, and what a model says before, inside and after `whole`.

    Inside, processes need not make as many passes as each other, nor be called alike.
    """
    own, groups, _ = trial(path, "gae (copies)", shard)
    own.update(sampled_groups(groups))
    parameters = list(own.policy.trainable().values())
    held = sum(local(p).numel() for p in parameters) / sum(p.numel() for p in parameters)
    moments = own.learner.optimizer.adamw.state.values()
    held_moments = sum(local(x["exp_avg"]).numel() for x in moments) / sum(x["exp_avg"].numel() for x in moments)
    batch = pad_sequences([(1, 40, 41)], [(60, 61, 2)], PAD)
    with torch.no_grad(), own.policy.acting() as model, whole(own.policy):
        with whole(own.policy):
            inside = [response_logprobs(model, batch) for _ in range(1 + world()[0])][-1]
        called: Any = model
        logits = [called(input_ids=batch.input_ids).logits for _ in range(2 + world()[0])][-1]
    after = sum(local(p).numel() for p in own.policy.trainable().values()) / sum(p.numel() for p in parameters)
    with torch.no_grad(), own.policy.acting() as model:  # embedding and head stay after it
        layer_by_layer = response_logprobs(model, batch)
    by_hand = logits.log_softmax(-1)[0, [2, 3, 4], [60, 61, 2]]
    return {"held": held, "moments": held_moments, "after": after} | {
        "logprobs": torch.stack([inside[0], layer_by_layer[0], by_hand])
    }


def saved_by_one(path: Path, folder: Path, lora: bool) -> None:
    """Let one process save what accelerate has divided: its parts are the layers and the whole, adapters included."""
    model: Any = sharp_model(path)
    if lora:
        model = get_peft_model(model, lora_config(ModelConfig(lora=LORA)))
    for part in (*model.get_base_model().model.layers, model) if lora else (*model.model.layers, model):
        fully_shard(part)
    make_whole(model)
    if world()[0] == 0:
        stage = RunDirectory(folder / f"saved {lora}").stage("sft")
        config = build_config({"model": {"name": str(path), "lora": {"enabled": lora}}})
        _save(model, load_tokenizer(path), config, stage)
    barrier()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo")
    model, output = Path(sys.argv[1]), Path(sys.argv[2])
    rank, _ = world()
    found = {"updates": updates(model, shard), "saved": save(model, output), "divided": divided(model)}
    found["resumed"] = resume(model, output, shard)
    found["resumed on copies"] = resume(model, output, nothing)
    found["from whole"] = from_whole(model, output)
    for lora in (False, True):
        saved_by_one(model, output, lora)
    torch.save(found, output / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()
