"""Values that are fine alone and contradict each other. No torch here."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trlhf.checks_mixture import mixture_problems
from trlhf.config import LABEL_RULES, UPDATE_RULES
from trlhf.contamination.published import KNOWN
from trlhf.evaluation.checks import evaluation_problems
from trlhf.hardware_checks import hardware_problems
from trlhf.hub import DATA as HUB_DATA
from trlhf.hub import NAME as HUB_NAME
from trlhf.hub import exists_or_on_hub
from trlhf.schema import Problem, show
from trlhf.tracking import is_missing

if TYPE_CHECKING:
    from trlhf.config import Config, DataConfig, RlConfig

OWN_TEST = "test"  # in check.against: the run's own held-out prompts
SOLUTIONS = "example_model_solutions.jsonl"  # of GSM8K: real models' solutions, marked right or wrong
TEMPLATES = Path(__file__).parent / "sft" / "chat_templates"


def contradictions(config: Config) -> Iterator[Problem]:
    """Yield every contradiction in a configuration whose single values are in range."""
    yield from _run(config)
    yield from _batches(config)
    yield from _model(config)
    yield from hardware_problems(config)
    yield from _template(config)
    yield from _data(config)
    yield from _contamination(config)
    yield from mixture_problems(config.data)
    yield from _push(config)
    yield from _labels(config)
    yield from _rl(config)
    yield from _rules("rl.stop_rules", config.rl.stop_rules, UPDATE_RULES)
    yield from _rules("targeting.stop_rules", config.targeting.stop_rules, LABEL_RULES)
    yield from evaluation_problems(config)


def _rules(key: str, chosen: Sequence[str], known: Sequence[str]) -> Iterator[Problem]:
    for name in chosen:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}, or write [] for none"
            yield Problem((key,), f"{key}=[{','.join(chosen)}]: there is no rule {name}; {remedy}")


def _run(config: Config) -> Iterator[Problem]:
    tracker = config.run.tracker
    if is_missing(tracker):
        yield Problem(
            ("run.tracker",),
            f"run.tracker={tracker} needs the package {tracker}, which is not installed; "
            "pip install 'trlhf[tracking]', or leave run.tracker out",
        )


def _batches(config: Config) -> Iterator[Problem]:
    """Rollout ⊃ minibatch ⊃ microbatch: indivisible sizes would drop or double responses."""
    rl = config.rl
    if rl.algorithm == "ppo":
        rollout_keys = ("rl.prompts_per_step", "rl.samples_per_prompt")
        rollout = rl.prompts_per_step * rl.samples_per_prompt
        yield from _divides("rl.minibatch_size", rl.minibatch_size, rollout_keys, rollout, rl.samples_per_prompt)
        if rollout % rl.minibatch_size == 0 and rl.minibatch_size % rl.samples_per_prompt != 0:
            yield Problem(
                ("rl.minibatch_size", "rl.samples_per_prompt"),
                f"rl.minibatch_size={rl.minibatch_size} must be a multiple of "
                f"rl.samples_per_prompt={rl.samples_per_prompt}, since a step takes all the samples of a prompt; "
                f"try {_nearest(rl.minibatch_size, rollout, rl.samples_per_prompt)}",
            )
        yield from _divides("rl.microbatch_size", rl.microbatch_size, ("rl.minibatch_size",), rl.minibatch_size)
    sft, reward = config.sft, config.reward
    yield from _divides("sft.microbatch_size", sft.microbatch_size, ("sft.batch_size",), sft.batch_size)
    yield from _divides("reward.microbatch_size", reward.microbatch_size, ("reward.batch_size",), reward.batch_size)


def _divides(key: str, part: int, whole_keys: tuple[str, ...], whole: int, unit: int = 1) -> Iterator[Problem]:
    if whole % part == 0:
        return
    name = "*".join(whole_keys)
    yield Problem((key, *whole_keys), f"{key}={part} must divide {name}={whole}; try {_nearest(part, whole, unit)}")


def _nearest(part: int, whole: int, unit: int) -> str:
    """Return the multiples of ``unit`` next to ``part``, below and above, that divide ``whole``."""
    fitting = [number for number in range(unit, whole + 1, unit) if whole % number == 0]
    smaller = [number for number in fitting if number < part][-1:]
    larger = [number for number in fitting if number > part][:1]
    return " or ".join(str(number) for number in smaller + larger)


def _model(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.name != "micro" and not exists_or_on_hub(model.name):
        yield Problem(
            ("model.name",),
            f"model.name={model.name} is neither micro, nor a folder that exists, nor a hub name like owner/name; "
            "give one of the three",
        )
    if model.name == "micro" and model.revision is not None:
        yield Problem(
            ("model.name", "model.revision"),
            f"model.revision={model.revision} is for hub models, but model.name=micro is embedded; leave it out",
        )
    if model.lora.enabled and not model.lora.target_modules:
        yield Problem(
            ("model.lora.target_modules",),
            "model.lora.target_modules=[] with model.lora.enabled=true would train nothing; name some layers",
        )
    if model.quantization != "none" and not model.lora.enabled:
        yield Problem(
            ("model.quantization", "model.lora.enabled"),
            f"model.quantization={model.quantization} keeps a base that cannot learn, but model.lora.enabled=false "
            "would train it; add model.lora.enabled=true",
        )
    if model.lora.enabled and config.reward.finetune == "full":
        yield Problem(
            ("model.lora.enabled", "reward.finetune"),
            "reward.finetune=full would train a second whole copy of the base, but model.lora.enabled=true keeps one "
            "base with adapters; use reward.finetune=lora (or frozen), or model.lora.enabled=false",
        )
    for key, tokens in (
        ("evaluation.max_new_tokens", config.evaluation.max_new_tokens),
        ("rl.max_new_tokens", config.rl.max_new_tokens),
    ):
        if tokens >= model.max_length:
            yield Problem(
                (key, "model.max_length"),
                f"{key}={tokens} must be smaller than model.max_length={model.max_length}, which holds the prompt too; "
                f"try {model.max_length // 2}",
            )


def _template(config: Config) -> Iterator[Problem]:
    template = config.template
    name, known = template.name, [*sorted(path.stem for path in TEMPLATES.glob("*.jinja")), "tokenizer"]
    if name not in known and not (name.endswith(".jinja") and Path(name).is_file()):
        near = difflib.get_close_matches(name, known, n=1)
        yield Problem(
            ("template.name",),
            f"template.name={name} is neither {', '.join(known)}, nor a .jinja file that exists; "
            + (f"did you mean {near[0]}?" if near else "give one"),
        )
    if template.added_tokens and config.model.quantization != "none":
        yield Problem(
            ("template.added_tokens", "model.quantization"),
            f"template.added_tokens=[{','.join(template.added_tokens)}] are rows that must be learned and kept, but "
            f"model.quantization={config.model.quantization} loads the base without them in every stage; use "
            "model.quantization=none, a template without new tokens (template=user-assistant) or, where the tokenizer "
            "has them already, template.added_tokens=[]",
        )


def _data(config: Config) -> Iterator[Problem]:
    data, stage = config.data, config.stage
    files = {key: getattr(data, key) for key in ("sft", "pool", "test", "labels")}
    if data.name == "gsm8k" and data.path is None:
        yield Problem(
            ("data.name", "data.path"),
            "data.path is missing, but data.name=gsm8k reads train.jsonl and test.jsonl there; "
            "give data.path=FOLDER or data.path=openai/gsm8k",
        )
    if data.name != "gsm8k" and data.path is not None:
        yield Problem(
            ("data.name", "data.path"),
            f"data.path={data.path} is read only with data=gsm8k, but data.name={data.name}; add data=gsm8k"
            + (" or use data.sft, data.pool and data.test" if data.name == "file" else " or leave data.path out"),
        )
    needed = {"all": ("sft", "pool", "test"), "sft": ("sft",), "reward": ("pool",), "rl": ("pool",), "eval": ("test",)}
    for key in needed.get(stage, ()) if data.name == "file" else ():
        if files[key] is None and not (key == "sft" and data.mixture):
            yield Problem(
                ("data.name", f"data.{key}"),
                f"data.{key} is missing, but data.name=file needs it for stage={stage}; "
                f"give data.{key}=FILE (.jsonl, .json, .csv, .parquet, a folder or a hub name)",
            )
    for key, value in files.items():
        if value is not None and data.name != "file":
            yield Problem(
                ("data.name", f"data.{key}"),
                f"data.{key}={value} is read only with data=file, not with data.name={data.name}; "
                "add data=file or leave it out",
            )
    for key, value in {"path": data.path, **files}.items():
        if value is not None and not exists_or_on_hub(value, HUB_DATA):
            yield Problem(
                (f"data.{key}",),
                f"data.{key}={value} does not exist (seen from {Path.cwd()}), and is no hub name like owner/name; "
                "correct the path",
            )


def _contamination(config: Config) -> Iterator[Problem]:
    """What is compared with what, in ``stage=check`` or before the stages that learn."""
    data, against = config.data, config.check.against
    asked = "stage=check" if config.stage == "check" else "data.decontaminate=true"
    if config.stage != "check" and not data.decontaminate:
        return
    if data.name == "file" and data.sft is None and data.pool is None and data.labels is None:
        yield Problem(
            ("data.name", "data.sft", "data.pool", "data.labels"),
            f"data.sft, data.pool and data.labels are missing, but {asked} compares the training data of "
            "data.name=file; give at least one of them",
        )
    if data.name == "file" and data.test is None and OWN_TEST in (against or [OWN_TEST]):
        yield Problem(
            ("data.name", "data.test", "check.against"),
            f"data.test is missing, but {asked} compares the training data with it; give data.test=FILE, or "
            "check.against=[FILE,…] without 'test'",
        )
    for name in against:
        if name != OWN_TEST and name not in KNOWN and not exists_or_on_hub(name, HUB_DATA):
            near = difflib.get_close_matches(name, KNOWN, n=2, cutoff=0.6)
            yield Problem(
                ("check.against",),
                f"check.against=[{','.join(against)}]: {name} does not exist (seen from {Path.cwd()}), and is neither "
                f"'test' (the run's own test set), a suite ({', '.join(KNOWN)}) nor a hub name like owner/name; "
                + (f"did you mean {' or '.join(near)}?" if near else "correct the path"),
            )


def _push(config: Config) -> Iterator[Problem]:
    if config.push is None:
        return
    if not HUB_NAME.fullmatch(config.push):
        yield Problem(
            ("push",), f"push={config.push} is no repository on the hub; give push=OWNER/NAME, the owner being yourself"
        )
    if config.stage not in ("all", "card"):
        yield Problem(
            ("push", "stage"),
            f"push={config.push} uploads a finished model with its card, which stage={config.stage} does not write; "
            "use stage=card afterwards",
        )


def labels_come_with(data: DataConfig) -> bool:
    """Say whether a run's data bring labels of their own."""
    return data.labels is not None or (
        data.name == "gsm8k" and data.path is not None and (Path(data.path).expanduser() / SOLUTIONS).is_file()
    )


