"""Labels that come with the data: how many are used, and that the backbone reads none of them twice."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trlhf.config import Config, DataConfig, HardwareConfig, ModelConfig, RewardConfig
from trlhf.data import LabelledPair, LabelledResponse
from trlhf.errors import UserError
from trlhf.reward import features, finetune, refit, train
from trlhf.reward import model as reward_model
from trlhf.reward.features import Batch, FeatureStore, Pooled, Sample, prompt_key
from trlhf.reward.finetune import FitSettings
from trlhf.reward.fit import fit
from trlhf.reward.model import RewardModel
from trlhf.reward.refit import Refitter
from trlhf.reward.split import SPLIT, Labels, at_most, read_split, split_by_prompt
from trlhf.reward.train import train_reward
from trlhf.roles import Role
from trlhf.run import StageDirectory
from trlhf.tasks import load_task
from trlhf.types import Prompt

CONFIG = Config(reward=RewardConfig(heads=3), hardware=HardwareConfig(device="cpu"))
WORDS = ["river", "stone", "green", "seven", "cloud"]


def prompt(name: str) -> Prompt:
    return Prompt(name, ({"role": "user", "content": f"Question {name}?"},))


def verdicts(name: str, prompts: int, samples: int = 3) -> list[LabelledResponse]:
    rng = random.Random(name)
    return [
        LabelledResponse(
            prompt(f"{name}{i}"), f"{rng.choice(WORDS)} {j} {'good' if (i + j) % 2 else 'bad'}", bool((i + j) % 2)
        )
        for i in range(prompts)
        for j in range(samples)
    ]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, ...]]:
    """How often the backbone read each sample, by its tokens."""
    seen: Counter[tuple[int, ...]] = Counter()
    pooled = reward_model._pooled

    def counted(role: Role, batch: Batch) -> Pooled:
        seen.update(tuple(ids[mask].tolist()) for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True))
        return pooled(role, batch)

    monkeypatch.setattr(reward_model, "_pooled", counted)
    return seen


@pytest.fixture(scope="module")
def stage(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished reward stage."""
    path = tmp_path_factory.mktemp("run")
    train_reward(verdicts("a", 12), [], CONFIG, StageDirectory(path / "reward", path), tiny_model_dir)
    return path / "reward"


# ---- features ----


def test_batches_are_bounded_in_rows_and_in_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "BATCH_TOKENS", 12)
    cuts = [(part.start, part.stop) for part in features._batches([1, 1, 2, 3, 4, 5, 20, 30], batch_size=3)]
    assert cuts == [(0, 3), (3, 5), (5, 6), (6, 7), (7, 8)]  # 3 rows; 2 of 4; 2 of 5 fit no more than 12, but not of 20
    assert list(features._batches([], 3)) == []


def test_a_store_computes_what_it_does_not_know_once() -> None:
    asked: list[int] = []

    def compute(samples: list[Sample]) -> Pooled:
        asked.extend(sample.ids[0] for sample in samples)
        values = torch.tensor([[float(sample.ids[0])] for sample in samples])
        return Pooled(values, -values)

    store = FeatureStore()
    one, two, three = (Sample((n, 9), 1) for n in (1, 2, 3))
    found = store.lookup([two, one, two], compute)  # type: ignore[arg-type]
    assert found.response.flatten().tolist() == [2, 1, 2] and found.prompt.flatten().tolist() == [-2, -1, -2]
    copy = FeatureStore(store)
    assert copy.lookup([three, one], compute).response.flatten().tolist() == [3, 1]  # type: ignore[arg-type]
    assert asked == [2, 1, 3] and (len(store), len(copy)) == (2, 3)
    store.lookup([Sample((1, 9), 2)], compute)  # type: ignore[arg-type]
    assert asked == [2, 1, 3, 1]  # the same tokens with a longer prompt are another sample


