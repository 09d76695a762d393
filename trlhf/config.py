"""Every value of a run: type, default, unit and source, once. No torch here.

The defaults are those of the embedded world (``model=micro data=micro``); ``conf/`` holds composition and what differs.
"Per step" means per optimizer step; learning rates are AdamW's peak, falling linearly to 0 unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from trlhf.errors import ConfigError
from trlhf.schema import build, setting

Stage = Literal["all", "check", "sft", "reward", "rl", "eval", "card"]
Acquisition = Literal[
    "uniform",
    "frontier",
    "v_optimal",
    "d_optimal",
    "max_entropy",
    "double_thompson",
    "apl",
    "least_agreed",
    "scrambled",
]
UPDATE_RULES = ("outliers_doubled", "longer_without_accuracy", "frontier_used_up", "anchors_fell")
LABEL_RULES = ("labels_buy_too_little", "held_out_gain_covers_zero")  # both are functions of trlhf.targeting.stopping
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"]
PairAcquisition = Literal["uniform", "double_thompson", "v_optimal", "d_optimal", "max_entropy", "apl"]
MISTRAL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class RunConfig:
    """Where results go."""

    dir: str | None = None  # folder; null: a dated one under runs/
    tracker: Literal["none", "tensorboard", "trackio"] = "none"  # also shows metrics.jsonl: pip install trlhf[tracking]


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al., https://arxiv.org/abs/2106.09685)."""

    enabled: bool = False  # false: full fine-tuning
    r: int = setting(16, low=1)  # rank
    alpha: int = setting(32, low=1)  # scale of the update is alpha / r
    dropout: float = setting(0.0, low=0, below=1)  # 0: PPO's ratio needs dropout off
    target_modules: list[str] = setting(MISTRAL_LINEAR)  # names of the linear layers that get adapters


@dataclass(frozen=True)
class ModelConfig:
    """The base model."""

    name: str = "micro"  # "micro": the embedded base; else a hub name or a local folder
    revision: str | None = None  # hub revision (commit, tag or branch)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights in memory
    quantization: Literal["none", "nf4"] = "none"  # of a base under adapters (https://arxiv.org/abs/2305.14314)
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = (
        "sdpa"  # see trlhf.attention
    )
    gradient_checkpointing: bool = (
        False  # recompute activations in the backward pass (https://arxiv.org/abs/1604.06174)
    )
    max_length: int = setting(1024, low=16)  # tokens of prompt and response together
    pad_token: str | None = None  # token to pad with when the tokenizer names none; never EOS
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True)
class SourceConfig:
    """One data set of a mixture."""

    path: str = ""  # file, folder or hub name (owner/name, owner/name:configuration, owner/name:file.parquet)
    split: str = "train"  # of a folder or a hub data set
    weight: float = setting(1.0, above=0)  # how often each chat counts in an epoch; 0.5: half of them, at random
    cap: int = setting(0, low=0)  # at most so many chats, at random, before the weight; 0: all
    stream: bool = False  # hub: read over the network, nothing on the disk; with cap: the first in a shuffled order
    native: bool = False  # turn worked solutions in GSM8K's notation into native chain of thought


@dataclass(frozen=True)
class FilterConfig:
    """Which chats SFT learns from."""

    min_tokens: int = setting(0, low=0)  # of the whole chat in its template; 0: any
    max_tokens: int = setting(0, low=0)  # 0: any
    min_turns: int = setting(0, low=0)  # responses; 2: multi-turn chats only; 0: any
    languages: list[str] = setting([])  # ISO 639-1 codes, as py3langid finds them; []: any
    drop_matching: list[str] = setting([])  # regular expressions; a chat in which one is found is left out
    keep_matching: list[str] = setting([])  # a chat in which none is found is left out
    near_duplicates: float = setting(0.0, low=0, high=1)  # Jaccard similarity from which a later chat goes; 0: never


