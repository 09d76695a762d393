"""The reward stage as a whole: a task whose answer stands in the words."""

from __future__ import annotations

import json
import math
import random
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from trlhf.config import Config, HardwareConfig, ModelConfig, RewardConfig
from trlhf.data import LabelledPair, LabelledResponse
from trlhf.errors import UserError
from trlhf.evaluation.statistics import nll, wilson_interval
from trlhf.reward import finetune as finetuning
from trlhf.reward import train
from trlhf.reward.calibration import calibrate, fit_temperature, raw_margins
from trlhf.reward.features import prompt_key
from trlhf.reward.finetune import FitSettings
from trlhf.reward.fit import fit
from trlhf.reward.labelled import read_labelled
from trlhf.reward.model import RewardModel
from trlhf.reward.report import assess, clustered_accuracy, rank_correlation
from trlhf.reward.split import Labels, split_by_prompt
from trlhf.reward.table import prompts_of, tabulate
from trlhf.run import StageDirectory
from trlhf.types import Prompt

WORDS = ["river", "stone", "green", "seven", "cloud", "paper", "music", "eight"]
GOOD, BAD = "good", "bad"


def prompt(number: int, task: str = "exact") -> Prompt:
    return Prompt(f"p{number}", ({"role": "user", "content": f"Question {number}?"},), task=task)  # type: ignore[arg-type]


def sentence(rng: random.Random, mark: str) -> str:
    words = rng.choices(WORDS, k=rng.randint(1, 5))
    words.insert(rng.randint(0, len(words)), mark)
    return " ".join(words)


def marked(prompts: int, seed: int = 0, samples: int = 3, first: int = 0) -> Labels:
    """Three prompts in four have verdicts, the fourth a preference: right, and liked, is what says "good"."""
    rng = random.Random(seed)
    labels = Labels([], [])
    for number in range(first, first + prompts):
        if number % 4 != 3:
            for sample in range(samples):
                right = (number + sample) % 2 == 0
                text = sentence(rng, GOOD if right else BAD)
                labels.responses.append(LabelledResponse(prompt(number), text, right))  # type: ignore[attr-defined]
        else:
            one, other = sentence(rng, GOOD), sentence(rng, BAD)
            pair = (one, other, 1.0) if number % 8 == 3 else (other, one, 0.0)
            labels.pairs.append(LabelledPair(prompt(number, "open"), *pair))  # type: ignore[attr-defined]
    return labels


def config(**reward: object) -> Config:
    return Config(reward=RewardConfig(**reward), hardware=HardwareConfig(device="cpu"))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fitted(tiny_model_dir: Path) -> RewardModel:
    """A frozen-backbone reward model that learned the mark from 40 prompts."""
    labels = marked(40)
    model = RewardModel.from_backbone(tiny_model_dir, ModelConfig(), heads=10)
    return fit(model, labels.responses, labels.pairs, FitSettings())


def test_scores_are_centred_on_the_samples_learned_from(fitted: RewardModel) -> None:
    """Every head's f has mean 0 over the reference's samples: an open reward of ½ is a typical response."""
    labels = marked(40)
    _, prompts, responses = tabulate(labels.responses, labels.pairs)
    scores = fitted.heads.scores(fitted.pool_samples(fitted.encode(prompts, responses)))
    assert scores.std() > 0.3 and scores.mean(0).abs().max() < 1e-4


def test_it_learns_what_the_words_say(fitted: RewardModel) -> None:
    held = marked(20, seed=1, first=100)
    report = assess(fitted, held.responses, held.pairs)
    assert report["verdicts"]["auc"] > 0.9
    assert report["verdicts"]["auc_within_prompts"] > 0.9
    assert report["verdicts"]["accuracy"]["low"] > 0.7
    assert report["preferences"]["accuracy"]["value"] == 1
    assert report["scores"]["variance_within_prompts"] > 1


def test_preferences_alone_are_enough_and_so_are_verdicts_alone(tiny_model_dir: Path) -> None:
    held = marked(20, seed=1, first=100)
    labels = marked(80)
    for responses, pairs in ((labels.responses, []), ([], labels.pairs)):
        model = RewardModel.from_backbone(tiny_model_dir, ModelConfig(), heads=3)
        fit(model, responses, pairs, FitSettings())
        assert assess(model, held.responses, [])["verdicts"]["auc_within_prompts"] > 0.9
        assert assess(model, [], held.pairs)["preferences"]["accuracy"]["value"] >= 0.8


