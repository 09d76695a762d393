"""Every value is checked, and every problem is reported at once."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from trlhf.config import Config, build_config, check, plain
from trlhf.errors import ConfigError
from trlhf.hub import DATA as HUB_DATA
from trlhf.hub import NAME as HUB_NAME
from trlhf.schema import leaf_keys


def problems(values: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        build_config(values)
    return caught.value.problems


def test_defaults_are_free_of_contradictions() -> None:
    assert build_config({}) == Config()
    assert check(Config()) == []


def test_plain_and_build_are_inverse() -> None:
    config = build_config({"rl": {"beta": 0.5}, "model": {"lora": {"r": 4}}, "run": {"dir": "x"}})
    assert build_config(plain(config)) == config
    assert (config.rl.beta, config.model.lora.r, config.run.dir) == (0.5, 4, "x")


def test_config_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]


def test_whole_numbers_are_accepted_where_a_fraction_is_expected() -> None:
    beta = build_config({"rl": {"beta": 1}}).rl.beta
    assert isinstance(beta, float) and beta == 1.0


def test_all_problems_come_in_one_error() -> None:
    found = problems({"rl": {"betta": 1, "gamma": 2}, "targeting": {"budget": 0}, "stage": "sfft", "bar": 1})
    assert found == (
        "rl.betta=1: there is no such key (a leading + does not make one); did you mean rl.beta?",
        "rl.gamma=2 must be greater than 0 and at most 1; give a value in that range",
        "targeting.budget=0 must be at least 1: without labels nothing can be learned; "
        "give the number of labels you can pay for",
        "stage=sfft must be one of all, check, sft, reward, rl, eval, card; did you mean sft?",
        "bar=1: there is no such key (a leading + does not make one); "
        "the top level has stage, seed, dry_run, experiment, push",
    )


def test_error_text_counts_the_problems_and_says_nothing_was_started() -> None:
    with pytest.raises(ConfigError, match=r"configuration: 2 problems, nothing was started\n  - .*\n  - "):
        build_config({"seed": -1, "sede": 1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": 1.5}, "seed=1.5 must be a whole number; write it without quotes or point"),
        ({"seed": True}, "seed=true must be a whole number; write it without quotes or point"),
        ({"seed": "1"}, "seed=1 must be a whole number; write it without quotes or point"),
        ({"dry_run": 1}, "dry_run=1 must be true or false; write one of the two"),
        ({"rl": {"beta": "x"}}, "rl.beta=x must be a finite number; write it like 0.5 or 1e-5"),
        ({"rl": {"beta": float("nan")}}, "rl.beta=nan must be a finite number; write it like 0.5 or 1e-5"),
        ({"rl": {"kl_target": "x"}}, "rl.kl_target=x must be null or a finite number; write it like 0.5 or 1e-5"),
        ({"rl": {"kl_target": -1}}, "rl.kl_target=-1 must be greater than 0; give a value in that range"),
        ({"rl": {"dual_clip": 1}}, "rl.dual_clip=1 must be greater than 1; give a value in that range"),
        ({"reward": {"holdout": 1.0}}, "reward.holdout=1 must be greater than 0 and smaller than 1; give"),
        ({"run": {"dir": 7}}, "run.dir=7 must be null or a text; put it in quotes inside quotes, as in key=\"'123'\""),
        ({"run": {"dir": " "}}, "run.dir=  must be null or a text that is not empty; write null to leave it out"),
        ({"model": {"lora": {"target_modules": "q"}}}, "model.lora.target_modules=q must be a list of texts; write it"),
        ({"rl": 3}, "rl=3 must be a group of values; set the values in it, rl.…=…"),
        ({"rl": None}, "rl=null must be a group of values; set the values in it, rl.…=…"),
        ({"model": {"lora": {"rank": 3}}}, "model.lora.rank=3: there is no such key (a leading + does not make one); "),
        ({"beta": 3}, "beta=3: there is no such key (a leading + does not make one); did you mean rl.beta?"),
        ({"trainer": {"lr": 3}}, "trainer: there is no such key (a leading + does not make one); the top level has "),
        ({"labeler": {"noise": 0.5}}, "labeler.noise=0.5 must be at least 0 and smaller than 0.5; give a value in "),
    ],
)
def test_one_wrong_value(values: dict[str, Any], message: str) -> None:
    (found,) = problems(values)
    assert found.startswith(message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"rl": {"prompts_per_step": 8, "samples_per_prompt": 8, "minibatch_size": 6, "microbatch_size": 6}},
            "rl.minibatch_size=6 must divide rl.prompts_per_step*rl.samples_per_prompt=64; try 8",
        ),
        (
            {"rl": {"prompts_per_step": 12, "samples_per_prompt": 4, "minibatch_size": 6, "microbatch_size": 6}},
            "rl.minibatch_size=6 must be a multiple of rl.samples_per_prompt=4, since a step takes all the samples of "
            "a prompt; try 4 or 8",
        ),
        (
            {"rl": {"minibatch_size": 4, "microbatch_size": 4}},
            "rl.minibatch_size=4 must be a multiple of rl.samples_per_prompt=8, since a step takes all the samples of "
            "a prompt; try 8",
        ),
        (
            {"rl": {"advantage": "gae", "rounds": 1, "steps_per_round": 2}},
            "rl.value_warmup_steps=2 must be smaller than rl.rounds*rl.steps_per_round=2, or the policy never learns; ",
        ),
        (
            {"rl": {"minibatch_size": 64, "microbatch_size": 48}},
            "rl.microbatch_size=48 must divide rl.minibatch_size=64; try 32 or 64",
        ),
        (
            {"sft": {"batch_size": 16, "microbatch_size": 5}},
            "sft.microbatch_size=5 must divide sft.batch_size=16; try 4 or 8",
        ),
        (
            {"reward": {"batch_size": 16, "microbatch_size": 32}},
            "reward.microbatch_size=32 must divide reward.batch_size=16; try 16",
        ),
        (
            {"reward": {"labels": 64}, "targeting": {"budget": 40}},
            "reward.labels=64 must not exceed targeting.budget=40, which is for the whole run; "
            "lower reward.labels (a quarter would be 10) or raise targeting.budget",
        ),
        (
            {"data": {"name": "gsm8k"}, "labeler": {"name": "exact"}, "targeting": {"preference_share": 0}},
            "data.path is mis",
        ),
        (
            {"data": {"path": "openai/gsm8k"}},
            "data.path=openai/gsm8k is read only with data=gsm8k, but data.name=micro",
        ),
        (
            {"data": {"pool": "owner/name"}},
            "data.pool=owner/name is read only with data=file, not with data.name=micro",
        ),
        (
            {"data": {"name": "gsm8k", "path": "openai/gsm8k"}},
            "labeler.name=simulated knows only the embedded world, not data.name=gsm8k; use labeler=exact",
        ),
        ({"reward": {"labels": 0}}, "reward.labels=0 buys no labels and data.labels names none, but the reward model "),
        (
            {"labeler": {"name": "exact"}},
            "targeting.preference_share=0.3 asks for preferences, but labeler.name=exact can only judge final answers",
        ),
        (
            {"labeler": {"name": "exact", "position_bias": 0.1}, "targeting": {"preference_share": 0}},
            "labeler.position_bias=0.1 is about preferences, but labeler.name=exact gives none; ",
        ),
        (
            {"rl": {"samples_per_prompt": 1, "minibatch_size": 32, "microbatch_size": 32}},
            "rl.samples_per_prompt=1 leaves no other response to compare with, but rl.advantage=leave_one_out ",
        ),
        (
            {"rl": {"algorithm": "dpo", "samples_per_prompt": 1}},
            "rl.samples_per_prompt=1 makes no pair, but rl.algorithm=dpo learns from pairs; use at least 2",
        ),
        ({"targeting": {"candidates": 8}}, "targeting.candidates=8 must be at least rl.prompts_per_step="),
        ({"data": {"pool_prompts": 8}}, "data.pool_prompts=8 must be at least rl.prompts_per_step="),
        (
            {"evaluation": {"max_new_tokens": 2048}},
            "evaluation.max_new_tokens=2048 must be smaller than model.max_length=1024, which holds the prompt too; ",
        ),
        (
            {"rl": {"max_new_tokens": 1024}},
            "rl.max_new_tokens=1024 must be smaller than model.max_length=1024, which holds the prompt too; try 512",
        ),
        (
            {"template": {"name": "no.jinja"}},
            "template.name=no.jinja is neither cerebrum, chatml, user-assistant, tokenizer, nor a .jinja file that "
            "exists; give one",
        ),
        ({"template": {"name": "chatlm"}}, "template.name=chatlm is neither cerebrum, chatml, user-assistant, "),
        (
            {
                "model": {"quantization": "nf4", "lora": {"enabled": True}},
                "reward": {"finetune": "lora"},
                "template": {"added_tokens": ["<x>"]},
            },
            "template.added_tokens=[<x>] are rows that must be learned and kept, but model.quantization=nf4 loads the ",
        ),
        (
            {"model": {"lora": {"enabled": True}}, "reward": {"finetune": "full"}},
            "reward.finetune=full would train a second whole copy of the base, but model.lora.enabled=true keeps one ",
        ),
        (
            {"model": {"lora": {"enabled": True, "target_modules": []}}, "reward": {"finetune": "lora"}},
            "model.lora.target_modules=[] with model.lora.enabled=true would train nothing; name some layers",
        ),
        ({"model": {"name": "mistral"}}, "model.name=mistral is neither micro, nor a folder that exists, nor a hub"),
        ({"model": {"revision": "main"}}, "model.revision=main is for hub models, but model.name=micro is embedded; "),
        (
            {"model": {"attention": "flash_attention_2"}, "hardware": {"device": "cpu"}},
            "model.attention=flash_attention_2 needs a GPU, but hardware.device=cpu; use model.attention=sdpa",
        ),
        ({"rl": {"kl_coef": 0, "kl_target": 1}}, "rl.kl_target=1 adapts rl.kl_coef by factors, but rl.kl_coef=0 "),
        ({"rl": {"kl_target": 1, "kl_horizon": 50}}, "rl.kl_horizon=50 is so short that one step of "),
        ({"rl": {"anchor_prompts": 0}}, "rl.anchor_prompts=0 gives rl.anchor_coef="),
        ({"model": {"quantization": "nf4"}}, "model.quantization=nf4 keeps a base that cannot learn, but "),
        ({"rl": {"dual_clip": 1.1}}, "rl.dual_clip=1.1 must be greater than 1+rl.clip_range=1.2; try 3"),
    ],
)
def test_one_contradiction(values: dict[str, Any], message: str) -> None:
    (found,) = problems(values)
    assert found.startswith(message)


@pytest.mark.parametrize(
    ("stage", "missing"),
    [("all", ["sft", "pool", "test"]), ("sft", ["sft"]), ("reward", ["pool"]), ("rl", ["pool"]), ("eval", ["test"])],
)
def test_own_data_needs_the_files_of_its_stage(stage: str, missing: list[str]) -> None:
    base = {"stage": stage, "labeler": {"name": "exact"}, "targeting": {"preference_share": 0}}
    found = problems({**base, "data": {"name": "file"}})
    assert [text.split(" ")[0] for text in found] == [f"data.{key}" for key in missing]
    assert found[0].startswith(f"data.{missing[0]} is missing, but data.name=file needs it for stage={stage}; give ")


def test_a_data_file_must_exist_and_a_hub_name_may(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text("{}\n")
    base: dict[str, Any] = {"stage": "eval", "labeler": {"name": "exact"}, "targeting": {"preference_share": 0}}
    for good in (str(tmp_path / "test.jsonl"), "owner/name", "openai/gsm8k:main"):
        assert build_config({**base, "data": {"name": "file", "test": good}}).data.test == good
    for bad in (str(tmp_path / "no.jsonl"), "data/no.jsonl", "no", "data/no.jsonl:main", "owner/name:", "a/b:c:d"):
        (found,) = problems({**base, "data": {"name": "file", "test": bad}})
        assert found.startswith(f"data.test={bad} does not exist (seen from ")


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("x")
    assert build_config({"template": {"name": str(path)}}).template.name == str(path)


def test_a_refused_value_raises_no_second_complaint() -> None:
    assert len(problems({"rl": {"minibatch_size": 0}})) == 1  # not also "must divide"


def test_dpo_has_no_minibatches_to_divide() -> None:
    assert build_config({"rl": {"algorithm": "dpo", "minibatch_size": 7}}).rl.minibatch_size == 7


@pytest.mark.parametrize("rl", [{"algorithm": "dpo", "advantage": "gae"}, {"advantage": "leave_one_out"}])
def test_a_run_without_value_model_has_no_warmup_to_outlast(rl: dict[str, Any]) -> None:
    short = {**rl, "rounds": 1, "steps_per_round": 1, "value_warmup_steps": 2}
    assert build_config({"rl": short}).rl.value_warmup_steps == 2


def test_hub_names() -> None:
    assert HUB_NAME.fullmatch("mistralai/Mistral-7B-v0.1")
    assert HUB_DATA.fullmatch("openai/gsm8k:main") and HUB_DATA.fullmatch("openai/gsm8k")
    (found,) = problems({"model": {"name": "mistralai/Mistral-7B-v0.1:main"}})  # a model has no configurations
    assert found.startswith("model.name=mistralai/Mistral-7B-v0.1:main is neither micro")
    assert not HUB_NAME.fullmatch("../data/gsm8k") and not HUB_NAME.fullmatch("/data/x") and not HUB_NAME.fullmatch("a")


def test_every_value_is_a_leaf() -> None:
    keys = set(leaf_keys(Config))
    assert {"stage", "run.dir", "model.lora.r", "rl.minibatch_size", "targeting.budget"} <= keys
    assert "model.lora" not in keys
