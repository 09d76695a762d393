"""Labels as rows of indices into the samples that they are about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trlhf.data import LabelledPair, LabelledResponse
from trlhf.losses.reward import preference_loss, verdict_loss
from trlhf.reward.features import prompt_key
from trlhf.seeding import torch_generator
from trlhf.types import Prompt


@dataclass(frozen=True)
class LabelTable:
    """V verdicts and Q preferences on N distinct samples; M = V + Q labels, verdicts first.

    Attributes:
        verdict_rows: which sample each verdict is about.
        verdicts: 1 right, 0 wrong.
        first_rows: the first sample of each comparison.
        second_rows: the second.
        preferences: probability that the first is better.
        groups: number of the prompt of each label.
    """

    verdict_rows: Int[Tensor, " V"]
    verdicts: Float[Tensor, " V"]
    first_rows: Int[Tensor, " Q"]
    second_rows: Int[Tensor, " Q"]
    preferences: Float[Tensor, " Q"]
    groups: Int[Tensor, " M"]

    def __len__(self) -> int:
        """Return M, the number of labels."""
        return len(self.groups)

    def to(self, device: torch.device) -> LabelTable:
        """Return the table on a device."""
        return LabelTable(**{name: value.to(device) for name, value in vars(self).items()})

    def select(self, labels: Int[Tensor, " m"]) -> tuple[LabelTable, Int[Tensor, " m"]]:
        """Return the table of some labels and the order that it has them in (verdicts first)."""
        count = len(self.verdicts)
        labels = torch.cat([labels[labels < count], labels[labels >= count]])
        verdicts, pairs = labels[labels < count], labels[labels >= count] - count
        table = LabelTable(
            self.verdict_rows[verdicts],
            self.verdicts[verdicts],
            self.first_rows[pairs],
            self.second_rows[pairs],
            self.preferences[pairs],
            self.groups[labels],
        )
        return table, labels

    def compact(self) -> tuple[LabelTable, Int[Tensor, " n"]]:
        """Return the table over only the samples that it uses, and which samples those are."""
        used = torch.cat([self.verdict_rows, self.first_rows, self.second_rows])
        samples, rows = torch.unique(used, return_inverse=True)
        sizes = [len(self.verdict_rows), len(self.first_rows), len(self.second_rows)]
        verdict_rows, first_rows, second_rows = rows.split(sizes)
        table = LabelTable(verdict_rows, self.verdicts, first_rows, second_rows, self.preferences, self.groups)
        return table, samples

    def loss(
        self,
        scores: Float[Tensor, "N K"],
        intercepts: Float[Tensor, "N K"],
        length_terms: Float[Tensor, "2 N K"],
        weights: Float[Tensor, "M K"],
        denominator: float,
        flip_rate: float,
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Return the negative log-likelihood of every label, verdicts and preferences in one sum over ``denominator``.

        A verdict is a draw with logit f + b(x) + c·l, a preference one with logit f - f' + c'·(l - l').
        """
        count = len(self.verdicts)
        metrics: dict[str, float] = {}
        total = scores.new_zeros(())
        if count:
            logits = (scores + intercepts + length_terms[0])[self.verdict_rows]
            part, found = verdict_loss(
                logits, self.verdicts.to(scores), weights[:count], denominator, flip_rate=flip_rate
            )
            total = total + part
            metrics |= {f"verdict_{name}": value for name, value in found.items()}
        if len(self.preferences):
            liked = scores + length_terms[1]
            part, found = preference_loss(
                liked[self.first_rows],
                liked[self.second_rows],
                self.preferences.to(scores),
                weights[count:],
                denominator=denominator,
                flip_rate=flip_rate,
            )
            total = total + part
            metrics |= {f"preference_{name}": value for name, value in found.items()}
        return total, metrics


def tabulate(
    labelled: Sequence[LabelledResponse], pairs: Sequence[LabelledPair]
) -> tuple[LabelTable, list[Prompt], list[str]]:
    """Return the labels as a table, with the prompt and the response of each distinct sample."""
    rows: dict[tuple[object, str], int] = {}
    prompts: list[Prompt] = []
    responses: list[str] = []

    def row(prompt: Prompt, response: str) -> int:
        key = (prompt_key(prompt), response.strip())
        if key not in rows:
            rows[key] = len(prompts)
            prompts.append(prompt)
            responses.append(response)
        return rows[key]

    table = LabelTable(
        torch.tensor([row(label.prompt, label.response) for label in labelled], dtype=torch.long),
        torch.tensor([float(label.right) for label in labelled]),
        torch.tensor([row(pair.prompt, pair.first) for pair in pairs], dtype=torch.long),
        torch.tensor([row(pair.prompt, pair.second) for pair in pairs], dtype=torch.long),
        torch.tensor([float(pair.preference) for pair in pairs]),
        torch.tensor(group_numbers(prompts_of(labelled, pairs)), dtype=torch.long),
    )
    return table, prompts, responses


def prompts_of(labelled: Iterable[LabelledResponse], pairs: Iterable[LabelledPair]) -> list[Prompt]:
    """Return the prompt of each label, verdicts first."""
    return [*(label.prompt for label in labelled), *(pair.prompt for pair in pairs)]


def group_numbers(prompts: Iterable[Prompt]) -> list[int]:
    """Number prompts by their messages, from 0 in order of appearance."""
    numbers: dict[object, int] = {}
    return [numbers.setdefault(prompt_key(prompt), len(numbers)) for prompt in prompts]


def bootstrap_weights(groups: Int[Tensor, " M"], heads: int, seed: int) -> Float[Tensor, "M K"]:
    """Draw each head's weight of each prompt's labels from Exp(1), scaled to a mean of 1 over the labels.

    The Bayesian bootstrap (Rubin 1981, https://doi.org/10.1214/aos/1176345338), by prompt, since labels of one
    prompt say much the same; unlike drawing with replacement it never leaves a head without one of the classes.
    """
    generator = torch_generator(seed, "reward", "bootstrap")
    count = int(groups.max()) + 1
    drawn = -torch.log1p(-torch.rand(count, heads, generator=generator, dtype=torch.float64))
    weights = drawn[groups] if heads > 1 else torch.ones(len(groups), 1, dtype=torch.float64)
    return (weights / weights.mean(dim=0)).float()
