"""Which verdicts a round asks for: by the answer model, or on the top answers alone; and when it asks no more."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from trlhf import files
from trlhf.config import TargetingConfig
from trlhf.knowledge import Knowledge
from trlhf.rl.ask import (
    UNIFORM,
    Chosen,
    Outlook,
    check_uncertainty,
    choose_repeats,
    choose_targeted,
    may_be_asked,
    typical_rollouts,
)
from trlhf.rl.ask_pairs import implicit_rewards
from trlhf.rl.judge import settled
from trlhf.rl.label_gain import label_gains, two_predictions
from trlhf.rl.round import Round
from trlhf.targeting import Candidate, choose_verdicts, fit_top_answer_model
from trlhf.targeting.stopping import held_out_gain_covers_zero, labels_buy_too_little
from trlhf.targeting.trust import TrustTest
from trlhf.types import Label, Question

log = logging.getLogger("trlhf")
BY_ANSWERS = ("v_optimal", "d_optimal", "max_entropy", "double_thompson", "apl", "least_agreed", "scrambled")
PREDICTING = ("v_optimal", "d_optimal", "scrambled")  # those that say what a label is worth
LEAST_TESTED = 16  # uniform verdicts from which the uncertainty is tested; before, it is taken on credit


def idle_stop_rules(targeting: TargetingConfig) -> list[str]:
    """Return those of ``targeting.stop_rules`` that never act under the acquisition, whose figures they need."""
    able = {"labels_buy_too_little": PREDICTING, "held_out_gain_covers_zero": BY_ANSWERS}
    return [rule for rule in targeting.stop_rules if targeting.acquisition not in able[rule]]


def predictions_file(number: int) -> str:
    """Return the name of the file with what was predicted of a round's verdicts before they were bought."""
    return f"round_{number:02d}_predictions.jsonl"


