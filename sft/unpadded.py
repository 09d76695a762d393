"""TRL's trainer with rows in order of length, and without padding where attention can be ours.

Every token of a microbatch goes through the layers once, what all of its chats begin with (the template's first lines)
once for all of them, and the head sees the tokens that the loss counts and no others. Loss and metrics are TRL's.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import DistributedType  # type: ignore[import-untyped, unused-ignore]
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.sft_trainer import SFTTrainer

from trlhf.logprobs import SequenceBatch, pad_sequences, response_hidden, token_entropy, token_logprobs
from trlhf.packed_attention import plain_attention
from trlhf.recompute import recomputes
from trlhf.sft.encode import IGNORED
from trlhf.sft.order import StepOrder
from trlhf.vocabulary import over_vocabulary


class UnpaddedTrainer(SFTTrainer):  # type: ignore[misc,unused-ignore]
    """TRL's trainer for one process.

    Packed rows, flash-attention's kernels, Liger's, activations that are computed again and architectures that
    `trlhf.packed_attention` does not know are left to TRL.
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> StepOrder:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return StepOrder([len(ids) for ids in rows["input_ids"]], step, int(args.data_seed or 0))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the negative log-likelihood of the labels, in nats, over ``num_items_in_batch``, those of the step."""
        causal = self._ours(model, inputs)
        if return_outputs or causal is None:
            theirs: Any = super()
            return theirs.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch, counts = unpadded(inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
        with self.accelerator.autocast():
            logprobs, entropy, right = label_logprobs(causal, batch.to(causal.device), counts.to(causal.device))
        noted = self._metrics["train"]
        noted["entropy"].append(float(entropy.mean()) if len(entropy) else 0.0)
        noted["mean_token_accuracy"].append(float(right.mean()) if len(right) else 0.0)
        self._total_train_tokens += int(inputs["attention_mask"].sum())
        noted["num_tokens"] = [self._total_train_tokens]
        total = len(logprobs) if num_items_in_batch is None else num_items_in_batch
        return -logprobs.sum() / torch.as_tensor(total).clamp(min=1)

    def _ours(self, model: Any, inputs: dict[str, Any]) -> PreTrainedModel | None:
        """Return the causal model whose attention can be ours; None where TRL has to compute the loss."""
        alone = self.accelerator.distributed_type == DistributedType.NO and model is self.model
        if not alone or not model.training or "attention_mask" not in inputs or self.args.use_liger_kernel:
            return None
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        fits = plain_attention(causal, inputs["input_ids"].shape[1]) and not recomputes(causal)
        return causal if fits else None


def unpadded(
    input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"], labels: Int[Tensor, "B T"]
) -> tuple[SequenceBatch, Bool[Tensor, "B R"]]:
    """Split each row before the first token that the loss counts.

    Returns:
        What comes before as prompts, the rest as responses; and which of the responses' tokens the loss counts.
    """
    lengths = attention_mask.sum(1).tolist()
    rows = [ids[:length] for ids, length in zip(input_ids.tolist(), lengths, strict=True)]
    counted = labels != IGNORED
    # Without any label, and where the first token has one, which nothing predicts, the prompt is the first token.
    first = [max(1, int(row.int().argmax())) for row in counted.cpu()]
    prompts, responses = ([row[:n] for row, n in zip(rows, first, strict=True)],
                          [row[n:] for row, n in zip(rows, first, strict=True)])  # fmt: skip
    batch = pad_sequences(prompts, responses, 0)
    counts = torch.zeros_like(batch.response_mask)
    for i, (n, length) in enumerate(zip(first, lengths, strict=True)):
        counts[i, : length - n] = counted[i, n:length]
    return batch, counts


def label_logprobs(
    model: PreTrainedModel, batch: SequenceBatch, counts: Bool[Tensor, "B R"]
) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"], Float[Tensor, " K"]]:
    """Return of every token that the loss counts its log-probability, the entropy at its place, and whether it is top.

    In nats; gradients go through the first alone.
    """
    tokens = batch.response_ids[counts]

    def measured(logits: Float[Tensor, "k V"], place: slice) -> Float[Tensor, "3 k"]:
        logprobs = token_logprobs(logits[None], tokens[None, place])[0]
        with torch.no_grad():
            entropy = token_entropy(logits[None])[0]
            right = (logits.argmax(-1) == tokens[place]).float()
        return torch.stack([logprobs, entropy, right])

    hidden = response_hidden(model.base_model, batch)[counts]
    logprobs, entropy, right = torch.cat(over_vocabulary(model, hidden, measured), 1)
    return logprobs, entropy.detach(), right.detach()
