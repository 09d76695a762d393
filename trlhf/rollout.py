"""Prompts → responses, sampled or greedy: one prefill for all samples of a prompt, no work for rows that are done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trlhf.config import RlConfig
from trlhf.crew import together
from trlhf.decoding import start_decoding
from trlhf.distributed import gather, world
from trlhf.draws import Draws, OwnDraws, SharedDraws
from trlhf.evaluation.answers import extract_answer
from trlhf.models import encode_prompt
from trlhf.roles import Role
from trlhf.seeding import torch_generator
from trlhf.sharding import whole
from trlhf.types import Prompt, Rollout

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: the whole vocabulary at a temperature (top-k or top-p would bias PPO's ratio).

    Attributes:
        temperature: 0 for greedy.
        max_new_tokens: length limit of a response.
        samples: responses per prompt.
        batch_size: prompts times samples decoded together.
        draws: where random numbers come from: one ``stream`` for all batches, or one of its own for each ``batch``.
    """

    temperature: float = 1.0
    max_new_tokens: int = 160
    samples: int = 1
    batch_size: int = 256
    draws: str = "stream"

    @property
    def by_batch(self) -> bool:
        """Whether no batch needs to know what was drawn for another."""
        return self.draws == "batch" or self.temperature == 0

    @classmethod
    def of(cls, rl: RlConfig, samples: int) -> Sampling:
        """Return how the rl section says that responses to learn from, or to have labelled, are drawn."""
        return cls(rl.temperature, rl.max_new_tokens, samples, rl.rollout_batch_size, rl.draws)


def sample_as(
    role: Role,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
    advance: Advance = lambda done: None,
) -> list[list[Rollout]]:
    """Draw responses of a role, all processes together; arguments as for `sample_responses`.

    Args:
        role: with ``tokenizer``, made by `trlhf.crew.keep` where there are several processes; its engine, if it has
            one, draws the responses, with random numbers of its own.
        seed: of the generator.
    """
    if role.engine is not None:
        return role.engine.sample(prompts, sampling, advance)
    return together(_sample_as, role, tokenizer, list(prompts), sampling, seed, advance=advance)


def _sample_as(
    role: Role,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
    advance: Advance = lambda done: None,
) -> list[list[Rollout]]:
    generator = torch.Generator().manual_seed(seed)
    with whole(role), role.acting() as model:
        return sample_responses(model, tokenizer, prompts, sampling, generator, advance)


@torch.no_grad()
def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    generator: torch.Generator,
    advance: Advance = lambda done: None,
) -> list[list[Rollout]]:
    """Draw ``sampling.samples`` responses for each prompt.

    Several processes that call this alike draw the same as one would, and all have all of it. Whole batches are shared
    where they need not know of each other; else the prompts of each batch are, and every process goes through the
    random numbers of all its rows, step by step with the others.

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
    (rank, size), seed = world(), generator.initial_seed()
    own: dict[int, list[Rollout]] = {}
    for number, start in enumerate(range(0, len(order), per_batch)):
        chosen = order[start : start + per_batch]
        if sampling.draws == "batch":
            generator = torch_generator(seed, "batch", number)
        draws: Draws = OwnDraws(generator)
        if sampling.by_batch:
            chosen = chosen if number % size == rank else []
        elif size > 1:
            draws = SharedDraws(generator, len(chosen), sampling.samples)
            chosen = chosen[rank::size]
        drawn = _decode(model, tokenizer, [encoded[i] for i in chosen], sampling, draws)
        for place, i in enumerate(chosen):
            rows = drawn[place * sampling.samples : (place + 1) * sampling.samples]
            own[i] = [rollout_of(prompts[i], tokenizer, tokens, logprobs) for tokens, logprobs in rows]
        advance(len(chosen))
    model.train(was_training)
    found = {i: rollouts for part in gather(own) for i, rollouts in part.items()}
    if len(own) < len(prompts):
        advance(len(prompts) - len(own))
    return [found[i] for i in range(len(prompts))]


def rollout_of(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, tokens: list[int], logprobs: list[float]) -> Rollout:
    """Return the rollout that sampled tokens are, EOS included where it was sampled."""
    finished = bool(tokens) and tokens[-1] == tokenizer.eos_token_id
    text = str(tokenizer.decode(tokens[:-1] if finished else tokens, skip_special_tokens=False)).strip()
    answer = extract_answer(text) if prompt.task == "exact" and finished else None
    return Rollout(prompt.id, text, tuple(tokens), tuple(logprobs), finished, answer)


def _decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: Sampling,
    draws: Draws,
) -> list[tuple[list[int], list[float]]]:
    """Decode one batch; returns tokens (EOS included) and their log-probabilities, samples of a prompt side by side."""
    if not prompts:
        draws.follow(sampling.max_new_tokens, model.config.vocab_size)
        return []
    eos, samples = int(tokenizer.eos_token_id), sampling.samples
    decoder = start_decoding(model, prompts, samples, int(tokenizer.pad_token_id), sampling.max_new_tokens)
    logits = decoder.logits
    alive = torch.arange(len(logits), device=logits.device)  # which result each live row belongs to
    drawn: list[tuple[list[int], list[float]]] = [([], []) for _ in range(len(alive))]
    for step in range(sampling.max_new_tokens):
        tokens, logprobs = _choose(logits, sampling.temperature, draws, alive)
        for row, token, logprob in zip(alive.tolist(), tokens.tolist(), logprobs.tolist(), strict=True):
            drawn[row][0].append(token)
            drawn[row][1].append(logprob)
        going = tokens != eos
        if step + 1 == sampling.max_new_tokens:
            break
        if not bool(going.any()):
            draws.follow(sampling.max_new_tokens - step - 1, logits.shape[-1])
            break
        if not bool(going.all()):
            keep = going.nonzero().squeeze(-1)
            decoder.keep(keep)
            alive, tokens = alive[keep], tokens[keep]
        logits = decoder.step(tokens)
    return drawn


def _choose(logits: Tensor, temperature: float, draws: Draws, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return one token a row and its log-probability at the temperature (at 1 for greedy decoding)."""
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        uniform = draws(rows, logprobs.shape[-1]).to(logprobs.device)
        tokens = (logprobs - torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))).argmax(-1)  # the Gumbel trick
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)
