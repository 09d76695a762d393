"""The reward model: a language model's backbone, an ensemble of small heads, and the calibration of their scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trlhf import files
from trlhf.config import ModelConfig
from trlhf.crew import keep, together
from trlhf.errors import UserError
from trlhf.merging import save_model
from trlhf.models import encode_prompt, encode_response, load_causal_lm, load_tokenizer
from trlhf.recompute import recomputing
from trlhf.reward.features import Batch, FeatureStore, Pooled, Sample, encode, fork_layers, pool, pool_all
from trlhf.reward.heads import EnsembleHeads
from trlhf.roles import REWARD_ADAPTER, Role, load_sft
from trlhf.sharding import shard_if_asked, whole
from trlhf.types import Prompt, Score

FORMAT = 3
BACKBONE, ADAPTER, HEADS, SETTINGS = "model", "adapter", "heads.safetensors", "reward.json"


@dataclass(frozen=True)
class Calibration:
    """What turns raw scores into calibrated logits.

    Attributes:
        verdict_temperature: raw logits of a right verdict are divided by it.
        preference_temperature: τ; raw score differences are divided by it.
    """

    verdict_temperature: float = 1.0
    preference_temperature: float = 1.0


class RewardModel(nn.Module):
    """Scores of responses, each with the model's own uncertainty; a :class:`trlhf.types.Scorer`.

    On a prompt with an exact answer a score is the calibrated logit of being right, (f + b(x)) / T; on an open one it
    is f / τ, so that a difference of two is the logit of being preferred. Within a prompt only f matters in both. Its
    forward pass reads right-padded tokens and returns the raw f of every head.

    Args:
        role: a causal language model, or a shared base with or without an adapter; its language-model head tells where
            responses fork.
        tokenizer: its tokenizer, with the chat template that the responses were sampled under.
        heads: see :class:`EnsembleHeads`.
        max_length: tokens of prompt and response together.
    """

    def __init__(self, role: Role, tokenizer: PreTrainedTokenizerBase, heads: EnsembleHeads, max_length: int) -> None:
        super().__init__()
        self.role = role
        self.stands_on = "sft"  # what the backbone is: the SFT model as it was, an adapter of ours on it, or our own
        self.tokenizer = tokenizer
        self.heads = heads
        self.max_length = max_length
        self.calibration = Calibration()
        self.fitted: dict[str, float] = {}  # what the last fit chose; not saved
        self.features: FeatureStore | None = None  # see keep_features
        self.eval()

    @classmethod
    def from_backbone(
        cls,
        path: str | Path,
        config: ModelConfig,
        *,
        heads: int = 10,
        prior_scale: float = 1.0,
        seed: int = 0,
        device: str = "cpu",
    ) -> RewardModel:
        """Build an untrained reward model on the SFT model's folder.

        Raises:
            UserError: the folder holds no readable model or tokenizer.
        """
        role = keep(load_sft, Path(path), config, device)
        tokenizer = keep(partial(load_tokenizer, path, pad_token=config.pad_token))
        size = int(role.model.config.hidden_size)
        pooled = 2 + len(fork_layers(int(role.model.config.num_hidden_layers)))
        fresh = EnsembleHeads(pooled * size, size, heads, prior_scale, seed).to(device)
        return cls(role, tokenizer, fresh, config.max_length)

    @property
    def backbone(self) -> PreTrainedModel:
        """The causal language model underneath, with whatever adapters it carries."""
        return self.role.model

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.heads.weight.device

    def pooled(self, batch: Batch) -> Pooled:
        """Run the backbone over a batch and pool its hidden states; gradients flow."""
        return _pooled(self.role, batch)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Bool[Tensor, "B T"],
        prompt_lengths: Int[Tensor, " B"],
    ) -> Float[Tensor, "B K"]:
        """Return the raw score f of each head for right-padded samples, nuisances left out.

        Args:
            input_ids: prompt, response, EOS, padding.
            attention_mask: True at real tokens.
            prompt_lengths: tokens of each prompt.
        """
        scores: Tensor = self.heads(self.pooled(Batch(input_ids, attention_mask, prompt_lengths)))
        return scores

    def encode(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Sample]:
        """Return the tokens of each response as the reply to its prompt."""
        return encode(self.tokenizer, prompts, responses, self.max_length)

    def fits(self, prompt: Prompt, response: str) -> bool:
        """Return whether a prompt and a response are at most ``max_length`` tokens together."""
        tokens = len(encode_prompt(self.tokenizer, prompt.messages)) + len(encode_response(self.tokenizer, response))
        return tokens <= self.max_length

    def pool_samples(self, samples: Sequence[Sample], batch_size: int = 64) -> Pooled:
        """Pool any number of samples, in batches of like length, without gradients, on the CPU."""

        def compute(new: Sequence[Sample]) -> Pooled:
            return together(_pool_all, self.role, list(new), int(self.tokenizer.pad_token_id), batch_size)

        return compute(samples) if self.features is None else self.features.lookup(samples, compute)

    @property
    def dtype(self) -> str:
        """Name of the type that the backbone computes in."""
        return str(self.backbone.dtype).removeprefix("torch.")

    @contextmanager
    def keep_features(self, known: FeatureStore | None = None) -> Iterator[None]:
        """Run the backbone once on each sample while the block runs, and remember: in ``known``, if that is given."""
        self.features = FeatureStore() if known is None else known
        try:
            yield
        finally:
            self.features = None

    @torch.no_grad()
    def logits(self, prompts: Sequence[Prompt], responses: Sequence[str], batch_size: int = 64) -> Float[Tensor, "B K"]:
        """Return every head's calibrated score, on the CPU."""
        pooled = self.pool_samples(self.encode(prompts, responses), batch_size)
        pooled = Pooled(pooled.response.to(self.device), pooled.prompt.to(self.device))
        exact = torch.tensor([prompt.task == "exact" for prompt in prompts], device=self.device)[:, None]
        scores = self.heads.scores(pooled)
        right = (scores + self.heads.intercepts(pooled)) / self.calibration.verdict_temperature
        return torch.where(exact, right, scores / self.calibration.preference_temperature).cpu()

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], batch_size: int = 64) -> list[Score]:
        """Score ``responses[i]`` as the reply to ``prompts[i]``: mean and standard deviation over the heads.

        The result depends neither on the order nor on the company of a response.

        Raises:
            UserError: a prompt and its response are longer than ``max_length`` together.
        """
        if not prompts:
            return []
        logits = self.logits(prompts, responses, batch_size)
        means, sds = logits.mean(dim=1).tolist(), logits.std(dim=1, correction=0).tolist()
        return [Score(mean, sd) for mean, sd in zip(means, sds, strict=True)]

    def save(self, directory: str | Path) -> None:
        """Write ``model/`` (the backbone, for plain transformers), ``heads.safetensors`` and ``reward.json``.

        A backbone that learned as an adapter is written as one too, into ``adapter/``; ``model/`` has it merged.

        Raises:
            UserError: the folder cannot be written (the disk is full, say).
        """
        directory = Path(directory)
        with files.new_directory(directory / BACKBONE) as fresh:
            save_model(self.backbone, self.tokenizer, fresh, self.dtype, self.role.adapter)
        if self.role.base is not None and self.stands_on == "adapter":
            with files.new_directory(directory / ADAPTER) as fresh:
                self.role.base.save(REWARD_ADAPTER, fresh)
        state = {name: tensor.contiguous() for name, tensor in self.heads.state_dict().items()}
        files.write_bytes(directory / HEADS, safetensors.torch.save(state))
        settings = {
            "format": FORMAT,
            "heads": self.heads.heads,
            "feature_size": self.heads.weight.shape[1],
            "prompt_size": self.heads.intercept_weight.shape[1],
            "prior_scale": self.heads.prior_scale,
            "max_length": self.max_length,
            "dtype": self.dtype,
            "backbone": self.stands_on,
            "calibration": asdict(self.calibration),
        }
        files.write_json(directory / SETTINGS, settings)

    @classmethod
    def load(
        cls, directory: str | Path, config: ModelConfig | None = None, device: str = "cpu", role: Role | None = None
    ) -> RewardModel:
        """Read what :meth:`save` wrote.

        Args:
            directory: the folder that holds ``reward.json``.
            config: attention to load the backbone with; None: sdpa. Its type is the one it was saved in.
            device: where to put it.
            role: who plays the backbone, where a shared base already carries it; None: load ``model/``.

        Raises:
            UserError: something is missing, unreadable or does not fit together.
        """
        directory = Path(directory)
        files.recover(directory / BACKBONE)
        try:
            settings = files.read_json(directory / SETTINGS)
            stands_on = str(settings.get("backbone", "own"))
            heads = EnsembleHeads(
                settings["feature_size"], settings["prompt_size"], settings["heads"], settings["prior_scale"], seed=0
            )
            heads.load_state_dict(safetensors.torch.load_file(directory / HEADS))
            calibration = Calibration(**settings["calibration"])
            config = replace(config or ModelConfig(), dtype=settings["dtype"])
            max_length = int(settings["max_length"])
        except UserError:
            raise
        except Exception as error:  # safetensors, torch and missing keys each raise kinds of their own
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"reward model {directory}: cannot be read ({reason}); delete the folder and run stage=reward again"
            ) from error
        role = role or keep(_own_backbone, directory, config, device)
        tokenizer = keep(partial(load_tokenizer, directory / BACKBONE, pad_token=config.pad_token))
        model = cls(role, tokenizer, heads.to(device), max_length)
        model.calibration, model.stands_on = calibration, stands_on
        return model


def _pooled(role: Role, batch: Batch) -> Pooled:
    with role.acting() as backbone, recomputing(role.model):
        output = backbone.base_model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask.long(),
            output_hidden_states=True,
            use_cache=False,
        )
        head = backbone.get_output_embeddings()
        return pool(output.hidden_states, output.last_hidden_state, head, batch.attention_mask, batch.prompt_lengths)


def _pool_all(role: Role, samples: Sequence[Sample], pad_id: int, batch_size: int) -> Pooled:
    with whole(role):
        return pool_all(partial(_pooled, role), samples, pad_id, batch_size, role.device)


def _own_backbone(directory: Path, config: ModelConfig, device: str) -> Role:
    return Role(shard_if_asked(load_causal_lm(directory / BACKBONE, config, device)))


def backbone_of(directory: Path) -> str:
    """Return what a saved reward model stands on: ``sft`` (the SFT model as it is), ``adapter`` on it, or ``own``.

    Raises:
        UserError: its settings cannot be read.
    """
    settings: dict[str, str] = files.read_json(directory / SETTINGS)
    return settings.get("backbone", "own")
