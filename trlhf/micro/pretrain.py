"""Rebuild the embedded base: ``python -m trlhf.micro.pretrain`` (about 45 minutes on one CPU core).

The base reads text of the world, in three phases: equations, stories with their sums, facts, lists and lines; then also
stories with their calculation in words, and chats in which numbers are noted and nothing is worked out; last what
people say about products, which is often wrong. It never sees a plan marked as one or a word problem's question
followed by its answer, so that SFT has something to teach.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trlhf.allocator import keep_freed_memory
from trlhf.micro.corpus import SYSTEM, documents
from trlhf.micro.world import generate
from trlhf.models import MICRO_BASE, load_tokenizer
from trlhf.sft.templates import load_template

VOCABULARY = 640
SEQUENCE = 128


@dataclass(frozen=True)
class Phase:
    """A part of pretraining.

    Attributes:
        shares: how much of each kind of document, by the name of its maker in `trlhf.micro.corpus`.
        steps: optimizer steps.
        learning_rate: the peak, from which it falls to 0.
    """

    shares: Mapping[str, int]
    steps: int
    learning_rate: float


WORLD = {"equations": 30, "recipe": 15, "story": 35, "fact": 8, "enumeration": 6, "verse": 6}
READING = {
    **{"equations": 12, "recipe": 10, "story": 20, "reckoning": 15, "fact": 5, "enumeration": 4, "verse": 4},
    **{"notes": 10, "chat_notes": 20},
}
HEARSAY = {
    **{"hearsay": 24, "plain_equations": 10, "plain_recipe": 6, "plain_story": 12, "plain_reckoning": 12},
    **{"fact": 5, "enumeration": 4, "verse": 4, "notes": 5, "chat_notes": 18},
}
PHASES = (Phase(WORLD, 7000, 3e-3), Phase(READING, 5000, 2e-3), Phase(HEARSAY, 1400, 1e-3))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with digits split one by one, as Mistral's tokenizer splits them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random("tokenizer")
    source = documents(rng, WORLD)
    system = f"{SYSTEM}\nUser: How many?\nAI: Plan: The answer is"
    texts = [next(source) for _ in range(6000)] + [system] * 1000
    texts += [item.prompt.messages[0]["content"] + " " + item.response for item in generate("train", 400)]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = load_template("cerebrum")
    fast.model_max_length = 1024
    return fast


def build_model(tokenizer: PreTrainedTokenizerBase) -> MistralForCausalLM:
    """Return the untrained base: a Mistral of about 0.9 million parameters."""
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            sliding_window=None,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batches(
    tokenizer: PreTrainedTokenizerBase, rows: int, rng: random.Random, shares: Mapping[str, int]
) -> Iterator[torch.Tensor]:
    """Yield token batches [rows, SEQUENCE] of documents laid end to end, ``<s> text </s>``."""
    source = documents(rng, shares)
    stream: list[int] = []
    while True:
        while len(stream) < rows * SEQUENCE:
            texts = [next(source) for _ in range(512)]
            for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
                stream += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        yield torch.tensor(stream[: rows * SEQUENCE]).view(rows, SEQUENCE)
        stream = stream[rows * SEQUENCE :]


def pretrain(output: Path, phases: Sequence[Phase] = PHASES, rows: int = 16, start: Path | None = None) -> None:
    """Train the base phase by phase and save it in bfloat16.

    Args:
        output: folder for model and tokenizer.
        phases: what to train on, for how long.
        rows: sequences of ``SEQUENCE`` tokens a step.
        start: folder of a base to go on from; None: a new one.
    """
    torch.manual_seed(0)
    tokenizer: PreTrainedTokenizerBase
    if start is None:
        tokenizer = build_tokenizer()
        model = build_model(tokenizer)
    else:
        tokenizer = load_tokenizer(start)
        model = MistralForCausalLM.from_pretrained(start, dtype=torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, vocabulary {len(tokenizer)}, {rows * SEQUENCE} tokens a step")
    model.train()
    for number, phase in enumerate(phases, 1):
        print(f"phase {number} of {len(phases)}: {phase.steps} steps")
        _train(model, batches(tokenizer, rows, random.Random(f"pretrain {phase}"), phase.shares), phase)
        _save(model, tokenizer, output)


def _train(model: MistralForCausalLM, source: Iterator[torch.Tensor], phase: Phase) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    warmup, steps = max(1, min(100, phase.steps // 10)), phase.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / (steps - warmup)))
    )
    begun, tokens = time.time(), 0
    for step, batch in enumerate(islice(source, steps), 1):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        tokens += batch.numel()
        if step % 100 == 0 or step == steps:
            speed = tokens / (time.time() - begun)
            print(f"step {step}/{steps} loss {loss.item():.4f} {speed:,.0f} tokens/s", flush=True)


def _save(model: MistralForCausalLM, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    tied = "lm_head.weight"  # the embeddings again: the cast copy would no longer be known as such, and be stored twice
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items() if name != tied}
    model.save_pretrained(output, state_dict=state)
    config = model.config.to_dict() | {"dtype": "bfloat16"}
    type(model.config).from_dict(config).save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    """Parse the command line and pretrain."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=MICRO_BASE, help="folder to write (default: the embedded base)")
    parser.add_argument("--start", type=Path, help="go on from this base (default: from nothing)")
    numbers = range(1, len(PHASES) + 1)
    parser.add_argument("--phases", type=int, nargs="+", choices=numbers, default=list(numbers), help="which, in order")
    arguments = parser.parse_args()
    keep_freed_memory()
    pretrain(arguments.output, [PHASES[number - 1] for number in arguments.phases], start=arguments.start)


if __name__ == "__main__":
    main()
