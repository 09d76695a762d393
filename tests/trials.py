"""Small trainings whose gradients can be looked at: policy, critic, reward model and SFT on a tiny model.

Two layouts: a copy of the model for each role, or adapters on one shared base.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from trlhf.config import LoraConfig, ModelConfig, RlConfig, build_config
from trlhf.data import LabelledPair, LabelledResponse
from trlhf.models import load_causal_lm
from trlhf.reward import finetune as finetuning
from trlhf.reward.finetune import FitSettings
from trlhf.reward.fit import fit
from trlhf.reward.model import RewardModel
from trlhf.rl.anchors import Anchor
from trlhf.rl.critic import Critic
from trlhf.rl.dpo import DpoLearner
from trlhf.rl.experience import Group
from trlhf.rl.ppo import PpoLearner
from trlhf.roles import Role, SharedBase
from trlhf.types import Demonstration, Prompt, Rollout

PAD, EOS, SAMPLES = 3, 2, 4
LAYOUTS = ("copies", "adapters")
LORA = LoraConfig(enabled=True, r=4, alpha=8)
RL = RlConfig(
    epochs=1,
    samples_per_prompt=SAMPLES,
    minibatch_size=8,
    microbatch_size=8,
    learning_rate=1e-3,
    value_learning_rate=1e-3,
    kl_coef=0.1,
    anchor_coef=0.3,
    anchor_prompts=3,
    pairs_per_step=8,
    pairs_per_prompt=2,
    nll_coef=0.3,
    max_grad_norm=1e6,  # gradients as they are
)
ALGORITHMS: Mapping[str, RlConfig] = {
    "leave_one_out": RL,
    "gae": replace(RL, advantage="gae", kl_in="reward", kl_target=0.5, kl_horizon=100),
    "dpo": replace(RL, algorithm="dpo"),
}
Metrics = dict[str, float]
Named = dict[str, Tensor]


def sharp_model(path: Path, config: ModelConfig = ModelConfig(), layers: float = 4) -> PreTrainedModel:  # noqa: B008
    """Return the tiny model with larger weights: a fresh one repeats its last token, whatever stands before it."""
    model: Any = load_causal_lm(path, config)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 8
        for layer in model.model.layers:
            for value in layer.parameters():
                value *= layers if value.dim() == 2 else 1
    return model


def stir(role: Role, seed: int) -> Role:
    """Move what a role learns with: a fresh adapter changes nothing, and a fresh policy is its reference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in role.trainable().values():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
    return role


def sampled_groups(count: int, seed: int = 0, samples: int = SAMPLES) -> list[Group]:
    """Return groups of ragged responses to ragged prompts, every one with a right and a wrong one."""
    rng = random.Random(seed)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(10, 250) for _ in range(length))

    found = []
    for number in range(count):
        rollouts = []
        for sample in range(samples):
            ids = (*tokens(rng.randint(0, 9)), EOS) if sample else tokens(6)  # the first never ends
            logprobs = tuple(-rng.random() for _ in ids)
            rollouts.append(Rollout(f"p{number}", "", ids, logprobs, bool(sample), None))
        rewards = [1.0, 0.0] + [float(rng.random() < 0.5) for _ in range(samples - 2)]
        rng.shuffle(rewards)
        prompt = Prompt(f"p{number}", ({"role": "user", "content": "?"},))
        prompt_ids = (1, *tokens(rng.randint(1, 9)))
        found.append(Group(prompt, prompt_ids, tuple(rollouts), tuple(rewards), (True,) * samples))
    return found


def some_anchors(count: int) -> list[Anchor]:
    """Return anchors, no two of a length."""
    return [Anchor(f"a{i}", (1, *range(40, 42 + i)), (*range(60, 63 + i), EOS), None) for i in range(count)]


class Trial:
    """Policy, reference and, for GAE, critic, away from where they began, and the learner over them.

    Args:
        path: of the model.
        config: the rl section.
        layout: one of `LAYOUTS`.
        model: None: as usual.
        divide: what is done to each model before anything learns (`trlhf.sharding.shard`).
    """

    def __init__(
        self,
        path: Path,
        config: RlConfig,
        layout: str = "copies",
        model: ModelConfig | None = None,
        divide: Callable[[Any], None] = lambda model: None,
    ) -> None:
        model = model or ModelConfig(lora=LORA if layout == "adapters" else LoraConfig())
        if layout == "adapters":
            base = SharedBase(sharp_model(path, model), model)
            self.policy, value, self.reference = base.add("policy", 0), base.add("value", 0), base.role(None)
        else:
            self.policy, value, self.reference = (Role(sharp_model(path, model)) for _ in range(3))
            self.reference.frozen()
        stir(self.policy, 1)
        gae = config.advantage == "gae"
        if gae:
            stir(value, 2)
        for found in {id(role.model): role.model for role in (self.policy, value, self.reference)}.values():
            divide(found)
        self.critic = None
        if gae:
            self.critic = Critic(value)
            with torch.no_grad():
                self.critic.head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
        self.learner = (
            DpoLearner(self.policy, self.reference, config, PAD)
            if config.algorithm == "dpo"
            else PpoLearner(self.policy, self.reference, self.critic, config, PAD)
        )

    def update(self, groups: Sequence[Group], anchors: Sequence[Anchor] = (), warmup: bool = False) -> Metrics:
        """Take one update; the gradients of its last step stay."""
        return self.learner.update(groups, anchors, random.Random(0), 1.0, warmup)

    def learning(self) -> dict[str, Any]:
        """Return the weights that learn, by role and name."""
        critic = {} if self.critic is None else self.critic.trainable()
        both = {"policy": self.policy.trainable(), "critic": critic}
        return {f"{role}.{name}": value for role, found in both.items() for name, value in found.items()}

    def weights(self) -> Named:
        """Return copies of the weights that learn."""
        return {name: undivided(value.detach()).clone() for name, value in self.learning().items()}

    def gradients(self) -> Named:
        """Return copies of the gradients."""
        return copied_gradients(self.learning().items())