def test_a_stage_reads_each_label_once_and_a_sample_of_them_twice_more(
    tiny_model_dir: Path, tmp_path: Path, read: Counter[tuple[int, ...]]
) -> None:
    labels = verdicts("a", 40)
    train_reward(labels, [], CONFIG, StageDirectory(tmp_path / "reward", tmp_path), tiny_model_dir)
    assert len(read) == len(labels)
    assert sorted(read.values()) == [1] * (len(labels) - 64) + [3] * 64  # before and after saving


def test_a_backbone_that_moved_reads_again(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was kept of the old one would be wrong."""
    monkeypatch.setattr(finetune, "MIN_VALIDATION_LABELS", 10**6)  # validate on the training labels: every epoch helps
    rng = random.Random(0)
    labels = [replace(label, right=rng.random() < 0.5) for label in verdicts("a", 16)]
    model = RewardModel.from_backbone(tiny_model_dir, ModelConfig(), heads=2)
    settings = FitSettings(finetune="full", epochs=3.0, learning_rate=1e-4)
    prompts, texts = [x.prompt for x in labels], [x.response for x in labels]
    with model.keep_features():
        before = model.pool_samples(model.encode(prompts, texts))
        fit(model, labels, [], settings)
        kept = model.logits(prompts, texts)
        after = model.pool_samples(model.encode(prompts, texts))
    assert model.fitted["kept_epoch"] > 0 and not torch.allclose(before.response, after.response)
    torch.testing.assert_close(kept, model.logits(prompts, texts))


# ---- how many ----


def test_labels_are_capped_by_whole_prompts() -> None:
    pairs = [LabelledPair(prompt(f"b{i}"), "x", "y", 1.0) for i in range(4)]
    labels = Labels(verdicts("a", 10, samples=4), pairs)
    kept = at_most(labels, 14, seed=0)
    assert 10 < len(kept) <= 14
    sizes = Counter(x.prompt.id for x in kept.responses)
    assert set(sizes.values()) == {4}
    assert [x for x in labels.responses if x in kept.responses] == kept.responses  # in their order
    assert at_most(labels, 14, seed=0) == kept
    assert {len(at_most(labels, 14, seed).pairs) for seed in range(20)} > {0, 1}  # of both kinds
    assert at_most(labels, 0, seed=0) is labels and at_most(labels, 44, seed=0) is labels
    assert len(at_most(Labels(verdicts("a", 2), []), 1, seed=0)) == 3  # one prompt is the least


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    rows = [f'{{"prompt": "{i}?", "response": "{j}", "label": {j}}}' for i in range(8) for j in (0, 1)]
    (tmp_path / "labels.jsonl").write_text("\n".join(rows))
    data = DataConfig(name="file", labels=str(tmp_path / "labels.jsonl"))
    for stage in ("reward", "rl"):  # the rl stage refits on them
        task = load_task(Config(stage=stage, data=data, reward=RewardConfig(max_labelled=6)))  # type: ignore[arg-type]
        assert len(task.labelled) == 6 and len({x.prompt.id for x in task.labelled}) == 3
        report = task.reports[-1]
        assert (report.read, report.kept) == (16, 6)
        ((reason, places),) = report.dropped.items()
        assert "reward.max_labelled=6" in reason and len(places) == 10
        assert not {x.source for x in task.labelled} & set(places)
    everything = load_task(Config(stage="reward", data=data))
    assert len(everything.labelled) == 16 and len(everything.reports) == 1


# ---- refits ----


def test_a_refit_reads_what_comes_with_the_data_once(stage: Path, read: Counter[tuple[int, ...]]) -> None:
    existing, bought = verdicts("a", 12), verdicts("b", 6)
    refit = Refitter(stage, CONFIG, Labels(existing, []))
    for count in (6, 12, 18):
        refit(bought[:count], [])
    assert sorted(read.values()) == sorted([1] * 36 + [3] * 6 + [2] * 6 + [1] * 6)


def test_a_refit_is_a_fit_on_all_labels_and_the_rounds_before_leave_no_trace(stage: Path) -> None:
    existing, bought = verdicts("a", 12), verdicts("b", 6)
    prompts, texts = [prompt("new")] * 3, ["green 1 good", "bad stone", "cloud"]
    went_on = Refitter(stage, CONFIG, Labels(existing, []))
    went_on(bought[:4], [])
    stopped = Refitter(stage, CONFIG, Labels(existing, []))
    scores = stopped(bought, []).logits(prompts, texts)
    assert torch.equal(went_on(bought, []).logits(prompts, texts), scores)
    model = RewardModel.load(stage)
    labels, decided = Labels([*existing, *bought], []), read_split(stage)
    training, held = split_by_prompt(labels, CONFIG.reward.holdout, CONFIG.seed, decided)
    fit(model, training.responses, training.pairs, FitSettings())
    assert len(held) > 0
    temperature = went_on(bought, []).calibration.verdict_temperature
    torch.testing.assert_close(model.logits(prompts, texts) / temperature, scores, atol=1e-3, rtol=1e-3)


def test_a_refit_keeps_every_prompt_on_its_side(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backbone that was fine-tuned knows its training labels: temperatures fitted on them would be too sure."""
    trained, calibrated = list[LabelledResponse](), list[LabelledResponse]()
    monkeypatch.setattr(refit, "fit", lambda model, labelled, pairs, settings: trained.extend(labelled))
    monkeypatch.setattr(refit, "calibrate", lambda model, labelled, pairs: calibrated.extend(labelled))
    existing = verdicts("a", 12)
    learned, held = split_by_prompt(Labels(existing, []), CONFIG.reward.holdout, CONFIG.seed)
    twin = replace(learned.responses[0], prompt=replace(learned.responses[0].prompt, id="twin"), response="another")
    bought = [twin, *verdicts("b", 30)]
    Refitter(stage, CONFIG, Labels(existing, []))(bought, [])
    assert len(trained) + len(calibrated) == len(existing) + len(bought)
    assert held.responses and calibrated[: len(held)] == held.responses
    assert len(calibrated) == len(held) + 18  # a fifth of the new prompts
    assert twin in trained and all(label in trained for label in learned.responses)
    before = {prompt_key(label.prompt) for label in learned.responses}
    assert not before & {prompt_key(label.prompt) for label in calibrated}
    drawn_anew = split_by_prompt(Labels([*existing, *bought], []), CONFIG.reward.holdout, CONFIG.seed)[1]
    assert before & {prompt_key(label.prompt) for label in drawn_anew.responses}  # what must not happen


def test_without_the_reward_stages_split_there_is_no_refit(stage: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reward"
    shutil.copytree(stage, folder)
    (folder / SPLIT).unlink()
    with pytest.raises(UserError, match=r"split\.jsonl is missing, .* delete the folder .*reward and run stage=reward"):
        Refitter(folder, CONFIG, Labels([], []))(verdicts("b", 6), [])
    (folder / SPLIT).write_text('{"prompt": "a0"}\n')
    with pytest.raises(UserError, match=r"split\.jsonl: cannot be read; delete the folder"):
        read_split(folder)


def test_a_refit_leaves_out_what_is_too_long(stage: Path) -> None:
    long = LabelledResponse(prompt("long"), "word " * 2000, True)
    refit = Refitter(stage, CONFIG, Labels([*verdicts("a", 12), long], []))
    scorer = refit([*verdicts("b", 4), long], [])
    assert len(refit.existing) == 36 and scorer.score([prompt("new")], ["good"])


def test_the_log_says_what_the_reward_model_is_worth(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(train, "logger", SimpleNamespace(info=lines.append))
    train_reward(verdicts("a", 40), [], CONFIG, StageDirectory(tmp_path / "reward", tmp_path), tiny_model_dir)
    assert lines == [
        "reward model: 96 verdicts (48 right) and 0 preferences on 32 prompts; held out: 24 and 0 on 8",
        "  held-out verdicts: AUC 1.00, within prompts 1.00, accuracy 100% [68%, 100%] of 24",
    ]
