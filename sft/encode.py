"""Demonstrations become tokens, with the loss on the response and its EOS and nowhere else."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from transformers import PreTrainedTokenizerBase

from trlhf.errors import UserError
from trlhf.models import encode_prompt, encode_response
from trlhf.types import Demonstration, RowReport

IGNORED = -100  # torch's label of a position that no loss counts


@dataclass(frozen=True)
class EncodedDemonstration:
    """A demonstration in tokens, in 5 bytes each: a million chats are held at once.

    Attributes:
        input_ids: prompt and response, EOS last; of a whole chat, every prompt and response in turn; length T.
        completion_mask: 1 on the tokens of responses, EOS included, 0 on the prompt's; length T.
        source: where it came from.
    """

    input_ids: Sequence[int]
    completion_mask: Sequence[int]
    source: str = ""

    def __post_init__(self) -> None:
        """Keep the tokens as 32-bit integers and the mask as bytes, whatever was given."""
        object.__setattr__(self, "input_ids", array("i", self.input_ids))
        object.__setattr__(self, "completion_mask", bytes(self.completion_mask))

    @property
    def labels(self) -> list[int]:
        """The tokens that the loss counts, ``IGNORED`` elsewhere; length T."""
        pairs = zip(self.input_ids, self.completion_mask, strict=True)
        return [token if counts else IGNORED for token, counts in pairs]

    @property
    def responses(self) -> list[list[int]]:
        """The tokens of each response, EOS included."""
        runs = groupby(zip(self.input_ids, self.completion_mask, strict=True), key=lambda pair: pair[1])
        return [[token for token, _ in run] for counts, run in runs if counts]


def encode_demonstrations(
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    max_length: int,
    multi_turn: Literal["unrolled", "whole"] = "unrolled",
) -> tuple[list[EncodedDemonstration], RowReport]:
    """Tokenize demonstrations; those longer than the context are left out whole, and counted.

    Nothing is truncated: a response cut short would teach the model to stop in mid-sentence, or never.

    Args:
        tokenizer: with its chat template.
        demonstrations: chats that end in the assistant's turn.
        max_length: tokens of prompt and response together that the model may see.
        multi_turn: ``unrolled``: the loss is on the last response; ``whole``: on every response of the chat.

    Raises:
        UserError: there are no demonstrations, every one is too long, or ``whole`` is asked for and the template
            writes a past response in another way than the model gave it.
    """
    report = RowReport(source="demonstrations", read=len(demonstrations))
    if not demonstrations:
        raise UserError("sft: there are no demonstrations to learn from; set data.sft, or data.sft_prompts above 0")
    encoded: list[EncodedDemonstration] = []
    lengths: list[int] = []
    for demonstration in demonstrations:
        if multi_turn == "whole":
            ids, mask, prompt = _encode_chat(tokenizer, demonstration)
        else:
            *context, answer = demonstration.messages
            start = encode_prompt(tokenizer, context)
            response = encode_response(tokenizer, answer["content"])
            ids, mask, prompt = [*start, *response], [0] * len(start) + [1] * len(response), len(start)
        lengths.append(len(ids))
        if prompt >= max_length:
            report.drop(f"its prompt alone fills model.max_length={max_length} tokens", demonstration.source)
        elif lengths[-1] > max_length:
            report.drop(f"longer than model.max_length={max_length} tokens", demonstration.source)
        else:
            encoded.append(EncodedDemonstration(ids, mask, demonstration.source))
    report.kept = len(encoded)
    if not encoded:
        raise UserError(
            f"sft: all {len(demonstrations)} demonstrations are longer than model.max_length={max_length} tokens (the "
            f"shortest has {min(lengths)}); raise model.max_length or give shorter ones\n{report.describe()}"
        )
    return encoded, report


def _encode_chat(tokenizer: PreTrainedTokenizerBase, demonstration: Demonstration) -> tuple[list[int], list[int], int]:
    """Return a whole chat's tokens, which of them count, and the length of its first prompt.

    Each response stands behind exactly the tokens that the model will be prompted with at that turn.
    """
    messages = demonstration.messages
    ends = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    ids: list[int] = []
    mask: list[int] = []
    first = 0
    for end in ends:
        prompt = encode_prompt(tokenizer, messages[:end])
        if prompt[: len(ids)] != ids:
            raise UserError(
                f"sft.multi_turn=whole: {demonstration.source}: the chat template writes a past response in another "
                "way than the model gave it (it drops its EOS, as cerebrum's does), so one row cannot hold both; use "
                "sft.multi_turn=unrolled, or another template"
            )
        first = first or len(prompt)
        response = encode_response(tokenizer, messages[end]["content"])
        mask += [0] * (len(prompt) - len(ids)) + [1] * len(response)
        ids = [*prompt, *response]
    return ids, mask, first


def check_encoded(encoded: Iterable[EncodedDemonstration], eos_token_id: int) -> None:
    """Make sure before training that every demonstration teaches something, and teaches to stop exactly once a turn.

    Raises:
        UserError: names rows whose labels are all masked, whose EOS is not in the loss, or stands inside a response.
    """
    masked: list[str] = []
    endless: list[str] = []
    broken: list[str] = []
    for row in encoded:
        if not row.responses:
            masked.append(row.source)
        elif any(response[-1] != eos_token_id for response in row.responses):
            endless.append(row.source)
        elif any(response.count(eos_token_id) > 1 for response in row.responses):
            broken.append(row.source)
    problems = [
        (masked, "every label is masked, so there is nothing to learn from; give each row a response"),
        (endless, "EOS is not the loss's last token, so the model would never learn to stop; mend the chat template"),
        (broken, "EOS stands inside the response, so the model would learn to stop early; take it out of the text"),
    ]
    found = [f"{_some(places)}: {text}" for places, text in problems if places]
    if found:
        raise UserError("sft: " + "\n".join(found))


def _some(places: Sequence[str]) -> str:
    return ", ".join(places[:5]) + (f" and {len(places) - 5} more" if len(places) > 5 else "")
