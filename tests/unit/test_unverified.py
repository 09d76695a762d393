"""Prompts that no label decides: how many of a step's they are, and what becomes of a round that has only those."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from trlhf.config import Config, RlConfig, TargetingConfig
from trlhf.errors import UserError
from trlhf.rl.checkpoint import Progress
from trlhf.rl.draw import draw_prompts
from trlhf.rl.round import Round
from trlhf.types import Prompt


def prompts(name: str, count: int) -> list[Prompt]:
    return [Prompt(f"{name}{i}", (), task="open" if name == "o" else "exact") for i in range(count)]


def round_of(share: float, exact: int = 0, open: int = 0, unverified: int = 0) -> Round:
    config = Config(
        rl=RlConfig(prompts_per_step=20, open_share=0.1, unverified_share=share),
        targeting=TargetingConfig(acquisition="uniform", update="plain"),
    )
    none: Any = None
    one = Round(config, none, none, none, none, Progress())
    one.exact, one.open, one.unverified = prompts("e", exact), prompts("o", open), prompts("u", unverified)
    return one


@pytest.mark.parametrize(
    ("share", "pool", "drawn"),
    [
        (0.0, {"exact": 40, "open": 40, "unverified": 40}, {"e": 18, "o": 2}),
        (0.5, {"exact": 40, "open": 40, "unverified": 40}, {"e": 8, "o": 2, "u": 10}),
        (0.5, {"exact": 3, "open": 40, "unverified": 40}, {"e": 3, "o": 2, "u": 15}),  # in place of verifiable ones
        (0.5, {"exact": 0, "open": 0, "unverified": 40}, {"u": 20}),
        (0.5, {"exact": 40, "open": 0, "unverified": 4}, {"e": 16, "u": 4}),
        (1.0, {"exact": 40, "open": 40, "unverified": 40}, {"o": 2, "u": 18}),
        (0.0, {"exact": 0, "open": 40, "unverified": 40}, {"o": 20}),
        (0.0, {"exact": 3, "open": 1, "unverified": 40}, {"e": 3, "o": 1}),
    ],
)
def test_a_step_s_prompts_are_of_each_kind(share: float, pool: dict[str, int], drawn: dict[str, int]) -> None:
    chosen = draw_prompts(round_of(share, **pool), np.random.default_rng(0))
    assert Counter(prompt.id[0] for prompt in chosen) == drawn
    assert len({prompt.id for prompt in chosen}) == len(chosen)


def prepared(share: float, tmp_path: Path) -> tuple[Round, list[Any]]:
    """A round on a pool without any label."""
    one, fits = round_of(share), list[Any]()

    def refit(*labels: Any) -> Any:
        fits.append(labels)

    nothing = SimpleNamespace(load=lambda path: None, apply=lambda labels: ([], []), labels=list)
    inputs = SimpleNamespace(pool=prompts("u", 3), archive=nothing, ledger=nothing, refit=refit, held_out=frozenset())
    one.inputs = cast("Any", inputs)
    one.stage = cast("Any", SimpleNamespace(path=tmp_path))
    one.prepare()
    return one, fits


def test_a_round_without_a_right_answer_learns_from_the_reward_model(
    tmp_path: Path,
) -> None:
    one, fits = prepared(0.5, tmp_path)
    assert len(one.unverified) == 3 and fits == [([], [])]
    with pytest.raises(UserError, match=r"no prompt can be learned from: .*rl.unverified_share=0.5"):
        prepared(0.0, tmp_path)
