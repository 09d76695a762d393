"""Refit the heads of a saved reward model while labels are bought; its backbone stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from trlhf.config import Config
from trlhf.crew import together
from trlhf.data import LabelledPair, LabelledResponse
from trlhf.models import choose_device
from trlhf.reward.calibration import calibrate
from trlhf.reward.features import FeatureStore, PromptKey
from trlhf.reward.fit import fit, fit_settings
from trlhf.reward.liking import liking_features
from trlhf.reward.model import RewardModel
from trlhf.reward.split import Labels, read_split, split_by_prompt
from trlhf.reward.table import tabulate
from trlhf.reward.train import usable
from trlhf.roles import Role
from trlhf.types import Prompt


class Refitter:
    """Make a scorer from the labels bought so far and those that come with the data.

    Prompts keep the side that they had in the reward stage: temperatures are never fitted on labels that the backbone
    has learned from, nor is any head on those that were held out. Prompts that are new are split as usual.

    The backbone is loaded once, and reads what comes with the data once. That happens apart from the rest, so that a
    run that was stopped computes the same features, to the bit, as one that went on.

    Args:
        directory: folder of the reward stage.
        config: ``model``, ``reward``, ``hardware`` and ``seed`` matter.
        existing: labels that come with the data.
        role: who plays the backbone; None: it is loaded.
    """

    def __init__(self, directory: Path, config: Config, existing: Labels, role: Role | None = None) -> None:
        self.directory, self.config, self.existing, self.role = directory, config, existing, role
        self._model: RewardModel | None = None
        self._features = FeatureStore()
        self._sides: dict[PromptKey, bool] = {}

    def __call__(self, labelled: Sequence[LabelledResponse], pairs: Sequence[LabelledPair]) -> RewardModel:
        """Fit and calibrate on all labels; the scorer of the call before is the same object and changes with it."""
        model = self._load()
        bought = usable(model, Labels(labelled, pairs))
        labels = Labels([*self.existing.responses, *bought.responses], [*self.existing.pairs, *bought.pairs])
        training, held = split_by_prompt(labels, self.config.reward.holdout, self.config.seed, self._sides)
        with model.keep_features(FeatureStore(self._features)):
            fit(model, training.responses, training.pairs, replace(fit_settings(self.config), finetune="frozen"))
            calibrate(model, held.responses, held.pairs)
        return model

    def forks(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Float[ndarray, "N F"]:
        """Return what the backbone's states are where responses fork (see `trlhf.reward.features.pool`).

        Raises:
            UserError: a prompt and its response are longer than ``model.max_length`` together.
        """
        model = self._load()
        samples = model.encode(prompts, responses)
        distinct = list(dict.fromkeys(samples))
        place = {sample: n for n, sample in enumerate(distinct)}
        pooled = model.pool_samples(distinct).forks.double().numpy()
        return np.asarray(pooled[[place[sample] for sample in samples]])

    def liking(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Float[ndarray, "N F"]:
        """Return what preferences can be read from (see `trlhf.reward.liking.liking_features`).

        Raises:
            UserError: a prompt and its response are longer than ``model.max_length`` together.
        """
        model = self._load()
        samples = model.encode(prompts, responses)
        return together(liking_features, model.role, samples, int(model.tokenizer.pad_token_id))

    def _load(self) -> RewardModel:
        if self._model is None:
            self._sides = read_split(self.directory)
            self._model = RewardModel.load(self.directory, self.config.model, choose_device(self.config), self.role)
            self.existing = usable(self._model, self.existing)
            if len(self.existing):
                _, prompts, responses = tabulate(self.existing.responses, self.existing.pairs)
                with self._model.keep_features(self._features):
                    self._model.pool_samples(self._model.encode(prompts, responses))
        return self._model
