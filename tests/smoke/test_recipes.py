"""The five published recipes: each composes, plans, and runs end to end on a few rows of its own data sets' shapes.

The configurations are read as they are, hub names included: ``data.mirror`` is a folder with a few rows of each set,
under its name, in its files and columns. No row is taken from the data sets themselves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from recipe_rows import write_recipes
from suite_rows import write_suites
from transformers import AutoModelForCausalLM, AutoTokenizer

import trlhf
from trlhf.compose import compose
from trlhf.config import Config
from trlhf.evaluation.suites import SUITES as EVERY

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
RECIPES = ["cerebrum-7b", "collective-cognition", "capybara", "jackalope", "mistral-orca"]
CHATML = ["jackalope", "mistral-orca"]
QLORA = {"collective-cognition": ["model.lora.enabled=true", "model.quantization=nf4"]}
SIZES = [
    *("model=micro", "hardware.device=cpu", "hardware.threads=1"),
    *("sft.epochs=1", "sft.batch_size=8", "sft.microbatch_size=8"),
    *("data.test_prompts=2", "evaluation.max_new_tokens=8", "evaluation.suites=[]"),  # asked further below
]
RL_SIZES = [
    *("data.pool_prompts=12", "reward.labels=8", "reward.samples_per_prompt=2", "reward.epochs=1"),
    *("rl.rounds=1", "rl.steps_per_round=1", "rl.prompts_per_step=4", "rl.samples_per_prompt=2"),
    *("rl.minibatch_size=8", "rl.microbatch_size=8", "rl.max_new_tokens=16", "rl.epochs=1"),
    *("rl.unverified_share=1", "rl.anchor_prompts=2", "targeting.samples_per_prompt=2", "targeting.candidates=8"),
    *("targeting.budget=12",),
]


SUITES = {
    "cerebrum-7b": ["reasoning"],
    "collective-cognition": ["truthfulqa", "gpt4all", "agieval"],
    "capybara": ["open-llm-v1"],
    "jackalope": ["open-llm-v1"],
    "mistral-orca": ["open-llm-v1", "agieval", "bbh", "gpt4all"],  # and mt-bench, where there is a judge
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_judged_by_what_its_card_reports(recipe: str) -> None:
    config = compose([f"experiment={recipe}"]).configs[0]
    assert config.evaluation.suites == SUITES[recipe]
    assert (recipe == "capybara") == bool(config.check.against)
    other = compose([f"experiment={recipe}", "evaluation=bbh"]).configs[0]
    assert other.evaluation.suites == ["bbh"], "what the user chooses wins"


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few rows of every data set that a recipe names, and of every one that a suite asks."""
    root = tmp_path_factory.mktemp("mirror")
    write_recipes(root)
    write_suites(root)
    return root


def one(*overrides: str) -> Config:
    (config,) = compose(overrides).configs
    return config


def run(directory: Path, mirror: Path, recipe: str, *overrides: str) -> dict[str, Any]:
    data = ["data=gsm8k", "data.path=openai/gsm8k", "data.sft_prompts=8", "data.pool_prompts=16"]
    gsm8k = data if recipe == "cerebrum-7b" else []
    rl = RL_SIZES if any(text in ("stage=reward", "stage=rl", "stage=all") for text in overrides) else []
    given = [f"experiment={recipe}", f"data.mirror={mirror}", f"run.dir={directory}", *SIZES, *rl, *gsm8k, *overrides]
    return trlhf.run(given).summary