def test_heads_disagree_more_where_no_label_speaks(fitted: RewardModel) -> None:
    held = marked(20, seed=1, first=100).responses
    strange = ["}}{{ ## @@ !!", "0 0 0 0 0 0 0 0 0 0 0 0", "QQQQ", "<<<>>>%%%"] * 5
    known = fitted.score([label.prompt for label in held], [label.response for label in held])
    odd = fitted.score([prompt(n) for n in range(20)], strange)
    assert np.mean([score.sd for score in odd]) > 1.5 * np.mean([score.sd for score in known])


def test_a_fit_is_repeatable_and_its_seed_matters(tiny_model_dir: Path) -> None:
    labels = marked(12)

    def weight(seed: int) -> torch.Tensor:
        model = RewardModel.from_backbone(tiny_model_dir, ModelConfig(), heads=3, seed=0)
        settings = FitSettings(finetune="full", epochs=1.0, seed=seed)
        return fit(model, labels.responses, labels.pairs, settings).heads.weight.detach()

    assert torch.equal(weight(0), weight(0))
    assert not torch.equal(weight(0), weight(1))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("kind", "learning_rate"), [("lora", 2e-3), ("full", 1e-4)])
def test_the_backbone_learns_too(
    tiny_model_dir: Path, kind: str, learning_rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels at random, which a cautious fit of the heads leaves alone, are learned by heart if the backbone moves."""
    monkeypatch.setattr(finetuning, "MIN_VALIDATION_LABELS", 10**6)  # validate on the training labels
    rng = random.Random(0)
    labels = [LabelledResponse(x.prompt, x.response, rng.random() < 0.5) for x in marked(20).responses]
    model = RewardModel.from_backbone(tiny_model_dir, ModelConfig(), heads=2)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    seen: list[dict[str, float]] = []
    settings = FitSettings(kind, 3.0, learning_rate, batch_size=8, microbatch_size=3)  # type: ignore[arg-type]
    fit(model, labels, [], settings, lambda step, metrics: seen.append({"step": step, **metrics}))
    losses = [row["validation_loss"] for row in seen if "validation_loss" in row]
    assert len(losses) == 3
    assert losses[2] < losses[0]
    assert model.fitted["kept_epoch"] >= 2
    after = model.backbone.state_dict()
    assert after.keys() == before.keys()  # adapters are merged: an ordinary model again
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert len([row for row in seen if "gradient_norm" in row]) == 3 * math.ceil(len(labels) / 8)


def test_training_that_only_hurts_is_undone(tiny_model_dir: Path) -> None:
    labels = marked(60)
    model = RewardModel.from_backbone(tiny_model_dir, ModelConfig(), heads=2)
    frozen = fit(model, labels.responses, labels.pairs, FitSettings()).logits([prompt(0)], ["good"])
    fit(model, labels.responses, labels.pairs, FitSettings(finetune="full", epochs=1.0, learning_rate=0.5))
    assert model.fitted["kept_epoch"] == 0
    torch.testing.assert_close(model.logits([prompt(0)], ["good"]), frozen)


def test_gradients_that_are_not_finite_stop_the_reward_model_too(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = marked(20)
    model = RewardModel.from_backbone(tiny_model_dir, ModelConfig(), heads=2)
    monkeypatch.setattr(finetuning.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.nan))
    with pytest.raises(UserError, match=r"not finite 3 steps in a row; lower reward\.learning_rate=0\.0002"):
        fit(model, labels.responses, labels.pairs, FitSettings("full", 1.0, batch_size=4, microbatch_size=4))


def test_a_split_never_cuts_a_prompt_in_two() -> None:
    labels = marked(40)
    training, held = split_by_prompt(labels, 0.25, seed=0)
    sides = [{prompt_key(p) for p in prompts_of(side.responses, side.pairs)} for side in (training, held)]
    assert not sides[0] & sides[1]
    assert len(training) + len(held) == len(labels)
    assert 0.15 <= len(held.responses) / len(labels.responses) <= 0.35
    assert 0.15 <= len(held.pairs) / len(labels.pairs) <= 0.35
    assert split_by_prompt(labels, 0.25, seed=0) == (training, held)
    assert split_by_prompt(labels, 0.25, seed=1) != (training, held)
    one = Labels([LabelledResponse(prompt(0), "a", True)], [])
    assert split_by_prompt(one, 0.5, seed=0) == (one, Labels([], []))


def test_equal_questions_under_two_ids_are_one_prompt() -> None:
    twin = Prompt("other id", prompt(0).messages)
    labels = Labels([LabelledResponse(p, "a", True) for p in (prompt(0), twin, prompt(1), prompt(2))], [])
    for seed in range(5):
        training, held = split_by_prompt(labels, 0.4, seed)
        assert sum(label.prompt.messages == twin.messages for label in training.responses) in (0, 2)
        assert held.responses


def test_a_temperature_by_hand() -> None:
    margins, targets = np.array([4.0] * 400 + [-4.0] * 400), np.array([1.0] * 300 + [0.0] * 400 + [1.0] * 100)
    # three in four are as the sign says, so the honest margin is log 3
    assert fit_temperature(margins, targets) == pytest.approx(4 / math.log(3), rel=0.05)
    assert fit_temperature(-margins, targets) > 10  # worse than nothing: as little confidence as possible


def test_calibration_never_raises_the_held_out_nll(fitted: RewardModel) -> None:
    for seed in range(5):
        held = marked(16, seed=seed, first=200)
        flipped = [
            LabelledResponse(label.prompt, label.response, label.right ^ (number % 5 == 0))
            for number, label in enumerate(held.responses)
        ]
        calibrate(fitted, flipped, [])
        margins = raw_margins(fitted, flipped, [])
        before, after = (
            nll(1 / (1 + np.exp(-margins.verdicts / t)), margins.right)
            for t in (1.0, fitted.calibration.verdict_temperature)
        )
        assert after <= before + 1e-9
        assert fitted.calibration.verdict_temperature > 1  # one in five labels is wrong: less sure than before


def test_too_few_or_one_sided_held_out_labels_leave_the_temperature_alone(fitted: RewardModel) -> None:
    held = marked(16, seed=3, first=200)
    notes = calibrate(fitted, held.responses[:4], held.pairs[:3])
    assert fitted.calibration.verdict_temperature == fitted.calibration.preference_temperature == 1
    assert notes == [
        "verdict temperature left at 1: 4 held-out labels, 10 are needed",
        "preference temperature left at 1: 3 held-out labels, 10 are needed",
    ]
    right = [LabelledResponse(label.prompt, label.response, True) for label in held.responses]
    assert "verdict temperature left at 1: the held-out labels are all alike" in calibrate(fitted, right, [])


def test_the_stage_end_to_end(tiny_model_dir: Path, tmp_path: Path) -> None:
    stage = StageDirectory(tmp_path / "reward", tmp_path)
    labels = marked(40)
    report = train.train_reward(labels.responses, labels.pairs, config(epochs=1.0), stage, tiny_model_dir)
    assert stage.done
    assert stage.metrics() == json.loads(json.dumps(report))
    counts = report["labels"]
    assert counts["train"]["verdicts"] + counts["held_out"]["verdicts"] == len(labels.responses)
    assert counts["train"]["preferences"] + counts["held_out"]["preferences"] == len(labels.pairs)
    assert counts["held_out"]["prompts"] == 8
    assert report["held_out"]["verdicts"]["auc"] > 0.9
    held = report["held_out"]["verdicts"]
    assert held["nll"]["after"] <= held["nll"]["before"] + 1e-9
    model = RewardModel.load(stage.path)
    assert model.calibration.verdict_temperature == held["temperature"]
    rows = [json.loads(line) for line in (stage.path / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == counts["held_out"]["verdicts"] + counts["held_out"]["preferences"]
    assert {"prompt", "response", "right", "score"} == rows[0].keys()
    assert (stage.path / "metrics.jsonl").exists()


def test_one_sided_verdicts_are_trained_on_and_reported(tiny_model_dir: Path, tmp_path: Path) -> None:
    labels = [LabelledResponse(label.prompt, label.response, False) for label in marked(16).responses]
    stage = StageDirectory(tmp_path / "reward", tmp_path)
    report = train.train_reward(labels, [], config(finetune="frozen"), stage, tiny_model_dir)
    assert any("every verdict in training is 'wrong'" in note for note in report["notes"])
    assert report["held_out"]["verdicts"]["auc"] is None
    assert report["held_out"]["preferences"] is None
    assert all(math.isfinite(score.mean) for score in RewardModel.load(stage.path).score([prompt(0)], ["good"]))


def test_a_single_prompt_leaves_nothing_to_hold_out(tiny_model_dir: Path, tmp_path: Path) -> None:
    labels = [LabelledResponse(prompt(0), text, text == "good") for text in ("good", "bad")]
    stage = StageDirectory(tmp_path / "reward", tmp_path)
    report = train.train_reward(labels, [], config(finetune="frozen"), stage, tiny_model_dir)
    assert report["labels"]["held_out"]["verdicts"] == 0
    assert report["held_out"] == {"verdicts": None, "preferences": None, "scores": None}


def test_no_labels_is_an_error(tiny_model_dir: Path, tmp_path: Path) -> None:
    stage = StageDirectory(tmp_path / "reward", tmp_path)
    with pytest.raises(UserError, match="there are no labels to learn from"):
        train.train_reward([], [], config(), stage, tiny_model_dir)
    assert not stage.done


def test_labels_that_do_not_fit_the_context_are_counted(tiny_model_dir: Path, tmp_path: Path) -> None:
    long = LabelledResponse(prompt(900), "word " * 2000, True)
    labels = [*marked(8).responses, long]
    stage = StageDirectory(tmp_path / "reward", tmp_path)
    report = train.train_reward(labels, [], config(finetune="frozen"), stage, tiny_model_dir)
    assert report["labels"]["too_long"] == 1
    assert any("1 labels left out: longer than model.max_length" in note for note in report["notes"])
    with pytest.raises(UserError, match=r"none of the 1 labelled responses fits into model.max_length=1024"):
        train.train_reward([long], [], config(), stage, tiny_model_dir)


def test_a_model_that_comes_back_different_is_an_error(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most reported bug of the field: the head that was not saved."""
    save = RewardModel.save

    def forgetful(self: RewardModel, directory: str | Path) -> None:
        trained = self.heads.weight.clone()
        with torch.no_grad():
            self.heads.weight.zero_()
            save(self, directory)
            self.heads.weight.copy_(trained)

    monkeypatch.setattr(RewardModel, "save", forgetful)
    stage = StageDirectory(tmp_path / "reward", tmp_path)
    with pytest.raises(RuntimeError, match="loaded again, its scores differ by up to"):
        train.train_reward(marked(12).responses, [], config(finetune="frozen"), stage, tiny_model_dir)
    assert not stage.done


def test_the_trained_model_is_gone_before_the_saved_one_is_loaded(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[weakref.ref[RewardModel]] = []
    load, fits = RewardModel.load, RewardModel.fits

    def watched(self: RewardModel, *about: object) -> bool:
        built.append(weakref.ref(self))
        return fits(self, *about)  # type: ignore[arg-type]

    def alone(*where: object) -> RewardModel:
        assert built and all(model() is None for model in built)
        return load(*where)  # type: ignore[arg-type]

    monkeypatch.setattr(RewardModel, "fits", watched)
    monkeypatch.setattr(RewardModel, "load", alone)
    stage = StageDirectory(tmp_path / "reward", tmp_path)
    train.train_reward(marked(12).responses, [], config(finetune="frozen"), stage, tiny_model_dir)
    assert stage.done


def test_an_unreadable_backbone_is_the_user_s_to_mend(tmp_path: Path) -> None:
    stage = StageDirectory(tmp_path / "reward", tmp_path)
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="cannot be"):
        train.train_reward(marked(4).responses, [], config(), stage, tmp_path / "model")


def test_labels_of_one_prompt_count_less_than_labels_of_many() -> None:
    alike = np.array([True] * 8 * 7 + [False] * 8 * 3)  # each verdict labels the 8 samples of a prompt
    clustered = clustered_accuracy(alike, [i // 8 for i in range(80)])
    low, high = wilson_interval(56, 80)
    assert (clustered["value"], clustered["n"]) == (0.7, 80)
    assert clustered["low"] < low and high < clustered["high"]
    # v = 10/9 · 10 · 64 · 0.21 / 80² and deff = 80/9: as 9 independent answers
    assert (clustered["low"], clustered["high"]) == pytest.approx(wilson_interval(0.7 * 9, 9))
    apart = clustered_accuracy(alike, range(80))
    assert (apart["low"], apart["high"]) == pytest.approx(wilson_interval(0.7 * 79, 79))  # G - 1 of them
    balanced = clustered_accuracy(np.array([True, False] * 10), [i // 2 for i in range(20)])
    assert (balanced["low"], balanced["high"]) == pytest.approx(wilson_interval(10, 20))  # never narrower than this
    perfect = clustered_accuracy(np.ones(24, dtype=bool), [i // 3 for i in range(24)])
    assert (perfect["low"], perfect["high"]) == pytest.approx(wilson_interval(8, 8))
    one = clustered_accuracy(np.array([True, False]), [5, 5])
    assert (one["value"], one["low"], one["high"]) == (0.5, *wilson_interval(0.5, 1))


def test_rank_correlation_by_hand() -> None:
    assert rank_correlation(np.array([1.0, 5.0, 9.0]), np.array([2.0, 3.0, 100.0])) == pytest.approx(1.0)
    assert rank_correlation(np.array([1.0, 1.0]), np.array([2.0, 3.0])) is None


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_labels_from_a_file(tmp_path: Path) -> None:
    path = write(
        tmp_path / "labels.jsonl",
        {"prompt": "1 + 1?", "response": "2", "label": True},
        {"prompt": "1 + 1?", "response": "3", "label": "wrong"},
        {"prompt": [{"role": "user", "content": "2 + 2?"}], "completion": "4", "label": 1},
        {"prompt": "A poem?", "chosen": "Roses", "rejected": "No."},
        {"prompt": "A joke?", "chosen": "Ha", "rejected": "Hi", "tie": True, "kind": "joke"},
        {"prompt": "1 + 1?", "response": "2"},
        {"prompt": "1 + 1?", "response": "2", "label": "perhaps"},
        {"response": "2", "label": 1},
        {"prompt": "A poem?", "chosen": "Roses"},
    )
    found = read_labelled(path)
    assert [(label.response, label.right) for label in found.responses] == [("2", True), ("3", False), ("4", True)]
    assert found.responses[0].prompt is found.responses[1].prompt
    assert found.responses[0].prompt.task == "exact"
    assert [(pair.first, pair.second, pair.preference) for pair in found.pairs] == [
        ("Roses", "No.", 1),
        ("Ha", "Hi", 0.5),
    ]
    assert (found.pairs[1].prompt.task, found.pairs[1].prompt.kind) == ("open", "joke")
    assert (found.report.read, found.report.kept) == (9, 5)
    assert found.report.dropped == {
        "missing 'label'": ["labels.jsonl:6"],
        "'label' is 'perhaps', neither true (1, \"right\") nor false (0, \"wrong\")": ["labels.jsonl:7"],
        "missing 'prompt'": ["labels.jsonl:8"],
        "'chosen' without 'rejected'": ["labels.jsonl:9"],
    }


def test_labels_from_csv_are_text_and_still_read(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("prompt,response,label\n1 + 1?,2,1\n1 + 1?,3,0\n1 + 1?,4,False\n")
    assert [label.right for label in read_labelled(path).responses] == [True, False, False]


def test_a_file_without_one_usable_label_names_line_and_shapes(tmp_path: Path) -> None:
    path = write(tmp_path / "labels.jsonl", {"text": "hello"}, {"text": "you"})
    with pytest.raises(
        UserError,
        match=r"labels.jsonl line 1: missing 'prompt'\. None of the 2 rows .*'response' and 'label'.*'chosen'",
    ):
        read_labelled(path)
