"""Demonstrations become tokens, with the loss on the response and its EOS and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from trlhf.errors import UserError
from trlhf.models import encode_prompt, encode_response
from trlhf.types import Demonstration, RowReport

IGNORED = -100  # torch's label of a position that no loss counts


@dataclass(frozen=True)
class EncodedDemonstration:
    """A demonstration in tokens.

    Attributes:
        input_ids: prompt and response, EOS last; length T.
        completion_mask: 1 on the response's tokens, EOS included, 0 on the prompt's; length T.
        source: where it came from.
    """

    input_ids: tuple[int, ...]
    completion_mask: tuple[int, ...]
    source: str = ""

    @property
    def labels(self) -> list[int]:
        """The tokens that the loss counts, ``IGNORED`` elsewhere; length T."""
        pairs = zip(self.input_ids, self.completion_mask, strict=True)
        return [token if counts else IGNORED for token, counts in pairs]


def encode_demonstrations(
    tokenizer: PreTrainedTokenizerBase, demonstrations: Sequence[Demonstration], max_length: int
) -> tuple[list[EncodedDemonstration], RowReport]:
    """Tokenize demonstrations; those longer than the context are left out whole, and counted.

    Nothing is truncated: a response cut short would teach the model to stop in mid-sentence, or never.

    Args:
        tokenizer: with its chat template.
        demonstrations: chats that end in the assistant's turn.
        max_length: tokens of prompt and response together that the model may see.

    Raises:
        UserError: there are no demonstrations, or every one is too long.
    """
    report = RowReport(source="demonstrations", read=len(demonstrations))
    if not demonstrations:
        raise UserError("sft: there are no demonstrations to learn from; set data.sft, or data.sft_prompts above 0")
    encoded: list[EncodedDemonstration] = []
    lengths: list[int] = []
    for demonstration in demonstrations:
        *context, answer = demonstration.messages
        prompt = encode_prompt(tokenizer, context)
        response = encode_response(tokenizer, answer["content"])
        lengths.append(len(prompt) + len(response))
        if len(prompt) >= max_length:
            report.drop(f"its prompt alone fills model.max_length={max_length} tokens", demonstration.source)
        elif lengths[-1] > max_length:
            report.drop(f"longer than model.max_length={max_length} tokens", demonstration.source)
        else:
            mask = (0,) * len(prompt) + (1,) * len(response)
            encoded.append(EncodedDemonstration((*prompt, *response), mask, demonstration.source))
    report.kept = len(encoded)
    if not encoded:
        raise UserError(
            f"sft: all {len(demonstrations)} demonstrations are longer than model.max_length={max_length} tokens (the "
            f"shortest has {min(lengths)}); raise model.max_length or give shorter ones\n{report.describe()}"
        )
    return encoded, report


def check_encoded(encoded: Iterable[EncodedDemonstration], eos_token_id: int) -> None:
    """Make sure before training that every demonstration teaches something, and teaches to stop exactly once.

    Raises:
        UserError: names rows whose labels are all masked, whose EOS is not in the loss, or stands inside the response.
    """
    masked: list[str] = []
    endless: list[str] = []
    broken: list[str] = []
    for row in encoded:
        response = [token for token in row.labels if token != IGNORED]
        if not response:
            masked.append(row.source)
        elif response[-1] != eos_token_id:
            endless.append(row.source)
        elif response.count(eos_token_id) > 1:
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
