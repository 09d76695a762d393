"""Policy, reference, value and reward: adapters on one shared base, or models of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Parameter
from transformers import PreTrainedModel

from trlhf.errors import UserError
from trlhf.models import first_line, load_causal_lm, lora_config, model_path
from trlhf.seeding import derive_seed
from trlhf.sharding import shard_if_asked

if TYPE_CHECKING:
    from trlhf.config import Config, ModelConfig
    from trlhf.vllm_engine import VllmEngine

REWARD_ADAPTER = "reward"  # in memory; on disk it lies in the reward stage's ``adapter``
SFT_ADAPTER = "sft"  # of a quantised base: what SFT learned stays an adapter, since merging would be quantised away


class Role:
    """One part to play: a model of its own, or a shared base with one adapter switched on (or none).

    Args:
        model: a causal language model.
        base: the shared base that switches the model's adapters; None for a model of its own.
        adapter: name of the adapter; None for the bare base.
    """

    def __init__(self, model: PreTrainedModel, base: SharedBase | None = None, adapter: str | None = None) -> None:
        self.model, self.base, self.adapter = model, base, adapter
        self.engine: VllmEngine | None = None  # draws responses in place of the model itself

    @contextmanager
    def acting(self) -> Iterator[PreTrainedModel]:
        """Yield the model as this role sees it; afterwards whoever acted before acts again.

        Gradients of what was computed inside may be taken outside, unless activations are recomputed in the backward
        pass: that must happen inside.
        """
        if self.base is None:
            yield self.model
            return
        with self.base.switched(self.adapter):
            yield self.model

    def trainable(self) -> dict[str, Parameter]:
        """Return what this role learns with, by name: its own adapter, or every weight that wants a gradient."""
        if self.base is not None:
            return self.base.weights_of(self.adapter) if self.adapter in self.base.learning else {}
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def frozen(self) -> Role:
        """Return the role after making a model of its own untrainable."""
        if self.base is None:
            self.model.requires_grad_(False)
        return self

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device


class SharedBase:
    """One frozen base with any number of adapters (LoRA), of which one or none is on at a time.

    A new adapter starts where the model stands: as a copy of ``start``, or as one that changes nothing.

    Args:
        model: the base; adapters are put into its linear layers, and its own weights never change.
        config: ``lora`` says what an adapter is.
        start: folder of an adapter that the others start as copies of, and that never learns.
    """

    def __init__(self, model: PreTrainedModel, config: ModelConfig, start: Path | None = None) -> None:
        self.model = model.requires_grad_(False)
        self.learning: set[str | None] = set()
        self.start: str | None = None
        self._config = config
        self._peft: Any = None
        self._on: str | None = None
        if start is not None:
            self.load(SFT_ADAPTER, start)
            self.start = SFT_ADAPTER

    def add(self, name: str, seed: int, like: str | None = None) -> Role:
        """Add an adapter that learns; its random half depends on ``seed`` and ``name`` alone.

        Args:
            name: of the role.
            seed: of the run.
            like: adapter to start as a copy of; None: the base's ``start``.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "adapters", name))
            if self._peft is None:
                from peft import get_peft_model

                self._peft = get_peft_model(self.model, lora_config(self._config), adapter_name=name)
            else:
                self._peft.add_adapter(name, lora_config(self._config))
        source = like or self.start
        if source is not None:
            origin = self.weights_of(source)
            with torch.no_grad():
                for key, value in self.weights_of(name).items():
                    value.copy_(origin[key.replace(f".{name}.", f".{source}.")])
        self.learning.add(name)
        self.model.eval()  # a new adapter comes with its dropout on
        self._switch(self._on)
        return self.role(name)

    def load(self, name: str, folder: Path) -> Role:
        """Add an adapter from a folder; it does not learn.

        Raises:
            UserError: there is no readable adapter.
        """
        device = str(self.model.device)
        try:
            if self._peft is None:
                from peft import PeftModel

                self._peft = PeftModel.from_pretrained(self.model, str(folder), adapter_name=name, torch_device=device)
            else:
                self._peft.load_adapter(str(folder), adapter_name=name, torch_device=device)
        except Exception as error:  # peft, safetensors and json each raise kinds of their own
            raise UserError(
                f"adapter {folder}: cannot be read ({first_line(error)}); delete the folder of the stage that wrote it "
                "and run that stage again"
            ) from error
        self._switch(self._on)
        return self.role(name)

    def freeze(self, name: str) -> None:
        """Let an adapter learn no more."""
        self.learning.discard(name)
        self._switch(self._on)

    def merge(self, name: str) -> PreTrainedModel:
        """Return the plain model with one adapter merged into its weights; the base is gone then."""
        with self.switched(name):
            plain: PreTrainedModel = self._peft.merge_and_unload(adapter_names=[name])
        return plain

    def role(self, name: str | None) -> Role:
        """Return the role that an adapter plays; None: the bare base."""
        return Role(self.model, self, name)

    def save(self, name: str, folder: Path) -> None:
        """Write one adapter into a folder, as peft reads it."""
        self._peft.save_pretrained(str(folder), selected_adapters=[name])
        inner = folder / name  # peft's place for every adapter that is not called default
        for path in list(inner.iterdir()) if inner.exists() else []:
            path.rename(folder / path.name)
        if inner.exists():
            inner.rmdir()

    def weights_of(self, name: str | None) -> dict[str, Parameter]:
        """Return the weights of one adapter by their names in the model."""
        return {key: value for key, value in self.model.named_parameters() if f".{name}." in key and ".lora_" in key}

    @contextmanager
    def switched(self, name: str | None) -> Iterator[None]:
        """Let one adapter act (None: the bare base) while the block runs."""
        before = self._on
        if before != name:
            self._switch(name)
        try:
            yield
        finally:
            if self._on != before:
                self._switch(before)

    def _switch(self, name: str | None) -> None:
        """Switch adapters; peft freezes those that are off, which would take their gradients, so thaw them again."""
        if self._peft is not None:
            layers = self._peft.base_model
            if name is None:
                layers.disable_adapter_layers()
            else:
                layers.enable_adapter_layers()
                layers.set_adapter(name)
            for adapter in self._peft.peft_config:
                for value in self.weights_of(adapter).values():
                    value.requires_grad_(adapter in self.learning)
        self._on = name