@dataclass(frozen=True)
class DataConfig:
    """Where prompts, demonstrations and labels come from."""

    name: Literal["micro", "gsm8k", "file"] = "micro"
    path: str | None = None  # gsm8k: folder with train.jsonl and test.jsonl, or a hub name (openai/gsm8k:main)
    sft: str | None = None  # file: demonstrations (file, folder or hub name)
    pool: str | None = None  # file: prompts to sample from in the reward and rl stages
    test: str | None = None  # file: held-out prompts with answers
    labels: str | None = None  # file: labels that exist already, free of charge
    sft_prompts: int = setting(600, low=0)  # at most so many demonstrations; 0: all
    pool_prompts: int = setting(600, low=0)  # at most so many; 0: all
    test_prompts: int = setting(400, low=0)  # at most so many; 0: all
    decontaminate: bool = False  # check first, and leave out the training rows that stage=check lists
    mixture: dict[str, SourceConfig] = field(default_factory=dict)  # file: demonstrations from several, in place of sft
    filters: FilterConfig = field(default_factory=FilterConfig)  # file: of the demonstrations
    mirror: str | None = None  # folder with copies of hub data sets (FOLDER/owner/name), read in place of the hub


@dataclass(frozen=True)
class CheckConfig:
    """Training data against evaluation sets. ``docs/contamination.md`` says what is compared with what."""

    against: list[str] = setting([])  # suites, files, folders, hub names; "test": the run's own, as where none is named
    ngram: int = setting(13, low=0)  # words; 0: no n-grams. https://arxiv.org/abs/2005.14165, appendix C
    overlap: float = setting(0.7, above=0, high=1)  # of an item's n-grams in one row; https://arxiv.org/abs/2204.02311


@dataclass(frozen=True)
class CardConfig:
    """What the model card says and only the user knows; ``docs/model-card.md``."""

    name: str | None = None  # of the model; null: that of `push`, else base and algorithm
    license: str | None = None  # as the hub spells it, apache-2.0 for instance; null: the card states none
    language: list[str] = setting(["en"])  # ISO 639
    datasets: list[str] = setting([])  # names on the hub, beside those that data.* names
    private: bool = True  # a repository that `push` makes


@dataclass(frozen=True)
class TemplateConfig:
    """How a chat becomes text."""

    name: str = "cerebrum"  # one in sft/chat_templates, tokenizer (the tokenizer's own) or the path of a .jinja file
    system: str | None = None  # replaces the template's system line
    added_tokens: list[str] = setting([])  # that the tokenizer is to know; the embeddings grow by those it does not
    eos_token: str | None = None  # what ends a response, in place of the tokenizer's EOS


@dataclass(frozen=True)
class SftConfig:
    """Stage 1: imitation of native chains of thought."""

    epochs: float = setting(4.0, above=0)
    learning_rate: float = setting(1e-3, above=0, below=1)
    batch_size: int = setting(16, low=1)  # sequences per step
    microbatch_size: int = setting(4, low=1)  # sequences per forward pass, of like length
    warmup_ratio: float = setting(0.05, low=0, below=1)  # share of all steps
    weight_decay: float = setting(0.0, low=0)
    max_grad_norm: float = setting(1.0, above=0)
    packing: bool = False  # several demonstrations in one row
    kernels: Literal["torch", "liger", "auto"] = "torch"  # of norms, rotations and gates; auto: Liger's where they are
    multi_turn: Literal["unrolled", "whole"] = "unrolled"  # a chat: a demonstration for each response, or one for all
    max_prompts: int = setting(5000, low=1)  # a warning above it: Cerebrum's card promises fewer
    save_steps: int = setting(50, low=1)  # steps between checkpoints
    save_total_limit: int = setting(2, low=2, remedy="one is being written while another holds")  # checkpoints kept


@dataclass(frozen=True)
class RewardConfig:
    """Stage 2: a reward model with uncertainty, from a small labelled set."""

    labels: int = setting(80, low=0)  # that this stage may buy; it buys none where labels come with the data
    max_labelled: int = setting(0, low=0)  # labels that come with the data, used at most: whole prompts; 0: all
    samples_per_prompt: int = setting(8, low=2, remedy="one response alone cannot be compared")
    heads: int = setting(10, low=1)  # ensemble size (Osband et al., https://arxiv.org/abs/1806.03335)
    finetune: Literal["frozen", "lora", "full"] = "frozen"  # what of the SFT backbone is trained
    epochs: float = setting(4.0, above=0)
    learning_rate: float = setting(2e-4, above=0, below=1)
    batch_size: int = setting(16, low=1)  # labels per step
    microbatch_size: int = setting(16, low=1)  # labels per forward pass
    holdout: float = setting(0.2, above=0, below=1)  # share of the labels kept for calibration
    prior_scale: float = setting(1.0, low=0)  # of each head's fixed random prior
    weight_decay: float = setting(0.01, low=0)


