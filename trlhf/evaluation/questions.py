"""Questions with known answers, for our own engine: from files, mirrors and the hub, numbers and multiple choice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trlhf.chats import MalformedRow, chat_from_row, context_of
from trlhf.console import quiet_libraries
from trlhf.data import GOLD_COLUMNS, final_answer_of
from trlhf.errors import UserError
from trlhf.evaluation.answers import canonical_answer, extract_answer, same_answer
from trlhf.evaluation.mirror import mirrored
from trlhf.evaluation.suites import SuiteTask
from trlhf.rows import Row, read_rows, spoken
from trlhf.types import Prompt, RowReport

INSTRUCTION = "Choose one of the options, and end with: The answer is (letter)."


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        prompt: what the model is asked.
        answers: what counts as right: the answer, or an option's letter and the option itself.
        options: number of options; 0 for an open question.
    """

    prompt: Prompt
    answers: tuple[str, ...]
    options: int = 0

    def right(self, answer: str | None) -> bool:
        """Say whether an answer is right; letters and numbers by their canonical form, mathematics by math-verify."""
        return answer is not None and any(same_answer(answer, gold) for gold in self.answers)


def load_questions(task: SuiteTask, mirror: str | None, file: str | None) -> tuple[list[Question], list[RowReport]]:
    """Load a task's questions.

    Args:
        task: of a suite that our own engine asks.
        mirror: folder with copies of hub data sets; None: the hub.
        file: what the task without a data set of its own reads.

    Raises:
        UserError: the data cannot be read, or a question has no answer.
    """
    if not task.data:
        return questions_from_rows(read_rows(file or "", "test"), str(file), task.name)
    questions: list[Question] = []
    reports: list[RowReport] = []
    for configuration in task.configurations:
        name = f"{task.data}:{configuration}"
        found, report = questions_from_rows(list(_hub_rows(task.data, configuration, mirror)), name, task.name)
        questions += found
        reports += report
    return questions, reports


def questions_from_rows(rows: Sequence[Row], source: str, kind: str) -> tuple[list[Question], list[RowReport]]:
    """Turn rows into questions.

    A row holds a chat in any of the usual shapes and the answer in ``answer``, ``gold``, ``final_answer`` or
    ``target``; or ``problem`` and ``solution`` (MATH); or ``question`` with ``options`` and ``label`` (AGIEval) or with
    ``choices`` and ``answerKey`` (ARC).

    Raises:
        UserError: a question has no answer, or no row is a question.
    """
    report = RowReport(source, len(rows))
    questions = []
    for row in rows:
        try:
            questions.append(_question(row, kind))
        except MalformedRow as error:
            report.drop(str(error), row.place)
    report.kept = len(questions)
    if not questions:
        raise UserError(
            f"{source}: no row is a question; give each row 'question' (or 'messages', 'prompt' …) and 'answer', or "
            f"'question', 'options' and the right one's letter in 'label'\n{report.describe()}"
        )
    return questions, [report]


def _question(row: Row, kind: str) -> Question:
    data = row.data
    if data.get("options"):
        texts = [str(option) for option in data["options"]]
        labels = [chr(ord("A") + place) for place in range(len(texts))]
        return _choice(row, kind, labels, [_without_letter(text) for text in texts], data.get("label"))
    if isinstance(data.get("choices"), Mapping) and "answerKey" in data:
        choices = data["choices"]
        return _choice(row, kind, [str(label) for label in choices["label"]], list(choices["text"]), data["answerKey"])
    if isinstance(data.get("problem"), str) and isinstance(data.get("solution"), str):
        return _open(row, kind, {"question": data["problem"]}, extract_answer(data["solution"]))
    gold = next((str(data[name]) for name in GOLD_COLUMNS if data.get(name) not in (None, "", [])), None)
    chat = {key: value for key, value in data.items() if key not in GOLD_COLUMNS}
    return _open(row, kind, chat, None if gold is None else final_answer_of(gold))


def _open(row: Row, kind: str, chat: Mapping[str, Any], gold: str | None) -> Question:
    messages = context_of(chat_from_row(chat))
    if not gold:
        raise UserError(
            f"{spoken(row.place)}: no answer, so the response to it could not be marked; give it a column "
            f"{', '.join(map(repr, GOLD_COLUMNS))}"
        )
    return Question(Prompt(row.place, messages, kind), (gold,))


def _choice(row: Row, kind: str, labels: Sequence[str], texts: Sequence[str], right: Any) -> Question:
    if right not in labels or not isinstance(row.data.get("question"), str):
        raise MalformedRow(f"{right!r} is not the letter of one of the {len(labels)} options of a 'question'")
    passage = str(row.data.get("passage") or "").strip()
    lines = [f"({label}) {text}" for label, text in zip(labels, texts, strict=True)]
    content = "\n".join([*([passage] if passage else []), row.data["question"].strip(), *lines, INSTRUCTION])
    place = labels.index(right)
    answers = [str(right)]
    if [canonical_answer(text) for text in texts].count(canonical_answer(texts[place])) == 1:
        answers.append(texts[place])  # it may write out the option instead
    return Question(Prompt(row.place, ({"role": "user", "content": content},), kind), tuple(answers), len(labels))


def _without_letter(option: str) -> str:
    """Return an option without its own "(A)" in front."""
    return option[3:].strip() if option[:1] == "(" and option[2:3] == ")" else option.strip()


def _hub_rows(name: str, configuration: str, mirror: str | None) -> Iterator[Row]:
    import datasets

    quiet_libraries()
    path, cache = mirrored(mirror, name) if mirror else (name, None)
    try:
        data = datasets.load_dataset(path, configuration, split="test", cache_dir=cache)
    except Exception as error:  # datasets, the hub and the network each raise kinds of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{name}: configuration {configuration} of {path} cannot be read ({reason}); "
            + ("correct that copy" if mirror else "check the connection, or give copies with evaluation.mirror=FOLDER")
        ) from error
    for number, row in enumerate(data, start=1):
        yield Row(f"{name.rpartition('/')[2]} {configuration} test {number}", dict(row))