@dataclass
class VerdictChooser:
    """What a round's choice of verdicts rests on.

    Attributes:
        trainer: the round.
        candidates: exact prompts with samples.
        outlook: what the answer model says of them; None where there is none.
        labels: of earlier rounds.
        rng: of all chance.
        decided: what goes into the round's file about the choice; it is added to.
    """

    trainer: Round
    candidates: Sequence[Candidate]
    outlook: Outlook | None
    labels: Sequence[Label]
    rng: np.random.Generator
    decided: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.knowledge = Knowledge(self.labels)
        self.number = self.trainer.state.round

    @property
    def targeting(self) -> TargetingConfig:
        """The configuration of the choice."""
        return self.trainer.config.targeting

    def choose(self, count: int) -> list[Question]:
        """Choose ``count`` verdicts; what is predicted of them is on disk before any is bought."""
        if self.targeting.acquisition not in BY_ANSWERS or self.outlook is None:
            return self._on_top_answers(count)
        chosen = self._by_answer_model(self.outlook, count)
        self.trainer.stage.write_jsonl(predictions_file(self.number), [verdict.row() for verdict in chosen])
        return [verdict.question for verdict in chosen]

    def _on_top_answers(self, count: int) -> list[Question]:
        """Choose verdicts on top answers: at random, or by P(right) and P(mixed group)."""
        candidates, coefficients = self.candidates, None
        if self.outlook is not None and self.targeting.gate:
            self._allowed(self.outlook)
            refused = {name for names in self.outlook.refused.values() for name in names}
            candidates = [candidate for candidate in candidates if candidate.prompt.id not in refused]
        if self.targeting.acquisition == "frontier":
            shares, right = self.trainer.inputs.archive.shares(self.labels)
            coefficients = fit_top_answer_model(np.array(shares), np.array(right))
        self.decided["top_answer_model"] = None if coefficients is None else coefficients.tolist()
        if self.targeting.label_prompts == "frontier":
            candidates = [c for c in candidates if len({r.answer for r in c.rollouts}) > 1]
        group = self.trainer.config.rl.samples_per_prompt
        return choose_verdicts(candidates, self.knowledge, count, coefficients, group, self.rng, self.number)

    def _by_answer_model(self, outlook: Outlook, count: int) -> list[Chosen]:
        """Choose targeted verdicts, a uniform slice and repeats; without trust in the model, all at random."""
        targeting, decided = self.targeting, self.decided
        known = {prompt.id: prompt for prompt in self.trainer.pool}
        repeats = choose_repeats(self.labels, known, round(count * targeting.repeat_share), self.rng, self.number)
        count -= len(repeats)
        at_random = round(count * targeting.uniform_share)
        test = self._trust()
        if test is not None and not test.passed:
            at_random = count
            decided["fallback"] = f"labels at random in this round: {test.words}"
        decided["trust_test"] = test.words if test else f"not tested yet: fewer than {LEAST_TESTED} uniform verdicts"
        uniform = self._at_random(outlook, at_random)
        taken = {verdict.question.prompt.id for verdict in uniform}
        allowed = self._allowed(outlook)
        names = [self.candidates[outlook.table.places[p]].prompt.id for p in outlook.table.answers.prompts]
        allowed &= np.array([name not in taken for name in names], bool)
        if targeting.acquisition == "apl":
            owners = [self.candidates[outlook.table.places[n]].prompt for n in outlook.table.answers.prompts]
            outlook.implicit = implicit_rewards(self.trainer, owners, typical_rollouts(outlook.table, self.candidates))
        targeted = choose_targeted(
            outlook, allowed, self.candidates, count - len(uniform), targeting.acquisition, self.trainer.flip_rate,
            self.rng, self.number,
        )  # fmt: skip
        values = [verdict.value for verdict in targeted if verdict.value is not None]
        decided["value_per_label"] = settled(float(np.mean(values))) if values else None
        decided["value_of_next_label"] = settled(values[-1]) if values else None
        self._tell()
        if reason := self._enough(outlook, uniform):
            decided["labels_stopped"] = reason
            log.warning("round %d: %s", self.number, reason)
            return []
        return [*targeted, *uniform, *repeats]

    def _allowed(self, outlook: Outlook) -> Bool[ndarray, " C"]:
        """Return which answers may be asked about, and note what the gate refuses."""
        sound = self.knowledge.verifiable_prompts()
        allowed = may_be_asked(outlook, self.candidates, self.knowledge, self.targeting, sound)
        self.decided["refused_by_gate"] = {reason: len(ids) for reason, ids in outlook.refused.items()}
        return allowed

    def _trust(self) -> TrustTest | None:
        """Test the uncertainty on the uniform verdicts of the rounds before; None as long as they are too few."""
        rows = []
        for number in range(1, self.number):
            path = self.trainer.stage.path / predictions_file(number)
            rows += files.read_jsonl(path) if path.exists() else []
        if sum(row["part"] == UNIFORM for row in rows) < LEAST_TESTED:
            return None
        return check_uncertainty(rows, self.labels)

    def _at_random(self, outlook: Outlook, count: int) -> list[Chosen]:
        """Choose prompts at random, and their top answers, with what the model predicts of them."""
        table = outlook.table
        place = {self.candidates[i].prompt.id: n for n, i in enumerate(table.places)}
        chosen = []
        for question in choose_verdicts(self.candidates, self.knowledge, count, None, 2, self.rng, self.number):
            rows = np.flatnonzero(table.answers.prompts == place[question.prompt.id])
            row = next(n for n in rows if table.names[n] == question.answer)
            chosen.append(Chosen(question, UNIFORM, float(outlook.probabilities[row])))
        return chosen

    def _enough(self, outlook: Outlook, uniform: Sequence[Chosen]) -> str | None:
        """Return why no more labels should be bought, by the rules of ``targeting.stop_rules``."""
        rules, left = self.targeting.stop_rules, int(self.trainer.inputs.ledger.remaining)
        reason = None
        if "labels_buy_too_little" in rules:
            earlier = [self.trainer.decisions(number).get("value_per_label") for number in range(1, self.number)]
            drops = [value for value in [*earlier, self.decided["value_per_label"]] if value is not None]
            reason = labels_buy_too_little(drops, left)
        if "held_out_gain_covers_zero" in rules:
            two = two_predictions(self.trainer, self.candidates, outlook, uniform, self.labels)
            self.decided["uniform_slice"] = two
            reason = reason or held_out_gain_covers_zero(label_gains(self.trainer, self.labels), left)
        return reason

    def _tell(self) -> None:
        """Say in the log what was decided, and why."""
        decided = self.decided
        refused = ", ".join(f"{count} for {reason}" for reason, count in decided["refused_by_gate"].items())
        worth = decided["value_per_label"]
        log.info(
            "round %d: trust in the uncertainty: %s; refused by the gate: %s%s",
            self.number, decided.get("fallback", decided["trust_test"]), refused or "nothing",
            "" if worth is None else f"; a label is expected to resolve {worth:.2f} prompts, the next one "
            f"{decided['value_of_next_label']:.2f}",
        )  # fmt: skip
