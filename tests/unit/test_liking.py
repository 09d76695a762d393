"""What a preference can be read from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from trlhf.config import ModelConfig
from trlhf.models import load_tokenizer
from trlhf.reward.features import Sample
from trlhf.reward.liking import SURPRISES, liking_features, surprise
from trlhf.roles import load_sft


def test_surprise_is_how_much_likelier_a_token_was_than_expected() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.5], [0.9, 0.1]]))
    sure = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    values = surprise(logits, torch.tensor([0, 1]))  # an open choice, then a slip
    slip = np.log(0.1) + sure
    assert values.tolist() == pytest.approx([slip / 2, slip])
    assert surprise(logits, torch.tensor([1, 0])).tolist() == pytest.approx([(np.log(0.9) + sure) / 2, 0.0], abs=1e-6)


def test_features_do_not_depend_on_the_company_of_a_response(tiny_model_dir: Path) -> None:
    role = load_sft(tiny_model_dir, ModelConfig(), "cpu")
    pad = int(load_tokenizer(tiny_model_dir).pad_token_id)
    samples = [Sample((1, 20, 30, 40, 50, 2), 3), Sample((1, 20, 31, 41, 51, 61, 71, 81, 2), 2)]
    together = liking_features(role, samples, pad)
    alone = np.vstack([liking_features(role, [sample], pad) for sample in samples])
    assert together.shape == (2, 2 * 32 + SURPRISES)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    changed = liking_features(role, [Sample((1, 20, 30, 40, 51, 2), 3)], pad)
    assert np.abs(changed - together[:1]).max() > 1e-3


def test_only_the_response_is_averaged(tiny_model_dir: Path) -> None:
    role = load_sft(tiny_model_dir, ModelConfig(), "cpu")
    ids = (1, 20, 30, 40, 50, 2)
    states = role.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    expected = torch.cat([states[1][0, 3:].mean(0), states[2][0, 3:].mean(0)]).detach()
    found = liking_features(role, [Sample(ids, 3)], 0)[0, :-SURPRISES]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
