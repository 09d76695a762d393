"""One round: candidates → labels → what can be trained on → groups with rewards."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from trlhf import files
from trlhf.config import Config
from trlhf.data import LabelledPair, LabelledResponse
from trlhf.errors import UserError
from trlhf.knowledge import Knowledge
from trlhf.labelling import Archive
from trlhf.ledger import Ledger
from trlhf.models import encode_prompt
from trlhf.rl.anchors import still_trusted
from trlhf.rl.checkpoint import Progress
from trlhf.rl.draw import draw_prompts
from trlhf.rl.experience import Group, score_groups
from trlhf.rl.frontier import expected_rate, note_samples
from trlhf.rl.held_out import FEWEST_TO_CHOOSE, held_out_prompts
from trlhf.rl.judge import AnswerJudge, Cache, Features, Judgement, verdicts_of
from trlhf.rl.liking import LikingJudge, PairCache, comparisons
from trlhf.roles import Role, Roles
from trlhf.rollout import Sampling, sample_as
from trlhf.run import StageDirectory
from trlhf.seeding import derive_seed, numpy_rng
from trlhf.targeting.answers import FLIP_RATE
from trlhf.types import Label, Labeler, Prompt, Rollout, Scorer

log = logging.getLogger("trlhf")
OPEN_KINDS = "open_kinds_learned"  # in a round's file: kinds of open prompts that the model of preferences tells apart
NOISY = 0.05  # chance of a wrong verdict from which a verified prompt is no longer taken at its word
Refit = Callable[[Sequence[LabelledResponse], Sequence[LabelledPair]], Scorer]


@dataclass(frozen=True)
class RlInputs:
    """What the stage needs of others.

    Attributes:
        pool: prompts to learn from.
        sft: folder of the SFT model, for its tokenizer.
        roles: policy, reference and value.
        ledger: where labels are bought.
        labeler: who answers.
        archive: samples behind the labels bought so far.
        refit: makes a scorer from labels; called once a round.
        held_out: ids of prompts that the reward model never learned from; the policy will not either where labels
            verify them by now.
        features: what a backbone that does not change makes of responses, for the answer model.
        feature_cache: of labelled responses, filled as rounds go by.
        liking: what the same backbone makes of responses to open prompts, for the model of preferences.
        pair_cache: of compared responses, filled as rounds go by.
    """

    pool: Sequence[Prompt]
    sft: Path
    roles: Roles
    ledger: Ledger
    labeler: Labeler
    archive: Archive
    refit: Refit
    held_out: frozenset[str] = frozenset()
    features: Features | None = None
    liking: Features | None = None
    feature_cache: Cache = field(default_factory=dict)
    pair_cache: PairCache = field(default_factory=dict)


def decisions_file(number: int) -> str:
    """Return the name of the file with what a round decided, and why."""
    return f"round_{number:02d}.json"


def samples_file(number: int) -> str:
    """Return the name of the file with a round's samples of labelled prompts."""
    return f"round_{number:02d}_samples.jsonl"


