"""The model card: a header that the hub's library reads back, figures that are the run's, the same card each time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import trlhf
from trlhf.card.command import overrides_of
from trlhf.card.facts import read_facts
from trlhf.card.header import test_set as evaluated_on
from trlhf.card.write import write_cards
from trlhf.compose import compose
from trlhf.config import Config, build_config, plain
from trlhf.errors import ConfigError, UserError
from trlhf.labelers.exact import ExactVerifier
from trlhf.ledger import Ledger
from trlhf.models import MICRO_BASE
from trlhf.run import RunDirectory
from trlhf.types import Prompt, Question

RATE = {"value": 0.8366666, "low": 0.79, "high": 0.874, "n": 300}
EXACT = {"labeler": {"name": "exact"}, "targeting": {"preference_share": 0.0}}
BEFORE = {"value": 0.5566666, "low": 0.5001, "high": 0.6118, "n": 300}


def measured(accuracy: dict[str, Any], **kinds: float) -> dict[str, Any]:
    by_kind = {kind: {"value": value, "low": 0.2, "high": 0.95, "n": 25} for kind, value in kinds.items()}
    return {"accuracy": accuracy, "by_kind": by_kind, "unfinished": 0.02}


def finish(run: RunDirectory, config: Config, stage: str, metrics: dict[str, Any]) -> None:
    (run.path / stage).mkdir(parents=True, exist_ok=True)
    (run.path / stage / "config.yaml").write_text(yaml.safe_dump(plain(config)))
    run.stage(stage).complete(metrics)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    """A folder as a run with DPO leaves it, with the embedded base in place of what it learned."""
    config = compose(["rl=dpo", "seed=3", "targeting.budget=100"]).configs[0]
    made = RunDirectory(tmp_path / "run")
    finish(made, config, "sft", {"demonstrations": 600, "response_tokens": 31234})
    finish(made, config, "reward", {})
    for stage in ("sft", "rl"):
        shutil.copytree(MICRO_BASE, made.path / stage / "model")
    finish(made, config, "rl", {"labels": {"budget": 100.0, "spent": 3.0}, "stopped": None})
    models = {
        "base": measured({**BEFORE, "value": 0.01}, share=0.0),
        "sft": measured(BEFORE, share=0.5, shop=0.9),
        "rl": measured(RATE, share=0.9, shop=0.88),
    }
    win = {"value": 0.6, "low": 0.5, "high": 0.7}
    paired = {
        "base→sft": {"mcnemar": {"gained": 170, "lost": 3, "p": 1e-30}},
        "sft→rl": {"mcnemar": {"gained": 90, "lost": 6, "p": 3e-20}, "win_rate": win},
    }
    finish(
        made, config, "eval", {"models": models, "paired": paired, "too_long": 0, "made": {"rl": made.stage("rl").made}}
    )
    rows = [
        {"prompt": "What is 2 + 2?", "response": "5", "correct": False, "finished": True},
        {"prompt": "What is 2 + 3?", "response": "Plan: add. The answer is 5.", "correct": True, "finished": True},
    ]
    made.stage("eval").write_jsonl("samples_rl.jsonl", rows)
    made.update_summary({"versions": {"python": "3.11", "trlhf": "0.1.0"}, "commits": {"sft": "abc", "rl": "abc"}})
    prompts = [Prompt(str(i), ({"role": "user", "content": f"{i}?"},)) for i in range(3)]
    with Ledger(made.ledger, 100) as ledger:
        asked = [Question("verdict", prompt, ("The answer is 1.",), "1") for prompt in prompts]
        ledger.ask(asked, ExactVerifier({"0": "1", "1": "2", "2": "1"}))
    yield made
    made.close()


def card(run: RunDirectory, *overrides: str) -> ModelCard:
    write_cards(compose([f"run.dir={run.path}", "stage=card", *overrides]).configs[0], run)
    return ModelCard.load(run.path / "rl/model/README.md")


def test_the_header_is_read_back_as_it_was_meant(run: RunDirectory) -> None:
    data = card(run, "card.name=me/clever", "card.datasets=[me/chats]", "card.license=mit").data
    assert (data.base_model, data.license, data.language) == ("micro", "mit", ["en"])
    assert (data.datasets, data.library_name, data.pipeline_tag) == (["me/chats"], "transformers", "text-generation")
    assert data.model_name == "me/clever" and "dpo" in data.tags
    (result,) = data.eval_results
    assert (result.dataset_type, result.dataset_split, result.task_type) == (
        *("trlhf/embedded-world", "test"),
        "text-generation",
    )
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.8367)
    assert result.metric_args == {"n": 300, "low": 0.79, "high": 0.874, "confidence": 0.95, "interval": "wilson"}


def test_the_text_has_the_runs_own_figures(run: RunDirectory) -> None:
    text = card(run).text
    assert "reasoning prompts of trlhf's embedded world: **83.7%** [79.0%, 87.4%]." in text
    assert "| rl | 83.7% | 79.0% to 87.4% | 300 |" in text and "| sft | 55.7% | 50.0% to 61.2% | 300 |" in text
    assert "sft to rl: 90 newly right, 6 newly wrong (McNemar's exact p = 3e-20)." in text
    assert "On open prompts rl wins 60% [50%, 70%] against sft" in text
    assert "| share | 0.0% | 50.0% | 90.0% | 20.0% to 95.0% | 25 |" in text
    assert "| shop | – | 90.0% | 88.0% | 20.0% to 95.0% | 25 |" in text
    assert "| demonstrations (the embedded world) | 600 |" in text and "| their response tokens | 31,234 |" in text
    assert "| labels bought, of the budget | 3 of 100 |" in text
    assert "| verdict: right | 2 |" in text and "| verdict: wrong | 1 |" in text
    assert "Commit of trlhf: abc. " in text and "python 3.11" in text
    assert "python -m trlhf seed=3" in text and "rl.algorithm=dpo" in text
    assert "Not checked: `python -m trlhf stage=check run.dir=…`" in text


def test_the_prompt_is_as_the_model_reads_it(run: RunDirectory) -> None:
    text = card(run).text
    assert "to the user's questions.\nUser: What is 2 + 3?\nAI:\n````" in text  # the first that was right
    assert "````text\nPlan: add. The answer is 5.\n````" in text and "ends in `</s>`" in text


def test_limitations_are_those_of_the_run(run: RunDirectory) -> None:
    text = card(run).text.partition("## Limitations")[2]
    for told in (
        "0.9 million parameters",
        "Its labels come from a simulated person, not from people.",
        "No preferences were bought: taste was not trained.",
        "in one run of one seed (3)",
        "300 prompts leave an interval of 8.4 points",
        "2.0% of its responses did not end within 160 tokens.",
        "Less right than after SFT: shop (90% to 88%, n = 25).",
        "Nothing was trained or tested for safety",
    ):
        assert told in text
    metrics = {"labels": {"budget": 100.0, "spent": 3.0}, "stopped": "the KL was 60"}
    (run.path / "rl" / "metrics.json").write_text(json.dumps(metrics))
    assert "- The RL stage ended early: the KL was 60." in card(run).text


def test_contamination_is_told(run: RunDirectory) -> None:
    levels = {str(level): {"items": level - 97, "rows": 1} for level in (100, 99, 98, 97)}
    ngrams = {"items_any": 7, "items": 5, "rows": 5, "items_too_short": 0}
    one = {"items": 400, "levels": levels, "ngrams": ngrams, "rows": 6}
    metrics = {
        "offending": {"sft": 5, "pool": 1},
        "sets": {"/far/away/suite.jsonl": one, "openai/gsm8k:main": one},
        "ngram": 13,
        "overlap": 0.7,
    }
    finish(run, Config(), "check", metrics)
    text = card(run).text
    assert "| suite.jsonl | 400 | 3 | 2 | 1 | 0 | 7 | 5 | 6 |\n| openai/gsm8k:main | 400 |" in text
    assert "any 13-gram | 70% of them | training rows |" in text and "/far/away" not in text
    assert (
        "against 2 evaluation sets: edit similarity, and 13-grams. 6 training rows are too close; they were kept."
        in text
    )


def test_the_same_run_has_the_same_card_and_it_is_not_written_twice(run: RunDirectory) -> None:
    before = card(run)
    path = run.path / "rl/model/README.md"
    made, ledger = path.stat().st_mtime_ns, run.ledger.stat().st_mtime_ns
    run.update_summary({"seconds": {"rl": 12.5}})  # how long it took is not in it
    assert card(run).content == before.content
    assert path.stat().st_mtime_ns == made and run.ledger.stat().st_mtime_ns == ledger
    assert str(run.path) not in before.content
    path.write_text("mine")
    assert card(run).content == before.content


def test_before_rl_and_before_eval_there_is_less_to_tell(run: RunDirectory) -> None:
    for stage in ("rl", "eval", "reward"):
        shutil.rmtree(run.path / stage)
    write_cards(compose([f"run.dir={run.path}", "stage=card"]).configs[0], run)
    told = ModelCard.load(run.path / "sft/model/README.md")
    assert told.data.get("model-index") is None and told.data.get("eval_results") is None
    assert "It has not been evaluated." in told.text and "Not evaluated: `python -m trlhf stage=eval" in told.text
    assert "It imitates demonstrations only" in told.text and "labels bought" not in told.text
    assert told.data.model_name == "micro-sft"


def test_a_model_made_anew_does_not_wear_the_figures_of_the_old(run: RunDirectory) -> None:
    (run.path / "rl" / "done").write_text("2000-01-01T00:00:00\n")
    told = card(run)
    assert told.data.eval_results is None and "It has not been evaluated." in told.text


def test_a_licence_that_nobody_named_is_not_invented(run: RunDirectory) -> None:
    for stage in ("sft", "rl"):
        values = yaml.safe_load((run.path / stage / "config.yaml").read_text())
        values["model"]["name"] = "mistralai/Mistral-7B-v0.1"
        (run.path / stage / "config.yaml").write_text(yaml.safe_dump(values))
    told = card(run)
    assert told.data.license is None and "- No licence is stated here; the base and the data have theirs." in told.text
    assert told.data.base_model == "mistralai/Mistral-7B-v0.1" and told.data.model_name == "Mistral-7B-v0.1-dpo"
    assert "No licence" not in card(run, "card.license=mit").text


def test_an_adapter_has_a_card_of_its_own(run: RunDirectory) -> None:
    (run.path / "rl" / "adapter").mkdir()
    whole = card(run)
    adapter = ModelCard.load(run.path / "rl/adapter/README.md")
    assert (adapter.data.library_name, whole.data.library_name) == ("peft", "transformers")
    assert 'place = "adapter"  # this folder\nmodel = AutoPeftModelForCausalLM.from_pretrained(place, ' in adapter.text
    card(run, "push=me/clever")
    pushed = ModelCard.load(run.path / "rl/adapter/README.md")
    assert (
        'place = snapshot_download("me/clever") + "/adapter"\n' in pushed.text and pushed.data.model_name == "me/clever"
    )
    assert "AutoPeftModelForCausalLM" in adapter.text and "AutoPeftModelForCausalLM" not in whole.text


def suite_entry(value: float, shots: int, metric: str = "acc_norm", **more: Any) -> dict[str, Any]:
    numbers = {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 9, "metric": metric, "shots": shots}
    return {**numbers, "protocol": {"harness": "lm-eval 0.4.13", "metric": metric, "shots": shots}, **more}


def test_suites_are_results_too_and_are_read_back(run: RunDirectory) -> None:
    metrics = run.stage("eval").metrics()
    metrics["suites"] = {
        "agieval": {
            "agieval_sat_en": {"sft": suite_entry(0.5, 0), "rl": suite_entry(0.23456, 0, at_chance=True)},
            "average": {"rl": suite_entry(0.3, 0, "mean of acc_norm")},
        },
        "reasoning": {"gsm8k maj@8": {"rl": suite_entry(0.5, 0, "accuracy")}, "gsm8k": {"base": suite_entry(0.1, 0)}},
        "mt-bench": {"mt-bench": {"rl": {**suite_entry(0.0, 0, "rating"), "value": None, "low": None, "high": None}}},
    }
    run.stage("eval").complete(metrics)
    told = card(run)
    held_out, agieval, votes = told.data.eval_results
    assert held_out.dataset_type == "trlhf/embedded-world"
    assert (agieval.dataset_type, agieval.metric_type) == ("hails/agieval-sat-en", "acc_norm")
    assert agieval.metric_value == 0.2346
    assert agieval.metric_args["num_few_shot"] == 0 and agieval.metric_args["suite"] == "agieval"
    assert (votes.dataset_type, votes.metric_name) == ("openai/gsm8k", "gsm8k maj@8 (accuracy)")
    rows = [line for line in told.text.splitlines() if line.startswith(("| agieval", "| reasoning", "| mt-bench"))]
    assert rows == [
        "| agieval | agieval_sat_en, acc_norm | 0 | 23.5 † | 13.5 to 33.5 | 9 |",
        "| agieval | average, mean of acc_norm | 0 | 30.0 | 20.0 to 40.0 | 9 |",
        "| reasoning | gsm8k maj@8, accuracy | 0 | 50.0 | 40.0 to 60.0 | 9 |",
    ]
    where = "trlhf's embedded world, greedy and zero-shot, and the suites agieval, reasoning"
    assert f"Measured on {where} alone" in told.text


def test_a_recipes_card_names_its_data_sets_and_what_each_gave(run: RunDirectory) -> None:
    config = compose(["experiment=jackalope", "data.mixture.pippa=null", "data.mixture.mine.path=me/mine"]).configs[0]
    for stage in ("rl", "eval", "reward"):
        shutil.rmtree(run.path / stage)
    finish(run, config, "sft", {"demonstrations": 600, "response_tokens": 31234})
    (run.path / "data.json").write_text(json.dumps({"slimorca: Open-Orca/SlimOrca": {"read": 9, "kept": 8}}))
    write_cards(compose([f"run.dir={run.path}", "stage=card"]).configs[0], run)
    told = ModelCard.load(run.path / "sft/model/README.md")
    names = [source.path.partition(":")[0] for source in config.data.mixture.values()]
    assert sorted(told.data.datasets) == sorted(names) and "me/mine" in names and "openai/gsm8k" not in names
    assert "| chats of Open-Orca/SlimOrca | 8 of 9 rows |" in told.text
    assert "| demonstrations (all of them) | 600 |" in told.text
    assert "after supervised fine-tuning by the recipe `jackalope`, made with" in told.text
    (command,) = (line for line in told.text.splitlines() if line.startswith("python -m trlhf experiment=jackalope "))
    assert {"data.mixture.pippa=null", "data.mixture.mine.path=me/mine"} == set(command.split()[4:])
    assert "chain of thought" not in told.text and told.data.tags == ["trlhf", "sft"]


def test_a_run_without_a_model_has_no_card(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sft/model is missing; make it first with: python -m trlhf stage=all"):
        read_facts(RunDirectory(tmp_path))
    with pytest.raises(UserError, match=r"run.dir is missing: stage=card tells of a run that is there; give run.dir="):
        trlhf.run(["stage=card"])


def test_stage_card_leaves_the_rest_of_the_run_alone(run: RunDirectory) -> None:
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    trlhf.run([f"run.dir={run.path}", "stage=card"])
    after = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    new = {path.relative_to(run.path).as_posix() for path in after.keys() - before.keys()}
    assert new == {"rl/model/README.md", "trlhf.log", ".lock"}
    assert {path: after[path] for path in before} == before


# ---- the command ----


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["rl=dpo", "seed=3", "labeler.noise=0.25", "rl.stop_rules=[]", "rl.max_kl=null"],
        ["experiment=cerebrum-7b", "data=gsm8k", "data.path=openai/gsm8k:main", "rl.learning_rate=3e-6"],
        ["experiment=cerebrum-7b", "model=micro", "template.system='It\\'s \"mine\", he said: a=b, [c] {d} 5%'"],
        ["experiment=jackalope", "data.mixture.pippa=null", "data.mixture.mine={path: me/mine, weight: 2}"],
        ["data=file", "stage=sft", "data.mixture.a.path=me/mine", "data.filters.languages=[en]"],
        ["template.system='null'", "model.lora.enabled=true", "rl.stop_rules=[anchors_fell,frontier_used_up]"],
    ],
)
def test_the_command_makes_the_same_configuration(overrides: list[str]) -> None:
    config = compose(overrides).configs[0]
    again = compose(overrides_of(config)).configs[0]
    assert {**plain(again), "experiment": None} == {**plain(config), "experiment": None}
    assert len(overrides_of(config)) <= len(overrides) + 20


def test_the_command_is_short_where_a_recipe_has_a_name() -> None:
    assert overrides_of(compose(["experiment=cerebrum-7b", "data.sft_prompts=7"]).configs[0]) == [
        *("experiment=cerebrum-7b", "data.sft_prompts=7")
    ]


def test_the_command_names_no_folder(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("{}")
    config = build_config({"data": {"name": "file", "sft": str(tmp_path / "chats.jsonl")}, "stage": "sft", **EXACT})
    assert "data.sft=chats.jsonl" in overrides_of(config, public=True)
    assert f"data.sft={tmp_path}/chats.jsonl" in overrides_of(config)


def test_sets_are_named_without_their_folders(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("{}")
    for given, expected in (
        (str(path), ("mine", "mine.jsonl", "test")),
        ("openai/gsm8k:main", ("openai/gsm8k", "openai/gsm8k:main", "test")),
    ):
        config = build_config({"data": {"name": "file", "test": given}, "stage": "eval", **EXACT})
        assert evaluated_on(config) == expected


def test_a_push_that_cannot_be_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="push=model is no repository on the hub; give push=OWNER/NAME"):
        build_config({"push": "model"})
    with pytest.raises(ConfigError, match="push=me/model uploads a finished model with its card, which stage=sft does"):
        build_config({"push": "me/model", "stage": "sft"})
    assert json.dumps(plain(build_config({"push": "me/model", "stage": "card"})))
