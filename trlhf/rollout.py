"""Prompts → responses, sampled or greedy: one prefill for all samples of a prompt, no work for rows that are done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trlhf.config import RlConfig
from trlhf.decoding import start_decoding
from trlhf.evaluation.answers import extract_answer
from trlhf.models import encode_prompt
from trlhf.types import Prompt, Rollout


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: the whole vocabulary at a temperature (top-k or top-p would bias PPO's ratio).

    Attributes:
        temperature: 0 for greedy.
        max_new_tokens: length limit of a response.
        samples: responses per prompt.
        batch_size: prompts times samples decoded together.
    """

    temperature: float = 1.0
    max_new_tokens: int = 160
    samples: int = 1
    batch_size: int = 256

    @classmethod
    def of(cls, rl: RlConfig, samples: int) -> Sampling:
        """Return how the rl section says that responses to learn from, or to have labelled, are drawn."""
        return cls(rl.temperature, rl.max_new_tokens, samples, rl.rollout_batch_size)


@torch.no_grad()
def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    generator: torch.Generator,
    advance: Callable[[int], None] = lambda done: None,
) -> list[list[Rollout]]:
    """Draw ``sampling.samples`` responses for each prompt.

    Args:
        model: a causal language model; it is left in evaluation mode while it samples.
        tokenizer: with chat template and EOS.
        prompts: in any order.
        sampling: temperature, limits.
        generator: on the CPU; the only source of randomness.
        advance: called with the number of prompts just finished, for a progress bar.

    Returns:
        For each prompt, in the order given, its rollouts.
    """
    was_training = model.training
    model.eval()
    encoded = [encode_prompt(tokenizer, prompt.messages) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    per_batch = max(1, sampling.batch_size // sampling.samples)
    results: list[list[Rollout]] = [[] for _ in prompts]
    for start in range(0, len(order), per_batch):
        chosen = order[start : start + per_batch]
        drawn = _decode(model, tokenizer, [encoded[i] for i in chosen], sampling, generator)
        for place, i in enumerate(chosen):
            rows = drawn[place * sampling.samples : (place + 1) * sampling.samples]
            results[i] = [_rollout(prompts[i], tokenizer, tokens, logprobs) for tokens, logprobs in rows]
        advance(len(chosen))
    model.train(was_training)
    return results


def _rollout(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, tokens: list[int], logprobs: list[float]) -> Rollout:
    finished = bool(tokens) and tokens[-1] == tokenizer.eos_token_id
    text = str(tokenizer.decode(tokens[:-1] if finished else tokens, skip_special_tokens=False)).strip()
    answer = extract_answer(text) if prompt.task == "exact" and finished else None
    return Rollout(prompt.id, text, tuple(tokens), tuple(logprobs), finished, answer)


def _decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: Sampling,
    generator: torch.Generator,
) -> list[tuple[list[int], list[float]]]:
    """Decode one batch; returns tokens (EOS included) and their log-probabilities, samples of a prompt side by side."""
    eos, samples = int(tokenizer.eos_token_id), sampling.samples
    decoder = start_decoding(model, prompts, samples, int(tokenizer.pad_token_id), sampling.max_new_tokens)
    logits = decoder.logits
    alive = torch.arange(len(logits), device=logits.device)  # which result each live row belongs to
    drawn: list[tuple[list[int], list[float]]] = [([], []) for _ in range(len(alive))]
    for step in range(sampling.max_new_tokens):
        tokens, logprobs = _choose(logits, sampling.temperature, generator)
        for row, token, logprob in zip(alive.tolist(), tokens.tolist(), logprobs.tolist(), strict=True):
            drawn[row][0].append(token)
            drawn[row][1].append(logprob)
        going = tokens != eos
        if step + 1 == sampling.max_new_tokens or not bool(going.any()):
            break
        if not bool(going.all()):
            keep = going.nonzero().squeeze(-1)
            decoder.keep(keep)
            alive, tokens = alive[keep], tokens[keep]
        logits = decoder.step(tokens)
    return drawn


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return one token a row and its log-probability at the temperature (at 1 for greedy decoding)."""
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        draws = torch.rand(logprobs.shape, generator=generator).to(logprobs.device)
        tokens = (logprobs - torch.log(-torch.log(draws.clamp(1e-20, 1 - 1e-7)))).argmax(-1)  # the Gumbel trick
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)
