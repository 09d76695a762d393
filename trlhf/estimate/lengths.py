"""How long sequences are: the longest possible ones, or those of the data at hand. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trlhf.config import Config

UNKNOWN_COUNT = 5000  # of demonstrations or prompts where "all" are asked for and nobody has counted them


@dataclass(frozen=True)
class Lengths:
    """Tokens of what a run works on; memory goes by the longest, time by the mean.

    Attributes:
        demonstration: longest prompt and response of SFT together.
        prompt: longest prompt of the pool.
        test_prompt: longest prompt of the held-out tests.
        response: longest response that is expected of the policy.
        mean_demonstration: mean of all.
        mean_prompt: mean over the pool.
        mean_response: mean expected.
        demonstrations: how many.
        tests: how many.
        source: where this comes from, in words.
        labelled: how many responses come with labels; 0: none, or nobody has counted them.
        labelled_response: longest of them, with its prompt.
        common: tokens that all prompts begin with, the template's.
    """

    demonstration: int
    prompt: int
    test_prompt: int
    response: int
    mean_demonstration: float
    mean_prompt: float
    mean_response: float
    demonstrations: int
    tests: int
    source: str
    labelled: int = 0
    labelled_response: int = 0
    common: int = 0


def longest_possible(config: Config) -> Lengths:
    """Return what ``model.max_length`` and ``max_new_tokens`` allow at most, for data that nobody has read."""
    whole, response = config.model.max_length, config.rl.max_new_tokens
    return Lengths(
        demonstration=whole,
        prompt=whole - response,
        test_prompt=whole - config.evaluation.max_new_tokens,
        response=response,
        mean_demonstration=float(whole),
        mean_prompt=float(whole - response),
        mean_response=float(response),
        demonstrations=config.data.sft_prompts or UNKNOWN_COUNT,
        tests=config.data.test_prompts or UNKNOWN_COUNT,
        source="the longest possible sequences",
    )


def lengths_of(
    demonstrations: Sequence[tuple[int, int]],
    prompts: Sequence[int],
    tests: Sequence[int],
    config: Config,
    labelled: Sequence[int] = (),
    common: int = 0,
) -> Lengths:
    """Return the lengths of data that were read; the policy is taken to answer as long as the demonstrations do.

    Args:
        demonstrations: tokens of prompt and response of each.
        prompts: tokens of each prompt of the pool.
        tests: tokens of each held-out prompt.
        config: what is missing is taken to be as long as possible.
        labelled: tokens of each response that comes with a label, with its prompt.
        common: tokens that all prompts begin with.
    """
    most = longest_possible(config)
    rows = [prompt + response for prompt, response in demonstrations] or [most.demonstration]
    responses = [response for _, response in demonstrations] or [most.response]
    prompts, tests = prompts or [most.prompt], tests or [most.test_prompt]
    return Lengths(
        demonstration=min(max(rows), most.demonstration),
        prompt=max(prompts),
        test_prompt=max(tests),
        response=min(max(responses), most.response),
        mean_demonstration=sum(rows) / len(rows),
        mean_prompt=sum(prompts) / len(prompts),
        mean_response=min(sum(responses) / len(responses), float(most.response)),
        demonstrations=len(rows),
        tests=len(tests),
        source="the data",
        labelled=len(labelled),
        labelled_response=max(labelled, default=0),
        common=common,
    )
