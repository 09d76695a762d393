"""Rollouts by vLLM in this process, through TRL, which hands it the policy's weights before every batch of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trlhf.distributed import world
from trlhf.errors import UserError
from trlhf.models import encode_prompt, load_tokenizer
from trlhf.rollout import Sampling, rollout_of
from trlhf.types import Prompt, Rollout

if TYPE_CHECKING:
    from trlhf.config import Config
    from trlhf.roles import Role


def load_engine(config: Config, role: Role, sft: Path) -> VllmEngine:
    """Return the engine of a policy that was loaded from the SFT stage's model.

    Raises:
        UserError: no GPU, or several processes.
    """
    if role.device.type != "cuda":
        raise UserError("rl.rollout_engine=vllm: torch finds no CUDA device; use rl.rollout_engine=transformers")
    return VllmEngine(role, load_tokenizer(sft), config)


class VllmEngine:
    """Draws the policy's responses. The whole vocabulary is sampled, as the other engine does.

    vLLM has random numbers of its own: two runs of one seed differ, and a run that was killed ends another way.

    Args:
        role: the policy; vLLM first reads the folder that its model was loaded from.
        tokenizer: with the chat template.
        config: ``rl`` and ``model.max_length`` matter.

    Raises:
        UserError: there are several processes, each of which would draw other responses.
    """

    def __init__(self, role: Role, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
        from accelerate import Accelerator  # type: ignore[import-untyped, unused-ignore]
        from trl.generation.vllm_generation import VLLMGeneration

        if world()[1] > 1:
            raise UserError("rl.rollout_engine=vllm works in one process; use rl.rollout_engine=transformers")
        self._role, self._tokenizer = role, tokenizer
        kind: Any = VLLMGeneration
        self._generation = kind(
            role.model,
            Accelerator(),
            tokenizer,
            mode="colocate",
            gpu_memory_utilization=config.rl.vllm_memory,
            max_model_length=config.model.max_length,
            max_num_seqs=config.rl.rollout_batch_size,
            enable_sleep_mode=True,  # between rollouts its memory is the trainer's
            temperature=config.rl.temperature,
            max_completion_length=config.rl.max_new_tokens,
            logprobs=0,  # of the tokens drawn, and of no others
        )
        self._generation._iter_named_params = lambda: merged_weights(role.model)

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, advance: Callable[[int], None] = lambda done: None
    ) -> list[list[Rollout]]:
        """Draw ``sampling.samples`` responses for each prompt, of the policy as it is now."""
        generation, samples = self._generation, sampling.samples
        generation.temperature, generation.max_completion_length = sampling.temperature, sampling.max_new_tokens
        encoded = [encode_prompt(self._tokenizer, prompt.messages) for prompt in prompts]
        with self._role.acting():
            generation.sync_weights()
        _, tokens, logprobs, _ = generation.generate([ids for ids in encoded for _ in range(samples)], None, samples)
        rows = [
            rollout_of(prompts[i // samples], self._tokenizer, list(ids), [first for first, *_ in values])
            for i, (ids, values) in enumerate(zip(tokens, logprobs, strict=True))
        ]
        advance(len(prompts))
        return [rows[start : start + samples] for start in range(0, len(rows), samples)]


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight of the plain model by name, with the adapters that are on added to copies.

    TRL would merge adapters into the base and take them out again, which rounds the base every time: and it is also the
    reference.
    """
    for name, value in model.named_parameters():
        if ".lora_" in name:
            continue
        layer, adapted, last = name.rpartition(".base_layer.")
        found = value.detach()
        if adapted and last == "weight":
            holder: Any = model.get_submodule(layer)
            for adapter in [] if holder.disable_adapters else holder.active_adapters:
                found = found + holder.get_delta_weight(adapter).to(found.dtype)
        yield name.replace(".base_layer.", "."), found
