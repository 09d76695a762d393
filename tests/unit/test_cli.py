"""The command line: every choice composes, every mistake is told, nothing is loaded or written before that."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import trlhf
from trlhf.__main__ import main
from trlhf.compose import compose
from trlhf.config import Config, build_config, plain
from trlhf.errors import ConfigError, UserError

CONF = Path(trlhf.__file__).parent / "conf"
STAGES = ["all", "check", "sft", "reward", "rl", "eval", "card"]
NEEDS = {
    "data=gsm8k": ["data.path=openai/gsm8k"],
    "data=file": ["data.sft=me/chats", "data.pool=me/prompts", "data.test=me/test"],
    "fit=gpu-24gb_mistral-7b": ["model=mistral-7b"],
    "evaluation=file": ["evaluation.file=me/test"],
    "evaluation=mt-bench": ["evaluation.judge.url=http://localhost:8000/v1", "evaluation.judge.model=judge"],
}
CHOICES = sorted(
    f"{folder.name}={path.stem}"
    for folder in CONF.iterdir()
    if folder.name != "hydra"
    for path in folder.glob("*.yaml")
)
Ran = list[Config]
Command = Callable[..., tuple[Any, str, str]]


def one(*overrides: str) -> Config:
    (config,) = compose(overrides).configs
    return config


def problems(*overrides: str, multirun: bool = False) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        compose(overrides, multirun=multirun)
    return caught.value.problems


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ran:
    """Run in an empty folder, with a pipeline that only notes what it was asked to do."""
    done: Ran = []

    def run_pipeline(config: Config) -> str:
        if config.seed == 13:
            raise UserError("seed 13 brings bad luck; choose another")
        if config.seed == 14:
            raise KeyboardInterrupt
        if config.seed == 15:
            raise ZeroDivisionError("a bug")
        done.append(config)
        return "result"

    fake = ModuleType("trlhf.pipeline")
    fake.run_pipeline = run_pipeline  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trlhf.pipeline", fake)
    monkeypatch.chdir(tmp_path)
    return done


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["trlhf", *arguments])
        status: Any = 0
        try:
            main()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_in_every_stage(choice: str) -> None:
    values = plain(one(choice, *NEEDS.get(choice, [])))
    for stage in STAGES:
        assert build_config({**values, "stage": stage}).stage == stage


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_composes(stage: str) -> None:
    values = {"stage": stage, "hardware": {"name": "cpu", "device": "cpu"}}
    assert one(f"stage={stage}", "hardware=cpu") == build_config(values)  # conf/ adds nothing else to config.py


def test_the_choices_are_all_there() -> None:
    assert len(CHOICES) >= 30


@pytest.mark.parametrize("experiment", [choice for choice in CHOICES if choice.startswith("experiment=")])
@pytest.mark.parametrize("algorithm", ["ppo", "dpo"])
def test_every_experiment_takes_the_micro_model(experiment: str, algorithm: str) -> None:
    big, small = one(experiment, f"rl={algorithm}"), one(experiment, "model=micro", f"rl={algorithm}")
    default = one(f"rl={algorithm}")
    assert big.model.name == "mistralai/Mistral-7B-v0.1" and big.model != default.model
    assert small.model == default.model and small.rl == default.rl  # nothing of the big model's size is left
    sizes = {"learning_rate": default.sft.learning_rate, "batch_size": 16, "microbatch_size": 16}
    assert sizes.items() <= vars(small.sft).items()
    assert small.targeting == big.targeting and small.data == big.data  # the recipe itself stays
    assert small.template == big.template and small.sft.multi_turn == big.sft.multi_turn
    assert small.rl.algorithm == algorithm and small.experiment == big.experiment


def test_experiment_with_real_data() -> None:
    config = one("experiment=cerebrum-7b", "data=gsm8k", "data.path=openai/gsm8k")
    assert (config.data.name, config.labeler.name, config.targeting.preference_share) == ("gsm8k", "exact", 0.0)
    assert (config.model.dtype, config.model.pad_token, config.reward.finetune) == ("bfloat16", "<unk>", "lora")
    assert config.targeting.budget == one("experiment=cerebrum-7b", "model=micro").targeting.budget == 500
    assert config.model.lora.enabled and one().targeting.budget == 250


@pytest.mark.parametrize("targeting", ["frontier", "uniform"])
def test_where_taste_is_not_modelled_fewer_steps_go_into_it(targeting: str) -> None:
    config, whole = one(f"targeting={targeting}"), one()
    assert (config.rl.open_share, whole.rl.open_share) == (0.1, 0.2)
    assert config.targeting.preference_share == whole.targeting.preference_share  # they can share a reward stage
    assert one(f"targeting={targeting}", "rl.open_share=0.5").rl.open_share == 0.5


def test_dpo_chooses_the_targeting_under_which_it_learned_most() -> None:
    def chosen(*overrides: str) -> tuple[str, str]:
        targeting = one(*overrides).targeting
        return targeting.acquisition, targeting.update

    assert chosen() == chosen("rl=dpo", "targeting=full") == ("v_optimal", "targeted")
    assert chosen("rl=dpo") == chosen("experiment=cerebrum-7b", "rl=dpo") == ("frontier", "frontier")
    assert chosen("targeting=uniform", "rl=dpo") == ("uniform", "plain")
    assert one("rl=dpo").rl.algorithm == "dpo"


def test_yaml_files_are_short() -> None:
    for path in CONF.rglob("*.yaml"):
        limit = 40 if path.parent.name == "help" else 25
        assert len(path.read_text().splitlines()) <= limit, path


def test_labeler_follows_the_data_unless_it_is_chosen() -> None:
    assert one().labeler.name == "simulated"
    assert one("labeler=exact").labeler.name == "exact"
    assert one("data=gsm8k", *NEEDS["data=gsm8k"]).labeler.name == "exact"


def test_an_unknown_key_is_refused_with_and_without_plus() -> None:
    expected = "rl.betta=1: there is no such key (a leading + does not make one); did you mean rl.beta?"
    for text in ("rl.betta=1", "+rl.betta=1", "++rl.betta=1"):
        assert problems(text) == (expected,)


def test_a_plus_before_a_known_key_does_no_harm() -> None:
    assert one("+rl.beta=0.3", "+experiment=cerebrum-7b").rl.beta == 0.3


def test_all_kinds_of_mistakes_in_one_message() -> None:
    found = problems("model=mini", "rl=dop", "foo=1", "seed=1,2", "x==", "targeting.budget=0", "~rl.zzz", "hydra.zzz=1")
    assert found == (
        "model=mini must be one of micro, mistral-7b, mistral-7b-full, mistral-7b-qlora; choose one, "
        "or give a name or path of your own as model.name=mini",
        "rl=dop must be one of dpo, ppo; did you mean dpo?",
        "seed=1,2: several values make several runs; add --multirun, or quote the value",
        "x==: cannot be read (extraneous input '='); write KEY=VALUE, with quotes around odd characters",
        "~rl.zzz: Could not delete from config. 'rl.zzz' does not exist.",
        "hydra.zzz=1: Could not override 'hydra.zzz'. To append to your config use +hydra.zzz=1",
        "targeting.budget=0 must be at least 1: without labels nothing can be learned; "
        "give the number of labels you can pay for",
        "foo=1: there is no such key (a leading + does not make one); "
        "the top level has stage, seed, dry_run, experiment, push",
    )


def test_a_template_of_ones_own_is_chosen_by_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("x")
    assert one(f"template={path}").template.name == one(f"template.name={path}").template.name == str(path)
    (found,) = problems("template=no.jinja")
    assert found.startswith("template.name=no.jinja is neither cerebrum, chatml, ")
    (found,) = problems("template=chatlm")
    assert found == "template=chatlm must be one of cerebrum, chatml, tokenizer, user-assistant; did you mean chatml?"


def test_chatml_brings_its_tokens() -> None:
    template = one("template=chatml").template
    assert (template.added_tokens, template.eos_token) == (["<|im_start|>", "<|im_end|>"], "<|im_end|>")
    assert one("template=cerebrum").template.added_tokens == []


def test_an_unknown_recipe_is_refused_with_the_nearest() -> None:
    (found,) = problems("experiment=jackelope")
    assert found.startswith("experiment=jackelope must be one of capybara, ") and found.endswith(
        "did you mean jackalope?"
    )
    (found,) = problems("experiment=jackalope", "data.mixture.slimorka.weight=2")
    assert found.startswith("data.mixture.slimorka.path is missing; ")
    assert found.endswith("or did you mean data.mixture.slimorca?")


def test_group_choices_that_are_no_names() -> None:
    (found,) = problems("sft={epochs: 1}")
    assert found.endswith("must be one of default; choose one; the values in the group are set as sft.KEY=VALUE")


def test_references_between_values() -> None:
    assert one("seed=3", "run.dir='runs/seed-${seed}'").run.dir == "runs/seed-3"
    (found,) = problems("run.dir=${sede}")
    assert found.startswith("run.dir: the reference in it cannot be resolved (Interpolation key 'sede' not found); ")


def test_every_job_of_a_sweep_is_checked() -> None:
    configs = compose(["seed=0,1", "rl=ppo,dpo"], multirun=True).configs
    assert [(config.seed, config.rl.algorithm) for config in configs] == [
        (0, "ppo"),
        (0, "dpo"),
        (1, "ppo"),
        (1, "dpo"),
    ]
    (found,) = problems("rl.microbatch_size=4", "rl.minibatch_size=64,60", "seed=range(0,2)", multirun=True)
    assert found.startswith("rl.minibatch_size=60 must divide")
    (found,) = problems("seed=1,2", "run.dir=x", multirun=True)
    assert found.startswith("run.dir=x is the same for 2 jobs; leave it out")
    assert len(compose(["seed=1,2", "run.dir='runs/${seed}'"], multirun=True).configs) == 2


def test_a_run_gets_its_config_and_hydra_leaves_no_trace(ran: Ran, command: Command, tmp_path: Path) -> None:
    assert command("rl=dpo", "+targeting.budget=100", "seed=5") == (0, "", "")
    assert [(c.rl.algorithm, c.targeting.budget, c.seed, c.run.dir) for c in ran] == [("dpo", 100, 5, None)]
    assert list(tmp_path.iterdir()) == []


def test_users_errors_are_one_message_and_status_2(ran: Ran, command: Command) -> None:
    assert command("seed=13") == (2, "", "trlhf: seed 13 brings bad luck; choose another\n")
    status, out, err = command("rl.betta=1", "seed=-1")
    assert (status, out) == (2, "")
    assert err.startswith("trlhf: configuration: 2 problems, nothing was started\n  - ")
    assert ran == []


def test_an_error_is_also_in_the_log_file(ran: Ran, command: Command, tmp_path: Path) -> None:
    from trlhf.console import record, setup_logging

    setup_logging(tmp_path)
    record("lost")
    setup_logging()
    assert "ERROR trlhf: lost" in (tmp_path / "trlhf.log").read_text()


def test_interruption_says_how_to_go_on(ran: Ran, command: Command) -> None:
    assert command("seed=14") == (130, "", "\ntrlhf: interrupted; the same command continues where it stopped\n")


def test_a_bug_keeps_its_traceback(ran: Ran, command: Command) -> None:
    with pytest.raises(ZeroDivisionError):
        command("seed=15")


def test_sweep_folders(ran: Ran, command: Command, tmp_path: Path) -> None:
    assert command("--multirun", "seed=1,2", "targeting=uniform,frontier")[0] == 0
    folders = [Path(str(config.run.dir)) for config in ran]
    assert [folder.name for folder in folders] == ["0", "1", "2", "3"]
    assert len({folder.parent for folder in folders}) == 1 and folders[0].parts[:2] == ("runs", "multirun")
    ran.clear()
    assert command("--multirun", "seed=1,2", "run.dir='mine/${seed}'")[0] == 0
    assert [config.run.dir for config in ran] == ["mine/1", "mine/2"]
    assert [item.name for item in tmp_path.iterdir()] == ["runs"]


def test_a_sweep_goes_on_after_a_failed_job(ran: Ran, command: Command) -> None:
    status, _, err = command("--multirun", "seed=1,13,2")
    assert status == 2 and [config.seed for config in ran] == [1, 2]
    assert "trlhf: job 1: seed 13 brings bad luck; choose another\n" in err
    assert err.endswith("trlhf: a job of this sweep failed; its message is above\n") and "Traceback" not in err


def test_a_folder_of_ones_own_yaml(ran: Ran, command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "short.yaml").write_text("# @package _global_\nrl: {rounds: 1}\n")
    assert command("--config-dir", "mine", "experiment=short", "seed=2")[0] == 0
    assert [(config.rl.rounds, config.seed) for config in ran] == [(1, 2)]
    status, _, err = command("--config-dir", "mine", "experiment=shorter")
    assert status == 2 and "shorter" in err
    assert command("--config-name", "x")[0] == 2


def test_help_is_what_hydra_would_print(command: Command) -> None:
    ours, hydras = command("--help"), command("--help", "seed=0")
    assert ours == hydras and "rl: dpo, ppo" in ours[1]


def test_help_version_and_cfg(ran: Ran, command: Command) -> None:
    status, out, _ = command("--help")
    assert status == 0 and "experiment: capybara, cerebrum-7b, " in out
    assert "python -m trlhf rl=dpo" in out and "run.dir" in out
    assert "$" not in out
    assert command("--version") == (0, f"trlhf {trlhf.__version__}\n", "")
    status, out, _ = command("--cfg", "job", "rl.beta=0.25")
    assert status == 0 and "  beta: 0.25\n" in out and ran == []


def test_library_function(ran: Ran) -> None:
    import trlhf.run

    assert trlhf.run(["seed=4"]) == "result"  # type: ignore[comparison-overlap]  # and not the submodule
    assert [config.seed for config in ran] == [4]
    with pytest.raises(trlhf.ConfigError, match=r"did you mean rl\.beta"):
        trlhf.run(["rl.betta=1"])


def test_public_names_load_lazily() -> None:
    assert set(trlhf.__all__) <= set(dir(trlhf))
    assert trlhf.UserError is UserError
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        trlhf.nothing  # noqa: B018


START = "import sys; sys.argv = ['trlhf', {argument!r}]\nfrom trlhf.__main__ import main\n"


@pytest.mark.parametrize(
    "code",
    [
        "import trlhf",
        START.format(argument="--help") + "try: main()\nexcept SystemExit: pass",
        START.format(argument="rl.betta=1") + "try: main()\nexcept SystemExit as end: assert end.code == 2",
    ],
)
def test_no_torch_before_a_run(code: str, tmp_path: Path) -> None:
    root = str(Path(trlhf.__file__).parents[1])
    check = "\nfor name in ('torch', 'transformers', 'datasets', 'numpy'): assert name not in sys.modules, name"
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{code}{check}"],
        check=True,
        cwd=tmp_path,
        capture_output=True,
    )
