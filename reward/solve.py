"""Fit the heads on features that do not move: a penalised regression, solved to its optimum.

With some dozens of labels the danger is overfitting, and a number of epochs is a poor guard against it. Here nothing
stops early: the objective is smooth, its penalty is a Gaussian prior whose strength is chosen by cross-validation *over
prompts*, and L-BFGS runs to convergence in float64. It takes a second, and no learning rate matters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from trlhf.reward.features import Pooled
from trlhf.reward.heads import EnsembleHeads
from trlhf.reward.table import LabelTable
from trlhf.seeding import torch_generator

SPREADS = (
    0.25,
    0.5,
    1.0,
    2.0,
    4.0,
    8.0,
)  # candidates for the prior standard deviation of f over the samples, in logits
DEFAULT_SPREAD = 1.0  # when there are too few prompts to choose
FOLDS = 4
NUISANCE_SPREAD = 3.0  # prior standard deviation of the constant and of the length coefficients, in logits


@dataclass(frozen=True)
class Problem:
    """Standardised features, in float64, and the labels on them."""

    table: LabelTable
    features: Float[Tensor, "N F"]
    prompts: Float[Tensor, "N D"]
    lengths: Float[Tensor, " N"]
    flip_rate: float


@dataclass(frozen=True)
class Solution:
    """One column for each head.

    Attributes:
        weight: of the response features.
        intercept_weight: of the prompt features.
        intercept_bias: the constant.
        length_weight: of the standardised log length, in verdicts and in preferences.
    """

    weight: Float[Tensor, "F K"]
    intercept_weight: Float[Tensor, "D K"]
    intercept_bias: Float[Tensor, " K"]
    length_weight: Float[Tensor, "2 K"]


def pose(
    heads: EnsembleHeads, pooled: Pooled, response_lengths: list[int], table: LabelTable, flip_rate: float
) -> Problem:
    """State the problem in the heads' own standardised features."""
    seen = heads.standardised(pooled)
    lengths = heads.standardised_lengths(response_lengths)
    return Problem(table, seen.response.double(), seen.prompt.double(), lengths.double(), flip_rate)


def solve(
    problem: Problem,
    weights: Float[Tensor, "M K"],
    spreads: Float[Tensor, " K"],
    priors: Float[Tensor, "N K"] | None = None,
) -> Solution:
    """Minimise the penalised negative log-likelihood of K independent heads at once.

    min Σ_i w_ik nll_ik + ½ ‖standard normal coordinates of head k‖², where f_k(φ) = prior_k + spread_k/√F · w̃·φ̃ and
    b_k = spread_k/√D · ũ·ξ̃ + a: L-BFGS with a strong Wolfe line search, in coordinates in which every prior is N(0, 1).

    Args:
        problem: features and labels.
        weights: of each label in each head; 0 leaves it out.
        spreads: prior standard deviation of each head's score, in logits.
        priors: what each head scores before it has learned anything; None: 0.
    """
    count = weights.shape[1]
    sizes = (problem.features.shape[1], problem.prompts.shape[1], 1, 2)
    free = torch.zeros(sum(sizes), count, dtype=torch.float64, requires_grad=True)
    scales = torch.cat(
        [
            (spreads / math.sqrt(sizes[0])).expand(sizes[0], count),
            (spreads / math.sqrt(sizes[1])).expand(sizes[1], count),
            torch.full((3, count), NUISANCE_SPREAD),
        ]
    ).double()
    offset = torch.zeros(()) if priors is None else priors.double()
    weights = weights.double()
    optimizer = torch.optim.LBFGS(
        [free],
        max_iter=300,
        tolerance_grad=1e-6,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        solution = _unpack(free * scales, sizes)
        scores, intercepts, lengths = _predict(problem, solution)
        loss, _ = problem.table.loss(scores + offset, intercepts, lengths, weights, 1.0, problem.flip_rate)
        loss = loss + 0.5 * free.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return _unpack((free * scales).detach(), sizes)


def choose_spread(problem: Problem, seed: int) -> float:
    """Return the candidate spread with the smallest negative log-likelihood on prompts left out of the fit.

    Every (candidate, fold) is one column of a single :func:`solve`. Ties, and too few prompts, go to caution.
    """
    groups = problem.table.groups
    count = int(groups.max()) + 1
    if count < 2 * FOLDS:
        return DEFAULT_SPREAD
    generator = torch_generator(seed, "reward", "folds")
    fold_of_group = torch.randperm(count, generator=generator) % FOLDS
    left_out = fold_of_group[groups][:, None] == torch.arange(FOLDS).repeat(len(SPREADS))[None, :]
    spreads = torch.tensor(SPREADS).repeat_interleave(FOLDS)
    solution = solve(problem, (~left_out).double(), spreads)
    scores, intercepts, lengths = _predict(problem, solution)
    losses = []
    for column in range(len(spreads)):
        one = slice(column, column + 1)
        loss, _ = problem.table.loss(
            scores[:, one], intercepts[:, one], lengths[:, :, one], left_out[:, one].double(), 1.0, problem.flip_rate
        )
        losses.append(loss)
    by_spread = torch.stack(losses).reshape(len(SPREADS), FOLDS).sum(dim=1)
    return SPREADS[int(by_spread.argmin())]


def fit_heads(heads: EnsembleHeads, problem: Problem, weights: Float[Tensor, "M K"], seed: int) -> float:
    """Solve for all heads, each with its own bootstrap weights and prior, and store the result in them.

    Returns:
        The spread that cross-validation chose.
    """
    spread = choose_spread(problem, seed)
    priors = heads.prior_scale * problem.features @ heads.prior.double().T
    solution = solve(problem, weights, torch.full((heads.heads,), spread), priors)
    with torch.no_grad():
        heads.weight.copy_(solution.weight.T)
        heads.intercept_weight.copy_(solution.intercept_weight.T)
        heads.intercept_bias.copy_(solution.intercept_bias)
        heads.length_weight.copy_(solution.length_weight)
    return spread


def _unpack(columns: Float[Tensor, "C K"], sizes: tuple[int, int, int, int]) -> Solution:
    weight, intercept_weight, bias, length_weight = torch.split(columns, list(sizes))
    return Solution(weight, intercept_weight, bias[0], length_weight)


def _predict(
    problem: Problem, solution: Solution
) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N K"], Float[Tensor, "2 N K"]]:
    scores = problem.features @ solution.weight
    intercepts = problem.prompts @ solution.intercept_weight + solution.intercept_bias
    lengths = solution.length_weight[:, None, :] * problem.lengths[None, :, None]
    return scores, intercepts, lengths