@dataclass(frozen=True)
class Roles:
    """Who plays what in the rl stage.

    Attributes:
        policy: learns.
        reference: the SFT model; never learns.
        value: learns, beside a head of its own (`trlhf.rl.critic.Critic`); None where no critic is used.
        reward: backbone of the reward model; None where the reward stage left a whole model of its own to load.
    """

    policy: Role
    reference: Role
    value: Role | None
    reward: Role | None


def load_sft(path: Path, config: ModelConfig, device: str) -> Role:
    """Load the SFT model: as it was saved or, of a quantised base, the base with the SFT stage's adapter.

    Args:
        path: its folder ``model``; beside it lies ``adapter`` where adapters were trained.
        config: what to load it as.
        device: where.

    Raises:
        UserError: it cannot be read.
    """
    if config.quantization == "none":
        return Role(load_causal_lm(path, config, device))
    base = load_causal_lm(model_path(config.name), config, device, quantized=True)
    return SharedBase(base, config, start=path.parent / "adapter").role(SFT_ADAPTER)


def shared_base(sft: Path, config: ModelConfig, device: str) -> SharedBase:
    """Load the SFT model as the base that the roles share."""
    start = load_sft(sft, config, device)
    return start.base or SharedBase(start.model, config)


def reward_role(base: SharedBase, reward: Path, backbone: str) -> Role | None:
    """Return who plays the reward model's backbone on a shared base; None where it is a model of its own.

    Args:
        base: see `shared_base`.
        reward: folder of the reward stage.
        backbone: as for `load_roles`.
    """
    if backbone == "adapter":
        return base.load(REWARD_ADAPTER, reward / "adapter")
    return base.role(base.start) if backbone == "sft" else None


def load_roles(config: Config, sft: Path, reward: Path, backbone: str, device: str) -> Roles:
    """Load everything that the rl stage trains or asks, with as few copies of the base as can be.

    With adapters there is one copy: the reference is the base itself (quantised: with the SFT adapter), the others are
    adapters on it, and the value's starts as the reward model's. In full fine-tuning each is a model of its own, in
    float32 where it learns whatever ``model.dtype``, since AdamW's small steps would vanish in bfloat16; the reference
    has the policy's type, so that the first KL is 0, and serves as the reward model's backbone where that is the same.
    Where the user's accelerate file says FSDP 2, each of them is divided among the processes (`trlhf.sharding`).

    Args:
        config: ``model``, ``rl`` and ``seed`` matter.
        sft: folder ``model`` of the SFT stage.
        reward: folder of the reward stage.
        backbone: what the reward model stands on: ``sft`` (the SFT model as it is), ``adapter`` or ``own``.
        device: where.

    Raises:
        UserError: something cannot be read.
    """
    critic = config.rl.algorithm == "ppo" and config.rl.advantage == "gae"
    if not config.model.lora.enabled:
        exact = replace(config.model, dtype="float32")
        policy, reference = _own(sft, exact, device), _own(sft, exact, device, learns=False)
        value = _own(reward / "model", exact, device) if critic else None
        shared = backbone == "sft" and config.model.dtype == "float32"
        return Roles(policy, reference, value, reference if shared else None)
    base = shared_base(sft, config.model, device)
    scorer = reward_role(base, reward, backbone)
    like = REWARD_ADAPTER if backbone == "adapter" else None
    value = base.add("value", config.seed, like) if critic else None
    policy = base.add("policy", config.seed)
    shard_if_asked(base.model)
    return Roles(policy, base.role(base.start), value, scorer)


def _own(path: Path, config: ModelConfig, device: str, learns: bool = True) -> Role:
    role = Role(load_causal_lm(path, config, device))
    shard_if_asked((role if learns else role.frozen()).model)
    return role