class Round:
    """One round of the loop over shared state."""

    def __init__(
        self,
        config: Config,
        stage: StageDirectory,
        inputs: RlInputs,
        policy: Role,
        tokenizer: PreTrainedTokenizerBase,
        state: Progress,
    ) -> None:
        self.config, self.stage, self.inputs = config, stage, inputs
        self.policy, self.tokenizer, self.state = policy, tokenizer, state
        self.knowledge = Knowledge()
        self.scorer: Scorer | None = None
        self.exact: list[Prompt] = []
        self.open: list[Prompt] = []
        self.unverified: list[Prompt] = []
        self.judge: AnswerJudge | None = None
        self.taster: LikingJudge | None = None
        self.flip_rate = FLIP_RATE

    def decisions(self, number: int) -> dict[str, Any]:
        """Return what a round decided; nothing where it left no file."""
        path = self.stage.path / decisions_file(number)
        return files.read_json(path) if path.exists() else {}

    @cached_property
    def held_out(self) -> list[Prompt]:
        """Prompts that show, at the end of every round, what training does where it never looked.

        None where labels decide every reward of an exact prompt: what is verified cannot be over-optimised, and prompts
        held out are prompts not learned from. But ``rl.interpolate`` chooses by them.
        """
        rl = self.config.rl
        watched = bool(rl.held_out_patience and rl.unverified_share)
        if not watched and not rl.interpolate:
            return []
        found = held_out_prompts(self.inputs.pool, self.inputs.held_out, self.inputs.ledger.labels())
        if rl.interpolate and len(found) < FEWEST_TO_CHOOSE:
            log.warning(
                "rl.interpolate: the stage will end without it, since %d held-out prompts were verified before it "
                "began and %d are needed; raise reward.labels", len(found), FEWEST_TO_CHOOSE,
            )  # fmt: skip
            return found if watched else []
        return found

    @cached_property
    def pool(self) -> list[Prompt]:
        """All other prompts."""
        held_out = {prompt.id for prompt in self.held_out}
        return [prompt for prompt in self.inputs.pool if prompt.id not in held_out]

    def prepare(self) -> None:
        """Refit the reward model on all labels so far, and sort the pool into what can be trained on."""
        self.inputs.archive.load(self.stage.path / samples_file(self.state.round))
        labels = [label for label in self.inputs.ledger.labels() if label.round <= self.state.round]
        self.knowledge = Knowledge(labels)
        if self.config.targeting.update == "targeted" and self.judge is None:
            self.judge = self.fit_judge(labels)
        self.state.anchors = still_trusted(self.state.anchors, self.knowledge)
        self.exact = [p for p in self.pool if p.task == "exact" and self.knowledge.right_answer(p.id) is not None]
        self.unverified = [p for p in self.pool if p.task == "exact" and self.knowledge.right_answer(p.id) is None]
        preferences = any(label.kind == "preference" for label in labels)
        self.open = [p for p in self.inputs.pool if p.task == "open"] if preferences else []
        unscored = self.config.rl.unverified_share and self.config.rl.unverified_reward == "reward_model"
        if self.open and self.taster is None:
            self.taster = self.fit_taster(labels)
        if self.taster is not None:  # what an anchor holds still, no estimated reward is to move
            held = {anchor.prompt_id for anchor in self.state.anchors}
            kinds = self.decisions(self.state.round).get(OPEN_KINDS)  # None: nobody asked which
            self.open = [p for p in self.open if p.id not in held and (kinds is None or p.kind in kinds)]
        if unscored or (self.open and self.taster is None):
            self.scorer = self.inputs.refit(*self.inputs.archive.apply(labels))
        if self.exact or self.open:
            return
        trusted, share = len(self.trusted()), self.config.rl.unverified_share
        if not trusted and not (self.unverified and share):
            none = "no open prompt is of a kind that they tell apart" if preferences else "there are no preferences"
            raise UserError(
                f"rl: no prompt can be learned from: no verdict found a right answer and {none}; "
                f"raise targeting.budget={self.config.targeting.budget}, improve the SFT model first, or let the "
                "reward model decide, less its uncertainty: rl.unverified_share=0.5; first delete the folder "
                f"{self.stage.path} (labels already bought are kept)"
            )
        scored = (
            f"; else the reward model decides, less its uncertainty (rl.unverified_share={share:g})" if share else ""
        )
        log.warning(
            "round %d: no right answer is known yet, so it learns on unverified prompts alone, %d of which the answer "
            "model judges with trust%s",
            self.state.round, trusted, scored,
        )  # fmt: skip

    def sample_groups(self) -> list[Group]:
        """Draw this step's prompts, sample them and score the samples."""
        config, step = self.config, self.state.step
        rl = config.rl
        prompts = draw_prompts(self, numpy_rng(self.config.seed, "rl", "prompts", step))
        seed = derive_seed(self.config.seed, "rl", "rollouts", step)
        sampled = sample_as(self.policy, self.tokenizer, prompts, Sampling.of(rl, rl.samples_per_prompt), seed)
        ids = [encode_prompt(self.tokenizer, prompt.messages) for prompt in prompts]
        judged = self._judge(prompts, sampled) | self._taste(prompts, sampled)
        groups = score_groups(prompts, ids, sampled, self.knowledge, self.scorer, rl, judged)
        for group in groups:
            name = group.prompt.id
            if group.prompt.task != "exact":
                continue
            expected = None
            if all(group.verified):
                self.state.pass_rates[name] = float(np.mean([reward > 0.5 for reward in group.rewards]))
            else:
                if name in judged and self.judge is not None:
                    self.state.outlook[name] = float(np.mean(judged[name].rewards)), max(judged[name].trust)
                expected = expected_rate(self.state.outlook, name, config.targeting.least_trust)
            note_samples(self.state, name, group.rollouts, self.knowledge, expected)
        return groups

    def _judge(self, prompts: Sequence[Prompt], sampled: Sequence[Sequence[Rollout]]) -> dict[str, Judgement]:
        """Return rewards and trust of the exact prompts that neither labels nor the reward model decide.

        Under a targeted update that is the answer model's part; where people err often, also on verified prompts. What
        it is not expected to tell is the reward model's part, where ``rl.unverified_share`` asks for such prompts. A
        prompt none of whose advantages reaches ``targeting.least_trust`` is skipped: no trust in any.
        """
        config, rng = self.config, numpy_rng(self.config.seed, "rl", "judge", self.state.step)
        trusted = {prompt.id for prompt in self.trusted()}
        scored = config.rl.unverified_share and config.rl.unverified_reward == "reward_model"
        undecided = []
        for i, prompt in enumerate(prompts):
            if prompt.task != "exact":
                continue
            if self.knowledge.right_answer(prompt.id) is not None:
                if self.judge is not None and self.flip_rate > NOISY:
                    undecided.append(i)
            elif prompt.id in trusted or not scored:
                undecided.append(i)
        if not undecided:
            return {}
        asked, samples = [prompts[i] for i in undecided], [sampled[i] for i in undecided]
        if self.judge is not None:
            least = config.targeting.least_trust
            found = self.judge.judge(asked, samples, rng)
            found = [x if max(x.trust) >= least else Judgement(x.rewards, (0.0,) * len(x.trust)) for x in found]
        elif config.rl.unverified_reward == "majority":
            found = [majority(rollouts, self.knowledge) for rollouts in samples]
        elif config.rl.unverified_reward == "random":
            found = [Judgement(tuple(rng.random(len(x)).round().tolist()), (1.0,) * len(x)) for x in samples]
        else:
            return {}
        return {prompt.id: judgement for prompt, judgement in zip(asked, found, strict=True)}

    def _taste(self, prompts: Sequence[Prompt], sampled: Sequence[Sequence[Rollout]]) -> dict[str, Judgement]:
        """Return rewards and trust of the open prompts, by the model of preferences of a targeted update."""
        places = [i for i, prompt in enumerate(prompts) if prompt.task == "open"]
        if self.taster is None or not places:
            return {}
        asked = [prompts[i] for i in places]
        rng = numpy_rng(self.config.seed, "rl", "taste", self.state.step)
        judged, outlook = self.taster.judge(asked, [sampled[i] for i in places], rng)
        self.state.liking |= {prompt.id: seen for prompt, seen in zip(asked, outlook, strict=True)}
        return {prompt.id: judgement for prompt, judgement in zip(asked, judged, strict=True)}

    def fit_taster(self, labels: Sequence[Label]) -> LikingJudge | None:
        """Fit the model of preferences to labels; None where the update is not targeted, or before any candidates."""
        if self.config.targeting.update != "targeted" or not comparisons(labels):
            return None
        taster = self.new_taster()
        if taster is None or not taster.load():
            return None
        taster.fit(self.inputs.pool, labels)
        return taster

    def new_taster(self) -> LikingJudge | None:
        """Return a model of preferences that knows nothing yet; None where nothing reads responses for it."""
        if self.inputs.liking is None:
            return None
        return LikingJudge(self.inputs.liking, self.stage.path, self.inputs.pair_cache)

    def fit_judge(self, labels: Sequence[Label]) -> AnswerJudge | None:
        """Fit the answer model to labels; None before any candidates were sampled."""
        judge = self.new_judge()
        if judge is None or not judge.load():
            return None
        verdicts = verdicts_of(labels)
        prompts = [p for p in self.inputs.pool if p.id in verdicts]
        judge.fit(prompts, [self.inputs.archive.sampled(p.id) for p in prompts], verdicts)
        self.flip_rate = judge.flip_rate
        return judge

    def new_judge(self) -> AnswerJudge | None:
        """Return an answer model that knows nothing yet; None where nothing reads responses for it."""
        if self.inputs.features is None:
            return None
        return AnswerJudge(self.inputs.features, self.stage.path, self.inputs.feature_cache)

    def trusted(self) -> list[Prompt]:
        """Return the prompts that no label decides and that the answer model is expected to tell something about.

        Without the anchors: what they hold still, no estimate is to move.
        """
        if self.judge is None:
            return []
        least, outlook = self.config.targeting.least_trust, self.state.outlook
        held = {anchor.prompt_id for anchor in self.state.anchors}
        return [p for p in self.unverified if p.id in outlook and p.id not in held and outlook[p.id][1] >= least]


def majority(rollouts: Sequence[Rollout], knowledge: Knowledge) -> Judgement:
    """Reward the most frequent answer that no label has ruled out, as if it were right: no labels are needed.

    Test-time RL, Zuo et al. 2025, https://arxiv.org/abs/2504.16084.
    """
    answers = [
        r.answer if r.finished and knowledge.known(r.prompt_id, r.answer) is not False else None for r in rollouts
    ]
    counts = Counter(answer for answer in answers if answer is not None)
    top = max(counts, key=lambda answer: (counts[answer], answer), default=None)
    return Judgement(tuple(float(x is not None and x == top) for x in answers), (1.0,) * len(rollouts))