@dataclass(frozen=True)
class RlConfig:
    """Stage 3. PPO: Schulman et al., https://arxiv.org/abs/1707.06347; DPO: https://arxiv.org/abs/2305.18290."""

    algorithm: Literal["ppo", "dpo"] = "ppo"
    rounds: int = setting(4, low=1)  # of rollouts → frontier → labels → refit → update
    steps_per_round: int = setting(8, low=1)  # rollout batches per round
    prompts_per_step: int = setting(32, low=1)
    samples_per_prompt: int = setting(8, low=1)  # responses
    temperature: float = setting(1.0, above=0, remedy="sampling and log-probabilities share it")
    max_new_tokens: int = setting(160, low=1)
    rollout_batch_size: int = setting(128, low=1)  # responses decoded together (whole prompts); the reward stage's too
    rollout_engine: Literal["transformers", "vllm"] = "transformers"  # vllm: a GPU and pip install 'trlhf[vllm]'
    vllm_memory: float = setting(0.3, above=0, below=1)  # share of the GPU's memory that vLLM takes, as in TRL
    draws: Literal["stream", "batch"] = "stream"  # random numbers: one stream, or one for each decoded batch
    epochs: int = setting(2, low=1)  # passes over each rollout batch
    minibatch_size: int = setting(64, low=1)  # responses per step; PPO: whole prompts, all their samples
    microbatch_size: int = setting(16, low=1)  # responses per forward pass; memory grows with it
    learning_rate: float = setting(3e-4, above=0, below=1)
    warmup_ratio: float = setting(0.125, low=0, below=1)  # share of all rollout batches
    advantage: Literal["gae", "leave_one_out"] = "leave_one_out"
    gamma: float = setting(1.0, above=0, high=1)  # discount per token
    gae_lambda: float = setting(0.95, low=0, high=1)  # https://arxiv.org/abs/1506.02438, eq. 16
    clip_range: float = setting(0.2, above=0, below=1)  # of the ratio
    value_clip_range: float = setting(0.2, above=0)
    dual_clip: float = setting(3.0, above=1)  # https://arxiv.org/abs/1912.09729, eq. 5
    value_coef: float = setting(0.5, low=0)
    value_learning_rate: float = setting(5e-4, above=0, below=1)
    value_warmup_steps: int = setting(2, low=0)  # rollout batches in which only the value model learns
    kl_in: Literal["reward", "loss"] = "loss"  # the KL to the reference enters once
    kl_coef: float = setting(0.02, low=0)  # per nat
    kl_target: float | None = setting(None, above=0)  # nats per response; set: the coefficient adapts
    kl_horizon: int = setting(10_000, low=1)  # responses; https://arxiv.org/abs/1909.08593, sec. 2.2
    anchor_coef: float = setting(0.2, low=0)  # per nat, full-token KL on mastered and untargeted prompts
    anchor_prompts: int = setting(12, low=0)  # per step
    anchor_kl_target: float | None = setting(None, above=0)  # nats per token, as anchor_kl; set: its coefficient adapts
    anchor_kl_horizon: int = setting(500, low=1)  # responses of anchors; as rl.kl_horizon, in far fewer
    missing_eos_penalty: float = setting(1.0, low=0)  # taken off the score of a response that never ends
    uncertainty_penalty: float = setting(1.0, low=0)  # kappa in mean - kappa * sd
    open_share: float = setting(0.2, low=0, high=1)  # of each step's prompts: open ones, learned from preferences
    unverified_share: float = setting(
        0.0, low=0, high=1
    )  # of each step's prompts: exact ones that no label decides yet
    beta: float = setting(0.1, above=0)  # DPO
    nll_coef: float = setting(1.0, low=0)  # DPO: length-normalised NLL of the chosen (https://arxiv.org/abs/2404.19733)
    pairs_per_step: int = setting(32, low=1)  # DPO
    pairs_per_prompt: int = setting(4, low=1)  # DPO: at most so many from one prompt's samples
    unverified_reward: Literal["reward_model", "majority", "random"] = "reward_model"  # who decides those
    max_grad_norm: float = setting(1.0, above=0)
    adam_eps: float = setting(1e-5, above=0)  # "The N Implementation Details of RLHF with PPO", detail 6
    save_steps: int = setting(4, low=1)  # rollout batches between checkpoints
    save_total_limit: int = setting(
        2, low=2, remedy="the newest may be beyond rl.max_kl"
    )  # checkpoints kept, beside those that a stop would go back to
    max_kl: float | None = setting(50.0, above=0)  # nats per response to the reference, k1; beyond it the run stops
    max_anchor_kl: float | None = setting(0.2, above=0)  # nats per token on the anchors; beyond it the run stops
    held_out_patience: int = setting(2, low=0)  # rounds with reward up, held-out accuracy down; 0: never stops so
    stop_rules: list[str] = setting(
        ["outliers_doubled", "longer_without_accuracy", "frontier_used_up"]
    )  # looked at after every round; besides: anchors_fell
    interpolate: bool = False  # end between reference and policy, where held-out prompts say so (2309.06256)