def _labels(config: Config) -> Iterator[Problem]:
    labeler, reward, targeting = config.labeler, config.reward, config.targeting
    free = labels_come_with(config.data)  # then the reward stage buys none
    if reward.labels > targeting.budget and not free:
        yield Problem(
            ("reward.labels", "targeting.budget"),
            f"reward.labels={reward.labels} must not exceed targeting.budget={targeting.budget}, which is for the "
            f"whole run; lower reward.labels (a quarter would be {max(1, targeting.budget // 4)}) or raise "
            "targeting.budget",
        )
    if reward.labels == 0 and not free:
        where = "data.labels names none" if config.data.name != "gsm8k" else f"data.path has no {SOLUTIONS}"
        yield Problem(
            ("reward.labels", "data.labels"),
            f"reward.labels=0 buys no labels and {where}, but the reward model needs some; raise reward.labels"
            + (" or give data.labels=FILE" if config.data.name != "gsm8k" else f" or add {SOLUTIONS}"),
        )
    if labeler.name == "simulated" and config.data.name != "micro":
        yield Problem(
            ("labeler.name", "data.name"),
            f"labeler.name=simulated knows only the embedded world, not data.name={config.data.name}; "
            "use labeler=exact",
        )
    if labeler.name == "exact" and targeting.preference_share > 0:
        yield Problem(
            ("labeler.name", "targeting.preference_share"),
            f"targeting.preference_share={show(targeting.preference_share)} asks for preferences, but "
            "labeler.name=exact can only judge final answers; use targeting.preference_share=0 (labeler=exact sets it) "
            "or labeler=simulated",
        )
    if labeler.name == "exact" and labeler.position_bias > 0:
        yield Problem(
            ("labeler.name", "labeler.position_bias"),
            f"labeler.position_bias={show(labeler.position_bias)} is about preferences, but labeler.name=exact gives "
            "none; leave it out or use labeler=simulated",
        )
    if targeting.candidates < config.rl.prompts_per_step:
        yield Problem(
            ("targeting.candidates", "rl.prompts_per_step"),
            f"targeting.candidates={targeting.candidates} must be at least "
            f"rl.prompts_per_step={config.rl.prompts_per_step}; raise the first or lower the second",
        )
    if 0 < config.data.pool_prompts < config.rl.prompts_per_step:
        yield Problem(
            ("data.pool_prompts", "rl.prompts_per_step"),
            f"data.pool_prompts={config.data.pool_prompts} must be at least "
            f"rl.prompts_per_step={config.rl.prompts_per_step} (0 means all); raise the first or lower the second",
        )


