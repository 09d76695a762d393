"""One round: candidates → labels → what can be trained on → groups with rewards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from trlhf.config import Config
from trlhf.console import progress as progress_bar
from trlhf.data import LabelledPair, LabelledResponse
from trlhf.errors import UserError
from trlhf.knowledge import Knowledge
from trlhf.labelling import Archive, settle_questions
from trlhf.ledger import Ledger
from trlhf.models import encode_prompt
from trlhf.rl.anchors import find_anchors, still_trusted
from trlhf.rl.checkpoint import Progress
from trlhf.rl.experience import Group, score_groups
from trlhf.rl.held_out import held_out_prompts
from trlhf.roles import Role, Roles
from trlhf.rollout import Sampling, sample_responses
from trlhf.run import StageDirectory
from trlhf.seeding import numpy_rng, python_rng, torch_generator
from trlhf.targeting import (
    Candidate,
    choose_pairs,
    choose_verdicts,
    fit_top_answer_model,
    training_weights,
)
from trlhf.types import Labeler, Prompt, Question, Scorer

log = logging.getLogger("trlhf")
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
    """

    pool: Sequence[Prompt]
    sft: Path
    roles: Roles
    ledger: Ledger
    labeler: Labeler
    archive: Archive
    refit: Refit
    held_out: frozenset[str] = frozenset()


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

    @cached_property
    def held_out(self) -> list[Prompt]:
        """Prompts that show, at the end of every round, what training does where it never looked.

        None where labels decide every reward of an exact prompt: what is verified cannot be over-optimised, and prompts
        held out are prompts not learned from.
        """
        if not self.config.rl.held_out_patience or not self.config.rl.unverified_share:
            return []
        return held_out_prompts(self.inputs.pool, self.inputs.held_out, self.inputs.ledger.labels())

    @cached_property
    def pool(self) -> list[Prompt]:
        """All other prompts."""
        held_out = {prompt.id for prompt in self.held_out}
        return [prompt for prompt in self.inputs.pool if prompt.id not in held_out]

    def buy_labels(self) -> None:
        """Sample candidates, choose what to ask, ask, and note what was decided and why."""
        config, number = self.config, self.state.round
        self.inputs.ledger.ask(self.inputs.ledger.unanswered(), self.inputs.labeler)  # paid before a kill
        labels = self.inputs.ledger.labels()
        before = Knowledge([label for label in labels if label.round < number])
        candidates = self._candidates(before)
        if number == 1:
            held = [*candidates, *self._more_plain({candidate.prompt.id for candidate in candidates})]
            ids = [encode_prompt(self.tokenizer, candidate.prompt.messages) for candidate in held]
            self.state.anchors = find_anchors(held, ids)
        rng = numpy_rng(config.seed, "rl", "choose", number)
        count = int(self.inputs.ledger.remaining // (config.rl.rounds - number + 1))  # an equal share of what is left
        pairs_wanted = round(count * config.targeting.preference_share) if self._has_open() else 0
        coefficients = None
        if config.targeting.strategy == "frontier":
            coefficients = fit_top_answer_model(*self._judged_shares([x for x in labels if x.round < number]))

        def choose() -> list[Question]:
            chosen = choose_pairs(candidates, pairs_wanted, rng, number)
            chosen += choose_verdicts(
                candidates, before, count - len(chosen), coefficients, config.rl.samples_per_prompt, rng, number
            )
            asked = {question.prompt.id for question in chosen}
            new = Archive(self.inputs.pool)
            for candidate in candidates:
                if candidate.prompt.id in asked or before.right_answer(candidate.prompt.id) is not None:
                    new.add(candidate.rollouts, number)
            self.stage.write_jsonl(samples_file(number), new.rows())
            return chosen

        questions = settle_questions(self.stage, f"round_{number:02d}_questions.jsonl", choose)
        bought = self.inputs.ledger.ask(questions, self.inputs.labeler)
        labels = [label for label in self.inputs.ledger.labels() if label.round <= number]  # a replay knows later ones
        knowledge, spent = Knowledge(labels), sum(label.cost for label in labels)
        for candidate in candidates:
            rate = candidate.pass_rate(knowledge) if candidate.prompt.task == "exact" else None
            if rate is not None:
                self.state.pass_rates[candidate.prompt.id] = rate
        right = sum(label.outcome == "right" for label in bought)
        verdicts = sum(label.kind == "verdict" for label in bought)
        decided = {
            "round": number,
            "candidates": len(candidates),
            "labels_bought": len(bought),
            "verdicts": verdicts,
            "right": right,
            "preferences": len(bought) - verdicts,
            "budget_left": max(0.0, self.inputs.ledger.budget - spent),
            "verifiable_prompts": len(knowledge.verifiable_prompts()),
            "top_answer_model": None if coefficients is None else coefficients.tolist(),
            "anchors": len(self.state.anchors),
            "questions": [{"kind": q.kind, "prompt": q.prompt.id, "answer": q.answer, "why": q.why} for q in questions],
        }
        self.stage.write_json(f"round_{number:02d}.json", decided)
        log.info(
            "round %d: %d candidates sampled, %d verdicts bought (%d right), %d preferences; "
            "%d prompts can now be verified, %g labels left",
            number, len(candidates), verdicts, right, len(bought) - verdicts,
            len(knowledge.verifiable_prompts()), self.inputs.ledger.remaining,
        )  # fmt: skip

    def prepare(self) -> None:
        """Refit the reward model on all labels so far, and sort the pool into what can be trained on."""
        self.inputs.archive.load(self.stage.path / samples_file(self.state.round))
        labels = [label for label in self.inputs.ledger.labels() if label.round <= self.state.round]
        self.knowledge = Knowledge(labels)
        self.state.anchors = still_trusted(self.state.anchors, self.knowledge)
        self.exact = [p for p in self.pool if p.task == "exact" and self.knowledge.right_answer(p.id) is not None]
        self.unverified = [p for p in self.pool if p.task == "exact" and self.knowledge.right_answer(p.id) is None]
        preferences = any(label.kind == "preference" for label in labels)
        self.open = [p for p in self.inputs.pool if p.task == "open"] if preferences else []
        if self.config.rl.unverified_share or self.open:
            self.scorer = self.inputs.refit(*self.inputs.archive.apply(labels))
        if self.exact or self.open:
            return
        if not (self.unverified and self.config.rl.unverified_share):
            raise UserError(
                "rl: no prompt can be learned from: no verdict found a right answer and there are no preferences; "
                f"raise targeting.budget={self.config.targeting.budget}, improve the SFT model first, or let the "
                "reward model decide, less its uncertainty: rl.unverified_share=0.5; first delete the folder "
                f"{self.stage.path} (labels already bought are kept)"
            )
        log.warning(
            "round %d: no right answer is known yet, so it learns on unverified prompts alone, where the reward model "
            "decides, less its uncertainty (rl.unverified_share=%g)",
            self.state.round, self.config.rl.unverified_share,
        )  # fmt: skip

    def sample_groups(self) -> list[Group]:
        """Draw this step's prompts, sample them and score the samples."""
        rl, step = self.config.rl, self.state.step
        prompts = self._draw_prompts(numpy_rng(self.config.seed, "rl", "prompts", step))
        generator = torch_generator(self.config.seed, "rl", "rollouts", step)
        sampling = Sampling.of(rl, rl.samples_per_prompt)
        with self.policy.acting() as model:
            sampled = sample_responses(model, self.tokenizer, prompts, sampling, generator)
        ids = [encode_prompt(self.tokenizer, prompt.messages) for prompt in prompts]
        groups = score_groups(prompts, ids, sampled, self.knowledge, self.scorer, rl)
        for group in groups:
            if all(group.verified) and group.prompt.task == "exact":
                self.state.pass_rates[group.prompt.id] = float(np.mean([reward > 0.5 for reward in group.rewards]))
        return groups

    def _draw_prompts(self, rng: np.random.Generator) -> list[Prompt]:
        rl = self.config.rl
        total = rl.prompts_per_step
        unverified = self.unverified if rl.unverified_share else []
        n_open = min(len(self.open), round(total * rl.open_share) if self.exact or unverified else total)
        wanted = min(len(unverified), round(total * rl.unverified_share))
        rates = [self.state.pass_rates.get(prompt.id) for prompt in self.exact]
        weights = training_weights(
            rates,
            min(self.config.targeting.samples_per_prompt, rl.samples_per_prompt),  # a rate comes from either
            rl.samples_per_prompt,
            self.config.targeting.strategy,
        )
        n_exact = min(len(self.exact), max(0, total - n_open - wanted))
        n_unverified = total - n_open - n_exact  # where too few prompts can be verified, more than were asked for
        chosen = (
            [self.exact[i] for i in rng.choice(len(self.exact), n_exact, replace=False, p=weights)] if n_exact else []
        )
        chosen += [self.open[i] for i in rng.permutation(len(self.open))[:n_open]]
        chosen += [unverified[i] for i in rng.permutation(len(unverified))[:n_unverified]]
        return chosen

    def _candidates(self, before: Knowledge) -> list[Candidate]:
        """Sample the round's candidates from the current policy: a random part of the pool.

        The frontier strategy takes first the prompts on which an answer was ruled out and none found right: there the
        policy is known to be wrong, and another verdict can settle what is right.
        """
        config, number = self.config, self.state.round
        rng = python_rng(config.seed, "rl", "candidates", number)
        pool = self.pool
        pinned: list[Prompt] = []
        if config.targeting.strategy == "frontier":
            pinned = [p for p in pool if before.ruled_out(p.id) and before.right_answer(p.id) is None]
            pinned = pinned[: config.targeting.candidates // 2]
        held = {prompt.id for prompt in pinned}
        others = [prompt for prompt in pool if prompt.id not in held]
        prompts = pinned + rng.sample(others, min(config.targeting.candidates - len(pinned), len(others)))
        sampling = Sampling.of(config.rl, config.targeting.samples_per_prompt)
        generator = torch_generator(config.seed, "rl", "candidates", number)
        title = f"round {number}: sampling candidates"
        with self.policy.acting() as model, progress_bar(title, len(prompts)) as advance:
            sampled = sample_responses(model, self.tokenizer, prompts, sampling, generator, advance)
        return [Candidate(prompt, tuple(rollouts)) for prompt, rollouts in zip(prompts, sampled, strict=True)]

    def _more_plain(self, held: Container[str]) -> list[Candidate]:
        """Sample once prompts that need no thinking, as anchors: no reward watches over them."""
        config = self.config
        prompts = [p for p in self.pool if not p.reasoning and p.id not in held]
        most = min(config.targeting.candidates, len(prompts)) if config.rl.anchor_coef else 0
        if not most:
            return []
        prompts = python_rng(config.seed, "rl", "anchors").sample(prompts, most)
        sampling = Sampling.of(config.rl, 1)
        generator = torch_generator(config.seed, "rl", "anchors")
        with self.policy.acting() as model:
            sampled = sample_responses(model, self.tokenizer, prompts, sampling, generator)
        return [Candidate(prompt, tuple(rollouts)) for prompt, rollouts in zip(prompts, sampled, strict=True)]

    def _has_open(self) -> bool:
        return any(prompt.task == "open" for prompt in self.inputs.pool)

    def _judged_shares(self, labels: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Return for each verdict the judged answer's share of the samples then not ruled out, and if it was right."""
        shares, right = self.inputs.archive.shares(labels)
        return np.array(shares), np.array(right)