def copied_gradients(parameters: Iterable[tuple[str, Any]]) -> Named:
    """Return copies of the gradients of those parameters that have one."""
    return {
        name.removeprefix("module."): undivided(p.grad.detach()).clone() for name, p in parameters if p.grad is not None
    }


def undivided(value: Any) -> Tensor:
    """Return all of a tensor, on every process."""
    whole: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return whole


def farthest(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest difference between two sets of tensors, as a share of the largest number expected."""
    assert found.keys() == expected.keys() and found, found.keys() ^ expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 0, "nothing to compare"
    return max(float((found[name] - value).abs().max()) for name, value in expected.items()) / largest


# ---- supervised fine-tuning ----


def demonstrations(count: int = 8) -> list[Demonstration]:
    """Return demonstrations whose responses are the longer, the later they come: a mean of means shows."""
    found = []
    for i in range(count):
        answer = " ".join(f"step {j} is {i * j}." for j in range(i + 1))
        turns = ({"role": "user", "content": f"{i} plus {i + 1}?"}, {"role": "assistant", "content": answer})
        found.append(Demonstration(turns, source=f"sft.jsonl:{i + 1}"))  # type: ignore[arg-type]
    return found


def sft_steps(path: Path, folder: Path, rows: Sequence[Demonstration], **groups: Any) -> list[Named]:
    """Run the SFT stage's trainer on ``rows`` and return the gradients of every optimizer step.

    Args:
        path: the model.
        folder: to write into.
        rows: demonstrations.
        **groups: sections of the configuration.
    """
    from trlhf.run import RunDirectory
    from trlhf.sft import train
    from trlhf.sft.report import StageCallback

    seen: list[Named] = []

    class Watch(StageCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            seen.append(copied_gradients(model.named_parameters()))

        def on_save(self, *_: Any, **__: Any) -> None:
            """A second process saves nothing that could be sealed."""

    sft = {"epochs": 1.0, "batch_size": 8, "microbatch_size": 8, "max_grad_norm": 1e6, **groups.pop("sft", {})}
    model = {"name": str(path), "max_length": 400, **groups.pop("model", {})}
    values = {"model": model, "sft": sft, "hardware": {"device": "cpu"}, "template": {"system": "Sums."}, **groups}
    with mock.patch.object(train, "StageCallback", Watch):
        train.train_sft(rows, build_config(values), RunDirectory(folder).stage("sft"))
    return seen


# ---- the reward model ----


@dataclass
class Fitted:
    """What a fit of the reward model left behind: gradients and metrics of every optimizer step, and all weights."""

    model: RewardModel
    gradients: list[Named]
    metrics: list[Metrics]


def labels(verdicts: int = 6, pairs: int = 2) -> tuple[list[LabelledResponse], list[LabelledPair]]:
    """Return labels on responses of many lengths."""
    rng = random.Random(0)

    def text() -> str:
        return " ".join(rng.choices(["river", "stone", "green", "seven", "cloud"], k=rng.randint(1, 12)))

    def prompt(number: int) -> Prompt:
        return Prompt(f"p{number}", ({"role": "user", "content": f"Question {number}?"},))

    responses = [LabelledResponse(prompt(i // 2), text(), i % 2 == 0) for i in range(verdicts)]
    compared = [LabelledPair(prompt(100 + i), text(), text(), (1.0, 0.0, 0.5)[i % 3]) for i in range(pairs)]
    return responses, compared


def fit_reward(
    path: Path,
    found: tuple[Sequence[LabelledResponse], Sequence[LabelledPair]],
    order: Tensor | None = None,
    backbone: ModelConfig | None = None,
    **settings: Any,
) -> Fitted:
    """Fit a reward model and keep the gradients of every optimizer step, summed over the ranks.

    Args:
        path: the SFT model.
        found: labels.
        order: of the labels within the one step; None: as they are drawn.
        backbone: what to load the model as; None: as usual.
        **settings: of the fit.
    """
    gradients: list[Named] = []
    metrics: list[Metrics] = []
    summing: Callable[..., None] = finetuning.sum_gradients

    def watched(parameters: Sequence[torch.nn.Parameter]) -> None:
        summing(parameters)
        gradients.append(copied_gradients((f"{i}", p) for i, p in enumerate(parameters)))

    def log(step: int, values: Mapping[str, float]) -> None:
        if "gradient_norm" in values:
            metrics.append(dict(values))

    model = RewardModel.from_backbone(path, backbone or ModelConfig(), heads=3)
    defaults = {"epochs": 1.0, "learning_rate": 1e-3, "batch_size": 8, "microbatch_size": 8}
    defaults |= {"model": ModelConfig(lora=LORA)}
    epochs = finetuning._epochs if order is None else lambda *_: iter([[order]])
    with mock.patch.object(finetuning, "sum_gradients", watched), mock.patch.object(finetuning, "_epochs", epochs):
        fit(model, *found, FitSettings(**(defaults | settings)), log)
    return Fitted(model, gradients, metrics)
