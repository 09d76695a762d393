"""The reward model: padding, priors, nuisances, saving, scoring."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trlhf.config import ModelConfig
from trlhf.errors import UserError
from trlhf.reward.features import FLOOR, Pooled, Sample, collate, fork_layers, fork_weights, pool
from trlhf.reward.heads import EnsembleHeads
from trlhf.reward.model import Calibration, RewardModel
from trlhf.reward.solve import choose_spread, fit_heads, pose, solve
from trlhf.reward.table import LabelTable, bootstrap_weights
from trlhf.types import Prompt, Score

TEXTS = ["a", "two words", "The answer is 5.", "Plan: add. 2 + 3 = 5. The answer is 5.", "no"]


def prompt(text: str = "what is 2 plus 3?", task: str = "exact") -> Prompt:
    return Prompt(text, ({"role": "user", "content": text},), task=task)  # type: ignore[arg-type]


@pytest.fixture
def model(tiny_model_dir: Path) -> RewardModel:
    """A reward model whose every parameter is at work."""
    model = RewardModel.from_backbone(tiny_model_dir, ModelConfig(), heads=4, prior_scale=0.7, seed=3)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.normal_(0, 0.3)
    pooled = model.pool_samples(model.encode([prompt()] * len(TEXTS), TEXTS))
    model.heads.standardise_on(pooled, [2, 4, 8, 16, 3])
    return model


def verdict_table(labels: list[float], groups: list[int] | None = None) -> LabelTable:
    rows = torch.arange(len(labels))
    none = torch.zeros(0, dtype=torch.long)
    return LabelTable(rows, torch.tensor(labels), none, none, torch.zeros(0), torch.tensor(groups or rows.tolist()))


def test_pooling_by_hand() -> None:
    hidden = torch.arange(24, dtype=torch.float32).reshape(2, 4, 3)
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    pooled = pool([0 * hidden, -hidden, hidden], hidden, torch.zeros_like, mask, torch.tensor([1, 3]))
    means = [[-4.5, -5.5, -6.5, 4.5, 5.5, 6.5], [-21, -22, -23, 21, 22, 23]]
    assert pooled.response[:, :6].tolist() == means  # every prediction is as open as any other, so forks are means too
    torch.testing.assert_close(pooled.response[:, 6:], pooled.response[:, :6])
    torch.testing.assert_close(pooled.forks, pooled.response[:, 6:])
    assert pooled.prompt.tolist() == [[0, 1, 2], [18, 19, 20]]


def test_forks_weigh_by_the_entropy_of_the_prediction_before() -> None:
    last = torch.tensor([[[0.0], [3.0], [7.0], [9.0], [5.0]]])  # states at positions 0 … 4
    in_response = torch.tensor([[False, True, True, True, False]])

    def head(states: torch.Tensor) -> torch.Tensor:  # an open prediction after state 3, certain ones elsewhere
        return torch.where(states == 3, 0.0, torch.tensor([0.0, 100.0]))

    weights = fork_weights(head, last, in_response)
    total = math.log(2) + 3 * FLOOR
    expected = torch.tensor([[0, FLOOR / total, (math.log(2) + FLOOR) / total, FLOOR / total, 0]])
    torch.testing.assert_close(weights, expected)
    assert [fork_layers(n) for n in (1, 2, 4, 32)] == [[1], [1, 2], [1, 2, 3, 4], [8, 16, 24, 32]]


def test_what_stands_in_the_padding_does_not_matter(model: RewardModel) -> None:
    samples = model.encode([prompt()] * 2, ["a", "a longer response than that"])
    batch = collate(samples, int(model.tokenizer.pad_token_id), model.device)
    narrow = model(batch.input_ids, batch.attention_mask, batch.prompt_lengths)
    extra = torch.randint(0, 200, (2, 7))
    ids = torch.cat([batch.input_ids, extra], dim=1)
    ids[~torch.cat([batch.attention_mask, torch.zeros(2, 7, dtype=torch.bool)], dim=1)] = 17
    mask = torch.nn.functional.pad(batch.attention_mask, (0, 7))
    assert narrow.shape == (2, 4)
    torch.testing.assert_close(model(ids, mask, batch.prompt_lengths), narrow, atol=1e-5, rtol=0)


def test_a_score_depends_on_neither_company_nor_order(model: RewardModel) -> None:
    prompts = [prompt(), prompt("Hi"), prompt("why?", "open"), prompt("a much longer question than those"), prompt()]
    together = model.score(prompts, TEXTS)
    backwards = model.score(prompts[::-1], TEXTS[::-1], batch_size=2)[::-1]
    alone = [model.score([one], [text])[0] for one, text in zip(prompts, TEXTS, strict=True)]
    for other in (backwards, alone):
        for first, second in zip(together, other, strict=True):
            assert first.mean == pytest.approx(second.mean, abs=1e-5)
            assert first.sd == pytest.approx(second.sd, abs=1e-5)
    assert len({round(score.mean, 4) for score in together}) == 5
    assert model.score([], []) == []


def test_scores_by_hand(model: RewardModel) -> None:
    model.calibration = Calibration(verdict_temperature=2.0, preference_temperature=4.0)
    pooled = model.pool_samples(model.encode([prompt()], ["a"]))
    raw, intercept = model.heads.scores(pooled)[0], model.heads.intercepts(pooled)[0]
    (exact,) = model.score([prompt()], ["a"])
    (open_,) = model.score([prompt(task="open")], ["a"])
    assert isinstance(exact, Score)
    assert exact.mean == pytest.approx(((raw + intercept) / 2).mean().item(), abs=1e-6)
    assert exact.sd == pytest.approx(((raw + intercept) / 2).std(correction=0).item(), abs=1e-6)
    assert open_.mean == pytest.approx((raw / 4).mean().item(), abs=1e-6)


def test_the_length_coefficients_play_no_part_in_a_score(model: RewardModel) -> None:
    before = model.score([prompt()], ["a few words"])
    with torch.no_grad():
        model.heads.length_weight.fill_(100.0)
    assert model.score([prompt()], ["a few words"]) == before


def test_a_response_too_long_is_refused_not_cut(model: RewardModel) -> None:
    model.max_length = 60
    assert not model.fits(prompt(), "word " * 60)
    with pytest.raises(
        UserError, match=r"'what is 2 plus 3\?' and its response are \d+ tokens together.*max_length=60"
    ):
        model.score([prompt()], ["word " * 60])


def test_priors_are_fixed_differ_and_leave_the_mean_alone() -> None:
    heads = EnsembleHeads(6, 3, heads=5, prior_scale=2.0, seed=0)
    pooled = Pooled(torch.randn(4, 6), torch.randn(4, 3))
    scores = heads.scores(pooled)
    torch.testing.assert_close(scores.mean(dim=1), torch.zeros(4), atol=1e-5, rtol=0)
    assert (scores.std(dim=1) > 0.1).all()
    assert "prior" not in dict(heads.named_parameters())
    assert torch.equal(heads.prior, EnsembleHeads(6, 3, 5, 2.0, seed=0).prior)
    assert not torch.equal(heads.prior, EnsembleHeads(6, 3, 5, 2.0, seed=1).prior)


def test_standardising_switches_a_constant_feature_off() -> None:
    heads = EnsembleHeads(2, 1, heads=1, prior_scale=0.0, seed=0)
    pooled = Pooled(torch.tensor([[1.0, 7.0], [3.0, 7.0]]), torch.tensor([[0.0], [2.0]]))
    heads.standardise_on(pooled, [1, 1])
    assert heads.standardised(pooled).response.tolist() == [[-1, 0], [1, 0]]
    other = heads.standardised(Pooled(torch.tensor([[1.0, 1e6]]), torch.zeros(1, 1)))
    assert other.response.tolist() == [[-1, 0]]
    assert heads.standardised_lengths([1, 50]).tolist() == [0, 0]


def test_the_solution_is_where_the_gradient_vanishes() -> None:
    """One feature, one head, no bootstrap: w solves Σ (y - σ(wx + …)) x = w / spread²."""
    heads = EnsembleHeads(1, 1, heads=1, prior_scale=0.0, seed=0)
    x = torch.tensor([-2.0, -1.0, 0.5, 1.0, 2.0, 3.0])
    labels = [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    problem = pose(heads, Pooled(x[:, None], torch.zeros(6, 1)), [1] * 6, verdict_table(labels), flip_rate=0.0)
    solution = solve(problem, torch.ones(6, 1), torch.tensor([2.0]))
    logits = solution.weight[0, 0] * x + solution.intercept_bias[0]
    residual = torch.tensor(labels).double() - torch.sigmoid(logits)
    assert (residual * x).sum().item() == pytest.approx(solution.weight.item() / 2.0**2, abs=1e-5)
    assert solution.weight.item() > 0.1


def test_heads_solved_together_are_those_solved_alone() -> None:
    torch.manual_seed(4)
    heads = EnsembleHeads(5, 3, heads=3, prior_scale=1.0, seed=0)
    table = verdict_table([0.0, 1.0] * 10)
    problem = pose(heads, Pooled(torch.randn(20, 5), torch.randn(20, 3)), [3, 4] * 10, table, flip_rate=0.05)
    weights = bootstrap_weights(table.groups, 3, seed=0)
    together = solve(problem, weights, torch.tensor([0.5, 1.0, 4.0]))
    for head, spread in enumerate((0.5, 1.0, 4.0)):
        alone = solve(problem, weights[:, head : head + 1], torch.tensor([spread]))
        torch.testing.assert_close(together.weight[:, head : head + 1], alone.weight, atol=1e-4, rtol=0)


def test_cross_validation_trusts_a_signal_and_distrusts_noise() -> None:
    torch.manual_seed(5)
    heads = EnsembleHeads(8, 1, heads=1, prior_scale=0.0, seed=0)
    features = torch.randn(80, 8)
    signal = (features[:, 0] > 0).float().tolist()
    noise = (torch.rand(80) > 0.5).float().tolist()
    spreads = [
        choose_spread(pose(heads, Pooled(features, torch.zeros(80, 1)), [1] * 80, verdict_table(y), 0.0), seed=0)
        for y in (signal, noise)
    ]
    assert spreads[0] >= 4
    assert spreads[1] <= 0.5


def test_bootstrap_weights_are_by_prompt_and_never_zero() -> None:
    weights = bootstrap_weights(torch.tensor([0, 0, 1, 2, 2, 2]), 50, seed=0)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert (weights > 0).all()
    torch.testing.assert_close(weights.mean(dim=0), torch.ones(50))
    assert weights.std() > 0.5
    assert torch.equal(bootstrap_weights(torch.tensor([0, 1]), 1, seed=0), torch.ones(2, 1))


def test_the_length_nuisance_takes_up_what_length_explains() -> None:
    """Labels that say only "long is right", and features holding length: scores follow it less with the nuisance."""
    rng = random.Random(0)
    lengths = [rng.randint(2, 60) for _ in range(120)]
    log_lengths = torch.tensor(lengths).float().log()
    features = torch.cat([log_lengths[:, None] + 0.1 * torch.randn(120, 1), torch.randn(120, 5)], dim=1)
    pooled = Pooled(features, torch.zeros(120, 1))
    table = verdict_table([float(length > 18) for length in lengths])
    correlations = {}
    for nuisance in (True, False):
        heads = EnsembleHeads(6, 1, heads=5, prior_scale=0.1, seed=0)
        heads.standardise_on(pooled, lengths)
        problem = pose(heads, pooled, lengths, table, 0.02)
        problem = problem if nuisance else replace(problem, lengths=torch.zeros(120, dtype=torch.float64))
        fit_heads(heads, problem, bootstrap_weights(table.groups, 5, 0), seed=0)
        scores = heads.scores(pooled).mean(dim=1).detach()
        correlations[nuisance] = torch.corrcoef(torch.stack([scores, log_lengths]))[0, 1].item()
    assert correlations[False] > 0.9
    assert correlations[True] < correlations[False] - 0.3


def test_saved_and_loaded_it_is_the_same_priors_included(model: RewardModel, tmp_path: Path) -> None:
    model.calibration = Calibration(1.7, 0.6)
    model.save(tmp_path)
    again = RewardModel.load(tmp_path)
    assert again.calibration == model.calibration
    assert again.heads.prior_scale == 0.7
    assert torch.equal(again.heads.prior, model.heads.prior)
    prompts = [prompt(task=task) for task in ("exact", "open", "exact", "open", "exact")]
    assert torch.equal(again.logits(prompts, TEXTS), model.logits(prompts, TEXTS))
    settings = json.loads((tmp_path / "reward.json").read_text())
    assert settings["calibration"] == {"verdict_temperature": 1.7, "preference_temperature": 0.6}


def test_plain_transformers_loads_the_backbone(model: RewardModel, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model.save(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[1, 5, 9]])
    assert torch.equal(plain(ids).logits, model.backbone(ids).logits)
    assert tokenizer.chat_template == model.tokenizer.chat_template


@pytest.mark.parametrize("broken", ["missing", "heads", "settings", "backbone", "shape"])
def test_an_unreadable_checkpoint_is_the_user_s_to_mend(model: RewardModel, tmp_path: Path, broken: str) -> None:
    if broken != "missing":
        model.save(tmp_path)
    if broken == "heads":
        (tmp_path / "heads.safetensors").write_bytes(b"not tensors at all")
    if broken == "settings":
        (tmp_path / "reward.json").write_text('{"format": 1}')
    if broken == "backbone":
        (tmp_path / "model" / "model.safetensors").write_bytes(b"cut")
    if broken == "shape":
        settings = json.loads((tmp_path / "reward.json").read_text())
        (tmp_path / "reward.json").write_text(json.dumps(settings | {"heads": 5}))
    with pytest.raises(UserError, match=r"cannot be read.*again"):
        RewardModel.load(tmp_path)


def test_samples_know_their_response() -> None:
    assert Sample((1, 2, 3, 4), 3).response_length == 1
