"""Every label that was ever asked for: append-only, with the budget, in one SQLite file.

The protocol of :meth:`Ledger.ask`, which survives SIGKILL at any moment: a question is reserved (and paid) in the
transaction that checks the budget; then the labeller is called; then the answers are written, one transaction a batch.
An answered question is never asked or paid again; a question that was paid but not answered is asked again for nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, insert, select

from trlhf.errors import UserError
from trlhf.evaluation.answers import canonical_answer
from trlhf.knowledge import Knowledge
from trlhf.ledger_store import (
    LABEL_COLUMNS,
    Store,
    among,
    answer_table,
    check_same_prompt,
    question_row,
    question_table,
    read_label,
    read_question,
)
from trlhf.types import Label, Labeler, LabelKind, Question

__all__ = ["BudgetExceeded", "Knowledge", "LabelerError", "Ledger", "question_key"]

_COSTS: Mapping[LabelKind, float] = {"verdict": 1.0, "preference": 1.0, "gold": 1.0}
_RESPONSES: Mapping[LabelKind, int] = {"verdict": 1, "preference": 2, "gold": 0}
_OUTCOMES: Mapping[LabelKind, tuple[str, ...]] = {"verdict": ("right", "wrong"), "preference": ("A", "B", "tie")}
_ROUNDING = 1e-9  # costs are floats, their sums are not exact


class BudgetExceeded(UserError):
    """Report that questions cost more than is left; none of them was asked or paid."""


class LabelerError(UserError):
    """Report that a labeller's outcomes cannot be used; the questions stay paid and are asked again for nothing."""


def question_key(question: Question) -> str:
    """Return the stable identity of a question: what it is about, not why or when it is asked.

    A verdict is about an answer cluster: prompt id, canonical answer, repeat (without an answer, about the response's
    text). A preference is about two texts in their order, gold about the prompt.
    """
    about: list[Any] = [question.kind, question.prompt.id, question.repeat]
    if question.kind == "preference":
        about.append(question.responses)
    elif question.kind == "verdict":
        answer = canonical_answer(question.answer or "")
        about.append({"answer": answer} if answer is not None else {"response": question.responses})
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


