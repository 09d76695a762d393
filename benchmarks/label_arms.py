"""The arms of ``label_efficiency.py``: what each does with its labels, in words and overrides; and what all share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

BUDGETS = (8, 16, 32, 64, 128, 256)
FIRST_SHARE = 0.2  # of the labels: bought by the reward stage, uniformly

# The same for every arm.
SCHEDULE = (
    *("rl.rounds=4", "rl.steps_per_round=8", "rl.prompts_per_step=16", "rl.samples_per_prompt=8"),
    *("targeting.candidates=128", "targeting.samples_per_prompt=8", "targeting.round_share=0.5"),
)
COMMON = (
    *("targeting.preference_share=0", "rl.open_share=0"),  # this benchmark is about exact answers
    *("hardware.threads=1", "hardware.device=cpu"),
)
QUICK = (
    *("data.sft_prompts=24", "data.pool_prompts=48", "data.test_prompts=12", "sft.epochs=1", "sft.batch_size=8"),
    *("sft.microbatch_size=8", "reward.samples_per_prompt=4", "rl.rounds=1", "rl.steps_per_round=2"),
    *("rl.prompts_per_step=6", "rl.samples_per_prompt=4", "rl.minibatch_size=12", "rl.microbatch_size=12"),
    *("rl.max_new_tokens=16", "targeting.samples_per_prompt=4", "targeting.candidates=12"),
    "evaluation.max_new_tokens=24",
    "labeler.noise=0.4",  # so small a policy is never right; a person who errs says so at times
)


@dataclass(frozen=True)
class Arm:
    """One way to spend labels.

    Attributes:
        words: what it is, for people.
        overrides: of the rl stage.
        labels: ``budget``: as many as the cell says; ``none``; ``all``: every gold answer of the pool, no budget.
        model: whose accuracy counts: that of the rl stage, or of what comes before it.
    """

    words: str
    overrides: tuple[str, ...] = ()
    labels: Literal["budget", "none", "all"] = "budget"
    model: Literal["base", "sft", "rl"] = "rl"


def _uniform(words: str, *more: str) -> Arm:
    return Arm(words, ("targeting=uniform", *more))


def _score(words: str, acquisition: str) -> Arm:
    """Return the whole method with another score in place of its own."""
    return Arm(words, ("targeting=full", f"targeting.acquisition={acquisition}"))


def _part(words: str, override: str) -> Arm:
    """Return the whole method with a part that is off by default."""
    return Arm(f"full tRLHF, {words}", ("targeting=full", override))


def _label_free(words: str, reward: str) -> Arm:
    return Arm(words, ("targeting=uniform", "rl.unverified_share=1", f"rl.unverified_reward={reward}"), "none")


# Those that decide come first: a grid that is not finished is useful.
ARMS = {
    "base": Arm("the base model", labels="none", model="base"),
    "sft": Arm("SFT", labels="none", model="sft"),
    "full": Arm("full tRLHF", ("targeting=full",)),
    "uniform_ppo": _uniform("uniform labels, PPO where they verify"),
    "gold": Arm("gold answers everywhere", ("targeting=uniform",), "all"),
    "uniform_targeted": _uniform("uniform labels, targeted update", "targeting.update=targeted"),
    "targeted_plain": Arm("targeted labels, plain update", ("targeting=full", "targeting.update=plain")),
    "scrambled": _score("scrambled scores", "scrambled"),
    "least_agreed_majority": _uniform(
        "least agreed, majority elsewhere",
        *("targeting.acquisition=least_agreed", "rl.unverified_share=0.5", "rl.unverified_reward=majority"),
    ),
    "uniform_frontier_prompts": _uniform("uniform labels on frontier prompts", "targeting.label_prompts=frontier"),
    "uniform_dpo": _uniform("uniform labels, DPO", "rl=dpo"),
    "uniform_reward_model": _uniform(
        "uniform labels, reward model, PPO", "rl.unverified_share=0.5", "rl.unverified_reward=reward_model"
    ),
    "uniform_gate": _uniform("uniform labels behind the gate", "targeting.gate=true"),
    "frontier": Arm("frontier score", ("targeting=frontier",)),
    "majority": _label_free("majority vote, no labels", "majority"),
    "random_reward": _label_free("random reward, no labels", "random"),
    "d_optimal": _score("D-optimal", "d_optimal"),
    "max_entropy": _score("max entropy", "max_entropy"),
    "double_thompson": _score("double Thompson", "double_thompson"),
    "apl": _score("APL", "apl"),
    "full_dpo": Arm("full tRLHF, DPO", ("targeting=full", "rl=dpo")),
    "full_posterior": _part("pass rates by their posterior", "targeting.pass_rates=posterior"),
    "full_anchor_control": _part("anchors' own controller", "rl.anchor_kl_target=0.01"),
    "full_interpolate": _part("weights interpolated", "rl.interpolate=true"),
}
FULL = "full"
UNIFORM = (
    *("uniform_ppo", "uniform_targeted", "uniform_dpo", "uniform_reward_model", "uniform_gate"),
    "uniform_frontier_prompts",
)
# Acquisition (uniform, the method's) by update (plain, the method's): neither, the first, the second, both.
FACTORIAL = ("uniform_ppo", "targeted_plain", "uniform_targeted", "full")
SCRAMBLED = "scrambled"
START, BOUND = "sft", "gold"  # between which the gain lies
DRAWN = ("full", "uniform_ppo", "uniform_targeted", "targeted_plain", "scrambled", "least_agreed_majority")
QUICK_ARMS = ("sft", "full", "uniform_ppo")


@dataclass(frozen=True)
class Cell:
    """One independent run: an arm, a number of labels (0 for none, -1 for all), a seed."""

    arm: str
    budget: int
    seed: int

    @property
    def name(self) -> str:
        """Return the name of its file and folder."""
        return f"{self.arm}-{'all' if self.budget < 0 else self.budget}-{self.seed}"


def cells_of(arms: Sequence[str], budgets: Sequence[int], seeds: Sequence[int]) -> list[Cell]:
    """Return the cells of a grid, by seed and then by arm in the order of `ARMS`."""
    chosen = [name for name in ARMS if name in arms]
    fixed = {"none": (0,), "all": (-1,)}
    return [Cell(a, b, seed) for seed in seeds for a in chosen for b in fixed.get(ARMS[a].labels, tuple(budgets))]


def first_labels(budget: int) -> int:
    """Return how many labels of a budget the reward stage buys."""
    return max(2, round(FIRST_SHARE * budget))
