"""DPO's reference does not change in an update, so it reads every pair once, however many passes there are."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trials import ALGORITHMS, LAYOUTS, Trial, sampled_groups

from trlhf.rl.dpo import DpoLearner, build_pairs

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's


@pytest.mark.parametrize("layout", LAYOUTS)
def test_later_passes_use_what_the_reference_said_in_the_first(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    groups = sampled_groups(4)
    pairs = len(build_pairs(groups, 2, random.Random(0)))
    read = DpoLearner._reference
    weights: list[dict[str, torch.Tensor]] = []
    counts: list[int] = []
    for forgetful in (False, True):
        asked: list[int] = []

        def watched(self: Any, chosen: Any, batch: Any, asked: Any = asked, forgetful: bool = forgetful) -> Any:
            if forgetful:
                self._known = {}
            before = len(self._known)
            found = read(self, chosen, batch)
            asked.append(len(self._known) - before)
            return found

        monkeypatch.setattr(DpoLearner, "_reference", watched)
        trial = Trial(tiny_model_dir, replace(ALGORITHMS["dpo"], epochs=3, pairs_per_step=3, anchor_coef=0.0), layout)
        trial.update(groups)
        weights.append(trial.weights())
        counts.append(sum(asked))
    assert counts == [pairs, 3 * pairs] and pairs > 3
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=1e-5, rtol=1e-4)


def test_the_next_update_asks_again(tiny_model_dir: Path) -> None:
    trial = Trial(tiny_model_dir, ALGORITHMS["dpo"])
    learner: Any = trial.learner
    trial.update(sampled_groups(2))
    first = set(learner._known)
    trial.update(sampled_groups(2, seed=1))
    assert first and first.isdisjoint(learner._known)