@dataclass(frozen=True)
class TargetingConfig:
    """Which prompts, and which labels. ``docs/targeting.md`` says what each choice does and what it was measured to."""

    acquisition: Acquisition = "v_optimal"  # which questions are asked
    pairs: PairAcquisition = "double_thompson"  # which two responses are compared
    update: Literal["plain", "frontier", "targeted"] = "targeted"  # which prompts are trained on, and how far trusted
    label_prompts: Literal["pool", "frontier"] = "frontier"  # that questions may be about; frontier: samples disagree
    gate: bool = True  # ask nothing about repetitive or outlying responses
    budget: int = setting(
        250, low=1, remedy="without labels nothing can be learned; give the number of labels you can pay for"
    )  # labels in the whole run, the reward stage's included
    samples_per_prompt: int = setting(8, low=2, remedy="a frontier shows only where responses differ")
    candidates: int = setting(128, low=1)  # pool prompts sampled per round
    preference_share: float = setting(0.3, low=0, high=1)  # of the labels, where the pool has open prompts
    round_share: float = setting(0.5, low=0, high=1)  # of what is left of the budget, each round but the last; 0: equal
    uniform_share: float = setting(0.1, low=0, high=1)  # of each round's verdicts: at random, to test the uncertainty
    repeat_share: float = setting(0.05, low=0, high=1)  # of each round's labels: asked again, to measure the noise
    pass_rates: Literal["last", "posterior"] = "last"  # that prompts are drawn by: last samples', or all, fading
    hardness: float = setting(1.0, low=0)  # eta: verified prompts are drawn by P(mixed group)·(1 - pass rate)^eta
    least_trust: float = setting(0.5, above=0, below=1)  # unverified prompts are trained on from this trust on
    stop_rules: list[str] = setting(["labels_buy_too_little"])  # of buying; besides: held_out_gain_covers_zero


@dataclass(frozen=True)
class LabelerConfig:
    """Who answers questions."""

    name: Literal["exact", "simulated"] = "simulated"
    noise: float = setting(0.0, low=0, below=0.5)  # probability that a label is flipped
    position_bias: float = setting(0.0, low=0, below=0.5)  # probability that a preference falls on A unread


@dataclass(frozen=True)
class JudgeConfig:
    """Who rates open answers: any server that speaks OpenAI's chat completions."""

    url: str | None = None  # such as http://localhost:8000/v1
    model: str | None = None  # as the server calls it; MT-Bench's published figures are GPT-4's
    key_env: str | None = None  # environment variable with the API key; null: the server wants none
    timeout: float = setting(60.0, above=0)  # seconds for one answer
    retries: int = setting(4, low=0)  # further attempts after a failure or an answer without a rating
    backoff: float = setting(1.0, low=0)  # seconds before the first of them, doubled for each further one
    concurrency: int = setting(4, low=1)  # questions under way at once
    max_tokens: int = setting(2048, low=1)  # of an answer; https://arxiv.org/abs/2306.05685's code asks for as many