# ---- composition and plan ----


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_composes_with_its_real_names_and_plans(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("sft", "reward", "rl", "eval", "all"):
        assert one(f"experiment={recipe}", f"stage={stage}").model.name == "mistralai/Mistral-7B-v0.1"
    assert trlhf.run([f"experiment={recipe}", "dry_run=true"]).summary == {}
    plan = " ".join(capsys.readouterr().out.split())
    assert f"plan (dry_run=true: nothing is started) experiment {recipe}" in plan
    assert "mistralai/Mistral-7B-v0.1, bfloat16" in plan and "Memory estimate in GiB" in plan
    for source in one(f"experiment={recipe}").data.mixture.values():
        assert source.path in plan


def test_each_recipe_is_what_its_card_says() -> None:
    made = {recipe: one(f"experiment={recipe}") for recipe in RECIPES}
    assert [made[recipe].template.name for recipe in RECIPES] == [
        *("cerebrum", "user-assistant", "user-assistant", "chatml", "chatml")
    ]
    assert made["cerebrum-7b"].data.sft_prompts < 5000
    cognition = made["collective-cognition"]
    assert (cognition.model.quantization, cognition.model.lora.enabled) == ("nf4", True)
    assert cognition.data.mixture["chats"].cap == 100
    for recipe in ("capybara", *CHATML):
        config = made[recipe]
        assert not config.model.lora.enabled and config.model.max_length == 8192
        assert config.sft.multi_turn == "whole" and config.sft.epochs == (3 if recipe == "capybara" else 4)
    for recipe in CHATML:
        assert made[recipe].sft.packing and made[recipe].template.eos_token == "<|im_end|>"
    assert made["jackalope"].data.mixture["metamath"].weight == 0.25


# ---- end to end ----


@pytest.fixture(scope="module")
def trained(mirror: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of each recipe's sft stage, made when they are first asked for."""
    return {recipe: tmp_path_factory.mktemp(recipe) / "run" for recipe in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_runs_end_to_end_on_small_local_data(recipe: str, mirror: Path, trained: dict[str, Path]) -> None:
    directory = trained[recipe]
    qlora = QLORA.get(recipe, [])
    run(directory, mirror, recipe, "stage=sft", *qlora)
    summary = run(directory, mirror, recipe, "stage=eval", *qlora)
    assert list(summary["accuracy"]) == ["base", "sft"] and summary["accuracy"]["sft"]["n"] == 2
    assert (directory / "sft" / "adapter").exists() is bool(qlora)
    metrics = json.loads((directory / "sft" / "metrics.json").read_text())
    assert metrics["rows"]["kept"] == metrics["demonstrations"] == sum(DEMONSTRATIONS[recipe].values())
    report = json.loads((directory / "data.json").read_text())
    made = {name.partition(":")[0]: entry.get("demonstrations") for name, entry in report.items()}
    assert DEMONSTRATIONS[recipe].items() <= made.items() or recipe == "cerebrum-7b"

    folder = directory / "sft" / "model"
    run(directory, mirror, recipe, "stage=card", *qlora)
    told = ModelCard.load(folder / "README.md").data
    assert told.base_model == "micro" and told.eval_results[0].metric_args["n"] == 2
    named = {source.path.partition(":")[0] for source in one(f"experiment={recipe}").data.mixture.values()}
    assert set(told.datasets) == (named or {"openai/gsm8k"})
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    config = one(f"experiment={recipe}")
    assert tokenizer.eos_token == (config.template.eos_token or "</s>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id < model.config.vocab_size
    chat = [{"role": "user", "content": "Are you conscious?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(ids["input_ids"][0]).endswith(PROMPT_ENDS[config.template.name])
    assert model.generate(**ids, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]


DEMONSTRATIONS: dict[str, dict[str, int]] = {
    "cerebrum-7b": {"train.jsonl (SFT)": 8},
    "collective-cognition": {"chats": 12},
    "capybara": {"capybara": 4, "lesswrong": 4, "dove": 4, "camel": 4},
    "jackalope": {"slimorca": 8, "pippa": 3, "metamath": 2, "riddles": 2, "lesswrong": 4, "dove": 4, "camel": 4},
    "mistral-orca": {"openorca": 8},
}
PROMPT_ENDS = {
    "cerebrum": "\nUser: Are you conscious?\nAI:",
    "user-assistant": "USER: Are you conscious?\nASSISTANT:",
    "chatml": "<|im_start|>user\nAre you conscious?<|im_end|>\n<|im_start|>assistant\n",
}


def test_what_was_left_out_has_its_reason(mirror: Path, trained: dict[str, Path]) -> None:
    if not all((trained[recipe] / "data.json").exists() for recipe in CHATML):
        pytest.skip("the runs above were not made")
    report = json.loads((trained["jackalope"] / "data.json").read_text())
    pippa, metamath = (next(v for name, v in report.items() if name.startswith(key)) for key in ("pippa", "metamath"))
    assert {reason: left["count"] for reason, left in metamath["left_out"].items()} == {
        "weight=0.25; drawn at random": 6
    }
    assert [left["count"] for left in pippa["left_out"].values()] == [1], "nobody answered in the shortest"
    orca = json.loads((trained["mistral-orca"] / "data.json").read_text())
    (left,) = next(iter(orca.values()))["left_out"].values()
    assert left == {"count": 1, "places": ["1M-GPT4-Augmented.parquet row 9"]}


@pytest.mark.parametrize("recipe", RECIPES)
def test_its_suites_run_on_its_model(
    recipe: str, mirror: Path, trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tasks of them, the first question of each, from a mirror; responses are cut short, nobody judges."""
    from lm_eval.models.huggingface import HFLM

    from trlhf.evaluation.judge import Judge

    if not (trained[recipe] / "sft" / "done").exists():
        pytest.skip("the runs above were not made")
    model = shutil.copytree(trained[recipe] / "sft" / "model", tmp_path / "model")
    values = json.loads((model / "config.json").read_text())  # BIG-Bench Hard leaves 1,024 tokens for a response
    (model / "config.json").write_text(json.dumps({**values, "max_position_embeddings": 4096}))
    generate = HFLM._model_generate
    monkeypatch.setattr(
        HFLM,
        "_model_generate",
        lambda self, context, max_length, **rest: generate(self, context, context.shape[1] + 4, **rest),
    )
    monkeypatch.setattr(Judge, "_complete", lambda self, request: "[[7]]")
    suites = SUITES[recipe] + (["mt-bench"] if recipe == "mistral-orca" else [])
    judge = ["evaluation.judge.url=http://nowhere.invalid/v1", "evaluation.judge.model=judge"]
    summary = run(
        *(tmp_path / "run", mirror, recipe, "stage=eval", f"evaluation.model={model}", f"evaluation.suites={suites}"),
        *("evaluation.limit=1", "evaluation.batch_size=4", "evaluation.mt_bench.max_new_tokens=4", *judge),
    )
    assert list(summary["suites"]) == suites
    for suite in suites:
        tasks = [task.name for task in EVERY[suite].tasks]
        found = summary["suites"][suite]
        assert list(found) == [*tasks, "average"] if EVERY[suite].average else tasks
        assert all(models["model"]["n"] > 0 for models in found.values())


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe not in CHATML])
def test_it_goes_on_with_labels_and_rl(recipe: str, mirror: Path, trained: dict[str, Path]) -> None:
    directory = trained[recipe]
    if not (directory / "eval" / "done").exists():
        pytest.skip("the runs above were not made")
    for stage in ("reward", "rl", "eval", "card"):
        summary = run(directory, mirror, recipe, f"stage={stage}", *QLORA.get(recipe, []))
    assert list(summary["accuracy"]) == ["base", "sft", "rl"] and summary["labels"]["spent"] > 0
    told = ModelCard.load(directory / "rl" / "model" / "README.md").data
    assert {"openai/gsm8k"} <= set(told.datasets) and told.tags[-1] == "ppo"


@pytest.mark.parametrize("recipe", CHATML)
def test_a_chatml_recipe_goes_on_with_labels_and_rl(recipe: str, mirror: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    others = [name for name in one(f"experiment={recipe}").data.mixture if name not in ("slimorca", "openorca")]
    more = [
        *(f"data.mixture.{name}=null" for name in others),
        "sft.epochs=16",
        "sft.learning_rate=1e-2",
    ]  # until it gives answers
    for stage in ("sft", "reward", "rl", "eval"):
        summary = run(directory, mirror, recipe, f"stage={stage}", *more)
    assert list(summary["accuracy"]) == ["base", "sft", "rl"] and summary["labels"]["spent"] > 0
    tokenizer = AutoTokenizer.from_pretrained(directory / "rl" / "model")
    model = AutoModelForCausalLM.from_pretrained(directory / "rl" / "model")
    assert tokenizer.eos_token == "<|im_end|>" and model.config.vocab_size == len(tokenizer)
    sample = json.loads((directory / "rl" / "samples.jsonl").read_text().splitlines()[0])
    assert "<|im_start|>" not in json.dumps(sample["response"])[1:-1] or not sample.get("finished", True)
