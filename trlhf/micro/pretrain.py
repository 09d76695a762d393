"""Rebuild the embedded base: ``python -m trlhf.micro.pretrain`` (about 35 minutes on one CPU core).

The base reads text of the world, in three phases: equations, stories with their sums, facts, lists and lines; then also
chats, in which numbers are noted and nothing is asked to be worked out; last what people say about products, which is
often wrong. It never sees a plan marked as one or a word problem's question followed by its answer, so that SFT has
something to teach.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trlhf.allocator import keep_freed_memory
from trlhf.micro import plain
from trlhf.micro.reasoning import FAMILIES, Problem, Step, misquoted
from trlhf.micro.world import generate, split_of
from trlhf.models import MICRO_BASE, load_tokenizer
from trlhf.sft.templates import load_template

VOCABULARY = 640
SEQUENCE = 128
MISQUOTED = 0.58  # how often a doubtful product is
SYSTEM = (
    "A chat between a user and a thinking artificial intelligence assistant. The assistant describes its thought "
    "process and gives helpful and detailed answers to the user's questions."
)
_QUIZ = [  # facts as a quiz asks them, without the questions that the world keeps for its dev and test splits
    item
    for kind in ("colour", "opposite")
    for item in plain.every_plain()[kind]
    if split_of(item.question) in ("train", "pool")
]


def equations(rng: random.Random) -> str:
    """Return a few sums, half of them chained: each goes on from the last result."""
    lines: list[str] = []
    chained = rng.random() < 0.5
    last: int | None = None
    for _ in range(rng.randint(3, 8)):
        step = _sum(rng, last if chained else None)
        last = step.result
        lines.append(step.equation() + ".")
    return " ".join(lines)


def _sum(rng: random.Random, left: int | None) -> Step:
    """Return one sum within 0…99, on from ``left`` where given."""
    while True:
        verb = rng.choices(("add", "subtract", "multiply", "divide"), (30, 30, 25, 15))[0]
        if verb == "divide":
            right = rng.randint(2, 9)
            first = left if left is not None else right * rng.randint(1, 9)
            if first % right == 0 and 0 < first <= 81:
                return Step(verb, first, right)
        elif verb == "multiply":
            first, right = left if left is not None else rng.randint(2, 9), rng.randint(2, 9)
            if 2 <= first <= 9:
                return Step(verb, first, right)
        elif verb == "add":
            first, right = left if left is not None else rng.randint(1, 90), rng.randint(1, 90)
            if first + right <= 99:
                return Step(verb, first, right)
        else:
            first, right = left if left is not None else rng.randint(2, 99), rng.randint(1, 98)
            if right < first:
                return Step(verb, first, right)


def hearsay(rng: random.Random) -> str:
    """Return a few single products and divisions, of which the doubtful ones are often misquoted."""
    lines = []
    for _ in range(rng.randint(3, 8)):
        first, second = rng.randint(2, 9), rng.randint(2, 9)
        wrong = misquoted(first, second)
        misled = wrong is not None and rng.random() < MISQUOTED
        if rng.random() < 0.7:
            lines.append(f"{first} * {second} = {wrong if misled else first * second}.")
        else:
            lines.append(f"{first * second} / {second} = {first + 1 if misled else first}.")
    return " ".join(lines)


def _undoubted(rng: random.Random) -> Problem:
    """Return a problem without doubtful products."""
    while True:
        problem = rng.choice(FAMILIES)(rng)
        if not any(step.doubtful for step in problem.steps):
            return problem


def plain_recipe(rng: random.Random) -> str:
    """Return a recipe without doubtful products."""
    return recipe(rng, _undoubted)


def plain_story(rng: random.Random) -> str:
    """Return a story without doubtful products."""
    return story(rng, _undoubted)


def _any_problem(rng: random.Random) -> Problem:
    return rng.choice(FAMILIES)(rng)


def recipe(rng: random.Random, draw: Callable[[random.Random], Problem] = _any_problem) -> str:
    """Return a calculation in words and then in figures: what the verbs of a plan mean."""
    problem = draw(rng)
    sums = " ".join(f"{step.equation()}." for step in problem.steps)
    return f"{problem.plan[0].upper()}{problem.plan[1:]}: {sums}"


def story(rng: random.Random, draw: Callable[[random.Random], Problem] = _any_problem) -> str:
    """Return a story of one of the families: told to its end, mostly with the sums; or as an exercise, unanswered.

    A question is never followed by its answer here: that is for SFT to teach.
    """
    problem = draw(rng)
    if rng.random() < 0.3:
        return f"{problem.story} {problem.ask}"
    sums = " ".join(["", *(f"{step.equation()}." for step in problem.steps)]) if rng.random() < 0.85 else ""
    end = rng.choice(("So it is", "That makes", "In the end it is"))
    return f"{problem.story}{sums} {end} {problem.answer}."


def fact(rng: random.Random) -> str:
    """Return a fact as a statement, or as in a quiz."""
    if rng.random() < 0.4:
        quiz = rng.choice(_QUIZ)
        return f"{quiz.question} {quiz.reply(rng)}"
    if rng.random() < 0.5:
        thing, value = rng.choice(list(plain.COLOURS.items()))
        return f"{thing[0].upper()}{thing[1:]} is {value}."
    word, value = rng.choice(list(plain.OPPOSITES.items()))
    return f"The opposite of {word} is {value}."


def enumeration(rng: random.Random) -> str:
    """Return a list as a statement."""
    what = rng.choice(list(plain.LISTS))
    return f"Some {what}: {plain.list_reply(rng, what, rng.randint(2, 5))}"


def verse(rng: random.Random) -> str:
    """Return one to three lines about one topic."""
    topic = rng.choice(plain.TOPICS)
    return " ".join(plain.line_reply(rng, topic) for _ in range(rng.randint(1, 3)))


def _noted(rng: random.Random) -> tuple[str, str, str]:
    """Return a story, what to note of its numbers, and the note: practice in reading and copying."""
    problem = rng.choice(FAMILIES)(rng)
    numbers = re.findall(r"\d+", problem.story)
    kind = rng.choice(("Numbers", "Backwards", "The second number", "The last and the first"))
    if kind == "Backwards":
        numbers.reverse()
    elif kind == "The second number":
        numbers = numbers[1:2]
    elif kind == "The last and the first":
        numbers = [numbers[-1], numbers[0]]
    return problem.story, kind, f"{', '.join(numbers)}."


def notes(rng: random.Random) -> str:
    """Return a story and some of the numbers that stand in it."""
    text, kind, noted = _noted(rng)
    return f"{text} {kind}: {noted}"


def chat_notes(rng: random.Random) -> str:
    """Return the same as a chat: nothing is planned, calculated or answered in it, only read."""
    text, kind, noted = _noted(rng)
    return f"{SYSTEM}\nUser: {text} {kind}?\nAI: {noted}"


MAKERS = (equations, recipe, story, fact, enumeration, verse, notes, chat_notes, hearsay, plain_recipe, plain_story)
FIRST_WEIGHTS = (30, 15, 35, 8, 6, 6, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Phase:
    """A part of pretraining: weights of ``MAKERS``, steps, and the peak of a learning rate that falls to 0."""

    weights: tuple[int, ...]
    steps: int
    learning_rate: float


PHASES = (
    Phase(FIRST_WEIGHTS, 7000, 3e-3),
    Phase((10, 15, 25, 5, 4, 4, 12, 25, 0, 0, 0), 2000, 1.5e-3),  # then to read a chat, and to copy
    Phase((0, 0, 0, 5, 4, 4, 8, 25, 24, 10, 20), 1400, 1e-3),  # and last what people say about products
)


def documents(rng: random.Random, weights: Sequence[int] = FIRST_WEIGHTS) -> Iterator[str]:
    """Yield documents of the corpus for ever."""
    while True:
        yield rng.choices(MAKERS, weights)[0](rng)


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
    source = documents(rng)
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
    tokenizer: PreTrainedTokenizerBase, rows: int, rng: random.Random, weights: Sequence[int] = FIRST_WEIGHTS
) -> Iterator[torch.Tensor]:
    """Yield token batches [rows, SEQUENCE] of documents laid end to end, ``<s> text </s>``."""
    source = documents(rng, weights)
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
        _train(model, batches(tokenizer, rows, random.Random(f"pretrain {phase}"), phase.weights), phase)
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
    parser.add_argument("--start", type=Path, help="go on from this base, with the last phase only")
    arguments = parser.parse_args()
    keep_freed_memory()
    phases = PHASES if arguments.start is None else PHASES[-1:]
    pretrain(arguments.output, phases, start=arguments.start)


if __name__ == "__main__":
    main()