@dataclass(frozen=True)
class MtBenchConfig:
    """Two-turn questions, rated from 1 to 10 (Zheng et al., https://arxiv.org/abs/2306.05685)."""

    questions: str = "HuggingFaceH4/mt_bench_prompts"  # file or hub name: two turns, category, perhaps references
    prompts: str | None = None  # YAML file with the judge's prompts; null: ours
    max_new_tokens: int = setting(1024, low=1)  # of an answer


@dataclass(frozen=True)
class EvaluationConfig:
    """Greedy, zero-shot, on the held-out prompts; and suites, each with the protocol of ``docs/evaluation.md``."""

    batch_size: int = setting(128, low=1)  # prompts decoded together; sequences scored together
    max_new_tokens: int = setting(160, low=1)
    interval: Literal["wilson", "bootstrap"] = "wilson"
    confidence: float = setting(0.95, above=0, below=1)
    suites: list[str] = setting([])  # reasoning, open-llm-v1, gpt4all, agieval, truthfulqa, bbh, mt-bench, file
    tasks: list[str] = setting([])  # only these of the suites' tasks; []: all
    limit: int = setting(0, low=0)  # at most so many questions of each task; 0: all
    model: str | None = None  # stage=eval: this model alone (folder, adapter, .gguf file or hub name), not the run's
    file: str | None = None  # suite file: questions with answers (file, folder or hub name)
    mirror: str | None = None  # folder with copies of hub data sets, as OWNER/NAME; null: data.mirror
    chat_template: bool = False  # in lm-eval's suites; false, as on the leaderboards
    majority: int = setting(0, low=0)  # votes per question, beside the greedy answer; 0: none
    temperature: float = setting(0.7, above=0)  # of the votes (https://arxiv.org/abs/2203.11171, sec. 3.1)
    mt_bench: MtBenchConfig = field(default_factory=MtBenchConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass(frozen=True)
class HardwareConfig:
    """What it runs on. Choose with ``hardware=NAME``, which sets all that follows; ``docs/hardware.md`` says what."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    name: Literal["auto", "cpu", "gpu-24gb", "gpu-80gb", "multi-gpu"] = "auto"  # of the YAML file; auto: none was taken
    automatic: bool = False  # whether the machine was looked at, since nobody chose
    memory: float | None = setting(None, above=0)  # GiB of one card, or of the machine; null: look
    threads: int = setting(0, low=0)  # of torch on the CPU; 0: torch's default


@dataclass(frozen=True)
class Config:
    """A whole run."""

    stage: Stage = "all"
    seed: int = setting(0, low=0, below=2**32)  # every stage derives its own generators from it
    dry_run: bool = False  # print the plan and stop
    experiment: str | None = None  # label of the recipe that was composed
    push: str | None = None  # repository on the hub to upload model and card to, at the end and by stage=card
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    check: CheckConfig = field(default_factory=CheckConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rl: RlConfig = field(default_factory=RlConfig)
    targeting: TargetingConfig = field(default_factory=TargetingConfig)
    labeler: LabelerConfig = field(default_factory=LabelerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    card: CardConfig = field(default_factory=CardConfig)


def build_config(values: Mapping[str, Any]) -> Config:
    """Turn a plain nested mapping into a checked configuration; keys left out keep their defaults.

    Raises:
        ConfigError: with every problem: unknown keys, wrong types, values out of range, values that contradict others.
    """
    from trlhf.checks import contradictions

    config, problems = build(Config, values)
    refused = {key for problem in problems for key in problem.keys}
    problems += [problem for problem in contradictions(config) if refused.isdisjoint(problem.keys)]
    if problems:
        raise ConfigError(problem.text for problem in problems)
    return config


def check(config: Config) -> list[str]:
    """Return every contradiction between the values of a configuration, one sentence each."""
    from trlhf.checks import contradictions

    return [problem.text for problem in contradictions(config)]


def plain(config: Config) -> dict[str, Any]:
    """Return the configuration as nested dictionaries of plain values."""
    return asdict(config)