def _rl(config: Config) -> Iterator[Problem]:
    rl = config.rl
    steps = rl.rounds * rl.steps_per_round
    if rl.algorithm == "ppo" and rl.advantage == "leave_one_out" and rl.samples_per_prompt < 2:
        yield Problem(
            ("rl.advantage", "rl.samples_per_prompt"),
            "rl.samples_per_prompt=1 leaves no other response to compare with, but rl.advantage=leave_one_out needs "
            "at least 2; raise it or use rl.advantage=gae",
        )
    if rl.algorithm == "dpo" and rl.samples_per_prompt < 2:
        yield Problem(
            ("rl.algorithm", "rl.samples_per_prompt"),
            "rl.samples_per_prompt=1 makes no pair, but rl.algorithm=dpo learns from pairs; use at least 2",
        )
    if rl.kl_target is not None and rl.kl_coef == 0:
        yield Problem(
            ("rl.kl_target", "rl.kl_coef"),
            f"rl.kl_target={show(rl.kl_target)} adapts rl.kl_coef by factors, but rl.kl_coef=0 stays 0; "
            "start from 0.02, or set rl.kl_target=null",
        )
    responses = rl.prompts_per_step * rl.samples_per_prompt
    if rl.kl_target is not None and 0.2 * responses >= rl.kl_horizon:
        yield Problem(
            ("rl.kl_horizon", "rl.prompts_per_step", "rl.samples_per_prompt"),
            f"rl.kl_horizon={rl.kl_horizon} is so short that one step of rl.prompts_per_step*rl.samples_per_prompt="
            f"{responses} responses could take rl.kl_coef to 0 or below; try {10 * responses} or more",
        )
    yield from _anchors(rl)
    if rl.interpolate and config.model.quantization != "none":
        yield Problem(
            ("rl.interpolate", "model.quantization"),
            f"rl.interpolate=true scales an adapter over the bare base, but with model.quantization="
            f"{config.model.quantization} the reference is an adapter too; set rl.interpolate=false",
        )
    if rl.anchor_coef > 0 and rl.anchor_prompts == 0:
        yield Problem(
            ("rl.anchor_coef", "rl.anchor_prompts"),
            f"rl.anchor_prompts=0 gives rl.anchor_coef={show(rl.anchor_coef)} nothing to hold still; "
            "raise rl.anchor_prompts or set rl.anchor_coef=0",
        )
    if rl.dual_clip <= 1 + rl.clip_range:
        yield Problem(
            ("rl.dual_clip", "rl.clip_range"),
            f"rl.dual_clip={show(rl.dual_clip)} must be greater than 1+rl.clip_range={show(1 + rl.clip_range)}; try 3",
        )
    if rl.algorithm == "ppo" and rl.advantage == "gae" and rl.value_warmup_steps >= steps:
        yield Problem(
            ("rl.value_warmup_steps", "rl.rounds", "rl.steps_per_round"),
            f"rl.value_warmup_steps={rl.value_warmup_steps} must be smaller than rl.rounds*rl.steps_per_round={steps}, "
            f"or the policy never learns; try {steps // 10}",
        )


def _anchors(rl: RlConfig) -> Iterator[Problem]:
    """The anchors' own controller."""
    if rl.anchor_kl_target is None:
        return
    if rl.anchor_coef == 0:
        yield Problem(
            ("rl.anchor_kl_target", "rl.anchor_coef"),
            f"rl.anchor_kl_target={show(rl.anchor_kl_target)} adapts rl.anchor_coef by factors, but rl.anchor_coef=0 "
            "stays 0; start from 0.2, or set rl.anchor_kl_target=null",
        )
    if rl.algorithm == "ppo":
        steps = math.ceil(rl.prompts_per_step * rl.samples_per_prompt / rl.minibatch_size)
    else:
        steps = math.ceil(rl.prompts_per_step * rl.pairs_per_prompt / rl.pairs_per_step)
    responses = rl.epochs * steps * rl.anchor_prompts
    if 0.2 * responses >= rl.anchor_kl_horizon:
        yield Problem(
            ("rl.anchor_kl_horizon", "rl.anchor_prompts"),
            f"rl.anchor_kl_horizon={rl.anchor_kl_horizon} is so short that one rollout batch, which looks at anchors "
            f"{responses} times, could take rl.anchor_coef to 0 or below; try {5 * responses} or more",
        )