class Ledger:
    """The labels of one run and the budget that limits them.

    Args:
        path: the SQLite file, made if it does not exist. Several processes may use it at once.
        budget: what all labels may cost together, those from earlier runs of the file included.
        costs: cost of a label by kind, where it differs from 1.
    """

    def __init__(self, path: str | Path, budget: float, costs: Mapping[LabelKind, float] | None = None) -> None:
        if not (math.isfinite(budget) and budget >= 0):
            raise UserError(f"ledger {path}: budget={budget} must be a finite number >= 0")
        self.costs: dict[LabelKind, float] = {**_COSTS, **(costs or {})}
        for kind, cost in self.costs.items():
            if kind not in _COSTS or not (math.isfinite(cost) and cost > 0):
                raise UserError(f"ledger {path}: the cost of {kind}={cost} must be > 0, for one of {', '.join(_COSTS)}")
        self.budget = float(budget)
        self._knowledge, self._known_up_to = Knowledge(), 0
        self._paid, self._paid_up_to = 0.0, 0  # sum of the costs up to a question: it only grows
        self._store = Store(Path(path))
        spent = self.spent
        if spent > self.budget + _ROUNDING:
            self.close()
            raise UserError(
                f"ledger {path}: budget={budget:g} is below the {spent:g} already spent; "
                f"set a budget of at least {spent:g}, or start a new run.dir"
            )

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. All that was asked and answered is on disk already."""
        self._store.close()

    @property
    def spent(self) -> float:
        """What all questions asked so far cost, answered or not."""
        with self._store.reading() as connection:
            return self._spent(connection)

    @property
    def remaining(self) -> float:
        """What is left of the budget."""
        return max(0.0, self.budget - self.spent)

    def ask(self, questions: Sequence[Question], labeler: Labeler, batch_size: int = 32) -> list[Label]:
        """Return one label for each question, in order; only what the ledger does not know yet is asked and paid.

        Questions with the same key (two responses of one answer cluster) get the same label, which tells the response
        it was first bought for. A kill loses no label and at most ``batch_size`` questions have to be asked again.

        Raises:
            BudgetExceeded: the new questions cost more than is left; none of them was asked.
            LabelerError: the labeller returned too few or impossible outcomes; the usable ones are kept.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected >= 1, got {batch_size}")
        wanted: dict[str, Question] = {}
        for question in questions:
            wanted.setdefault(question_key(_checked(question)), question)
        with self._store.reading() as connection:
            unanswered, _ = self._affordable(connection, wanted)
        items = list(unanswered.items())
        for start in range(0, len(items), batch_size):
            if batch := self._reserve(dict(items[start : start + batch_size])):
                self._record(batch, labeler)
        labels = self._labels(among(list(wanted)))
        return [labels[question_key(question)] for question in questions]

    def labels(
        self, kind: LabelKind | None = None, prompt_id: str | None = None, round: int | None = None
    ) -> list[Label]:
        """Return all labels in the order in which they were given, or those of one kind, prompt or round."""
        columns = question_table.c
        wanted = ((columns.kind, kind), (columns.prompt_id, prompt_id), (columns.round, round))
        return list(self._labels(*(column == value for column, value in wanted if value is not None)).values())

    def unanswered(self) -> list[Question]:
        """Return the questions that are paid but were never answered: after a kill, ask these first."""
        query = select(question_table).outerjoin(answer_table).where(answer_table.c.id.is_(None))
        with self._store.reading() as connection:
            return [read_question(row._mapping) for row in connection.execute(query.order_by(question_table.c.id))]

    def knowledge(self) -> Knowledge:
        """Return what all labels so far say about answers; the object grows with the ledger."""
        for label in self._labels(answer_table.c.id > self._known_up_to).values():
            self._knowledge.add(label)
            self._known_up_to = label.id
        return self._knowledge

    def _labels(self, *where: ColumnElement[bool]) -> dict[str, Label]:
        """Return the labels that meet all conditions by key, in the order in which they were given."""
        answer = answer_table.c
        given = (answer.id.label("label"), answer.outcome, answer.labeler, answer.time.label("answered"))
        query = select(*LABEL_COLUMNS, *given).join(answer_table)
        with self._store.reading() as connection:
            rows = connection.execute(query.where(*where).order_by(answer.id))
            return {row.key: read_label(row._mapping) for row in rows}

    def _affordable(
        self, connection: Connection, wanted: Mapping[str, Question]
    ) -> tuple[dict[str, Question], dict[str, Question]]:
        """Return the questions without an answer, and those among them that are new; the budget covers the new ones."""
        query = select(question_table.c.key, question_table.c.prompt, answer_table.c.id).outerjoin(answer_table)
        stored = {row.key: row for row in connection.execute(query.where(among(list(wanted))))}
        for key, row in stored.items():
            check_same_prompt(row.prompt, wanted[key].prompt)
        unanswered = {key: asked for key, asked in wanted.items() if key not in stored or stored[key].id is None}
        new = {key: asked for key, asked in unanswered.items() if key not in stored}
        cost, spent = sum(self.costs[asked.kind] for asked in new.values()), self._spent(connection)
        if new and spent + cost > self.budget + _ROUNDING:
            raise BudgetExceeded(
                f"ledger {self._store.path}: {len(new)} new questions cost {cost:g}, but only "
                f"{max(0.0, self.budget - spent):g} of the budget of {self.budget:g} are left; "
                "ask fewer or raise the budget"
            )
        return unanswered, new

    def _spent(self, connection: Connection) -> float:
        """Add up what was paid since the last look; before a transaction's own questions, which may be rolled back."""
        columns = question_table.c
        sums = select(func.max(columns.id), func.sum(columns.cost)).where(columns.id > self._paid_up_to)
        newest, cost = connection.execute(sums).one()
        if newest is not None:
            self._paid, self._paid_up_to = self._paid + float(cost), int(newest)
        return self._paid

    def _reserve(self, wanted: Mapping[str, Question]) -> dict[str, Question]:
        """Pay for the new ones of these questions; return all that still need an answer."""
        with self._store.writing() as connection:
            unanswered, new = self._affordable(connection, wanted)
            for key, asked in new.items():
                row = {**question_row(asked), "key": key, "cost": self.costs[asked.kind], "time": time.time()}
                connection.execute(insert(question_table).values(row))
        return unanswered

    def _record(self, batch: Mapping[str, Question], labeler: Labeler) -> None:
        """Ask the labeller and write down every outcome that can be used."""
        outcomes = labeler.answer(list(batch.values()))
        if not isinstance(outcomes, Sequence) or isinstance(outcomes, str) or len(outcomes) != len(batch):
            found = f"{len(outcomes)} outcomes" if isinstance(outcomes, Sequence) else repr(outcomes)
            raise LabelerError(
                f"labeler {labeler.name}: expected {len(batch)} outcomes for {len(batch)} questions, got {found}; "
                "none was used, the questions stay paid and are asked again"
            )
        usable = {key: outcome for key, outcome in zip(batch, outcomes, strict=True) if _fits(batch[key], outcome)}
        with self._store.writing() as connection:
            unanswered, _ = self._affordable(connection, batch)  # another process may have been faster
            for key in (key for key in batch if key in unanswered and key in usable):
                row = {"question_key": key, "outcome": usable[key], "labeler": labeler.name, "time": time.time()}
                connection.execute(insert(answer_table).values(row))
        bad = [(batch[key], outcome) for key, outcome in zip(batch, outcomes, strict=True) if key not in usable]
        if bad:
            asked, outcome = bad[0]
            raise LabelerError(
                f"labeler {labeler.name}: {outcome!r} is no outcome of a {asked.kind} question (prompt "
                f"{asked.prompt.id}), expected {_expected(asked.kind)}; {len(bad)} of {len(batch)} outcomes were not "
                "used, their questions stay paid and are asked again"
            )


def _checked(question: Question) -> Question:
    """Refuse what no labeller could answer."""
    expected = _RESPONSES.get(question.kind)
    if expected is None or len(question.responses) != expected or question.repeat < 0:
        raise ValueError(
            f"question about prompt {question.prompt.id}: a {question.kind} question with {len(question.responses)} "
            f"responses and repeat={question.repeat}; expected one of {dict(_RESPONSES)} and repeat >= 0"
        )
    return question


def _fits(question: Question, outcome: object) -> bool:
    if not isinstance(outcome, str):
        return False
    return canonical_answer(outcome) is not None if question.kind == "gold" else outcome in _OUTCOMES[question.kind]


def _expected(kind: LabelKind) -> str:
    return "an answer" if kind == "gold" else " or ".join(map(repr, _OUTCOMES[kind]))
