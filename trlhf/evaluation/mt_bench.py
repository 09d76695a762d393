"""MT-Bench: two-turn questions, every answer rated from 1 to 10 by a judge.

Zheng et al. 2023, https://arxiv.org/abs/2306.05685: single-answer grading, a reference answer where there is one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trlhf import files
from trlhf.config import EvaluationConfig
from trlhf.errors import UserError
from trlhf.evaluation.judge import Judge
from trlhf.evaluation.means import clustered_mean
from trlhf.evaluation.statistics import Estimate
from trlhf.models import encode_prompt
from trlhf.rollout import Sampling, sample_responses
from trlhf.rows import Row, read_rows, spoken
from trlhf.seeding import torch_generator
from trlhf.types import Message, Prompt

# The temperature of the answers by category, as https://github.com/lm-sys/FastChat sets it; other categories: 0.7.
TEMPERATURES = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}
OTHER_TEMPERATURE = 0.7
OWN_PROMPTS = Path(__file__).with_name("mt_bench_prompts.yaml")
PROMPTS = ("system", "first", "first_reference", "second", "second_reference")
Answers = dict[str, list[str]]  # question → the model's answers, one a turn


@dataclass(frozen=True)
class TwoTurns:
    """A question with its follow-up.

    Attributes:
        id: its number.
        category: ``writing``, ``math`` …
        turns: what the user says, twice.
        references: right answers, one a turn; () where there are none.
    """

    id: str
    category: str
    turns: tuple[str, str]
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rated:
    """What the judge said of all answers.

    Attributes:
        estimate: mean rating, clustered by question; None without any rating.
        parts: mean rating by turn and by category.
        unjudged: answers without a rating; they count neither way.
        reasons: why, with how often.
        too_long: questions that leave no room for an answer; they are not rated.
        samples: one row an answer.
    """

    estimate: Estimate | None
    parts: Mapping[str, Estimate]
    unjudged: int
    reasons: Mapping[str, int]
    too_long: int
    samples: Sequence[dict[str, Any]]


def two_turns_from_rows(rows: Sequence[Row]) -> list[TwoTurns]:
    """Read questions: ``turns`` or ``prompt`` (two texts), ``category``, and perhaps ``reference`` (a list).

    Raises:
        UserError: a row has no two turns; it names the line.
    """
    questions = []
    for row in rows:
        turns = row.data.get("turns") or row.data.get("prompt")
        if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(x, str) and x.strip() for x in turns):
            raise UserError(f"{spoken(row.place)}: 'turns' (or 'prompt') must be a list of two texts")
        number = row.data.get("question_id") or row.data.get("prompt_id") or row.place
        references = tuple(str(text) for text in row.data.get("reference") or ())
        questions.append(TwoTurns(str(number), str(row.data.get("category") or ""), (turns[0], turns[1]), references))
    return questions


def load_prompts(path: str | None) -> dict[str, str]:
    """Read the judge's prompts: ours, or a YAML file's.

    Raises:
        UserError: the file lacks one, or one asks for something that there is not.
    """
    import yaml

    file = OWN_PROMPTS if path is None else Path(path).expanduser()
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
        prompts = {name: str(found[name]) for name in PROMPTS}
        blank = dict.fromkeys(("question", "answer", "reference", "question_2", "answer_2", "reference_2"), "")
        for text in prompts.values():
            text.format(**blank)
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"evaluation.mt_bench.prompts={file}: not usable ({type(error).__name__}: {error}); it needs the texts "
            f"{', '.join(PROMPTS)}, with {{question}}, {{answer}}, {{reference}} and the same with _2 in them"
        ) from error
    return prompts


def answer_two_turns(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[TwoTurns],
    config: EvaluationConfig,
    seed: int,
    advance: Callable[[int], None] = lambda done: None,
) -> Answers:
    """Let a model answer both turns of every question, at the temperature of its category; too long ones are left out.

    Raises:
        UserError: no question leaves room for an answer.
    """
    answers: Answers = {question.id: [] for question in questions}
    limit, new_tokens = int(model.config.max_position_embeddings), config.mt_bench.max_new_tokens
    for turn in (0, 1):
        asked: dict[float, list[Prompt]] = {}
        for question in questions:
            if question.id not in answers:
                continue
            chat = chat_of(question, answers[question.id])
            if len(encode_prompt(tokenizer, chat)) + new_tokens > limit:
                del answers[question.id]
                continue
            temperature = TEMPERATURES.get(question.category, OTHER_TEMPERATURE)
            asked.setdefault(temperature, []).append(Prompt(question.id, chat, question.category, "open", False))
        for temperature, prompts in sorted(asked.items()):
            sampling = Sampling(temperature, new_tokens, 1, config.batch_size)
            generator = torch_generator(seed, "mt-bench", turn, str(temperature))
            for (rollout,) in sample_responses(model, tokenizer, prompts, sampling, generator, advance):
                answers[rollout.prompt_id].append(rollout.text)
    if not answers:
        raise UserError(
            f"evaluation.mt_bench.max_new_tokens={new_tokens} leaves no room for a question in the {limit} tokens of "
            "the model's context; lower it"
        )
    return answers


def chat_of(question: TwoTurns, answers: Sequence[str]) -> tuple[Message, ...]:
    """Return the conversation up to the user's next turn."""
    chat: list[Message] = []
    for turn, text in enumerate(question.turns[: len(answers) + 1]):
        chat.append({"role": "user", "content": text})
        if turn < len(answers):
            chat.append({"role": "assistant", "content": answers[turn]})
    return tuple(chat)


def judge_request(question: TwoTurns, answers: Sequence[str], turn: int, prompts: Mapping[str, str]) -> list[Message]:
    """Return what the judge is asked about one answer."""
    name = ("first", "second")[turn] + ("_reference" if len(question.references) > turn else "")
    references = (*question.references, "", "")
    content = prompts[name].format(
        question=question.turns[0],
        answer=answers[0],
        reference=references[0],
        question_2=question.turns[1],
        answer_2=answers[1],
        reference_2=references[1],
    )
    return [{"role": "system", "content": prompts["system"]}, {"role": "user", "content": content}]


def rate_answers(
    questions: Sequence[TwoTurns],
    answers: Answers,
    judge: Judge,
    prompts: Mapping[str, str],
    confidence: float,
    seed: int,
    advance: Callable[[int], None] = lambda done: None,
) -> Rated:
    """Have every answer rated; what the judge cannot rate is left out of the means, and counted."""
    answered = [question for question in questions if question.id in answers]
    pairs = [(question, turn) for question in answered for turn in (0, 1)]
    requests = [judge_request(question, answers[question.id], turn, prompts) for question, turn in pairs]
    ratings = judge.rate(requests, advance)
    samples = [
        {
            "question": question.id,
            "category": question.category,
            "turn": turn + 1,
            "prompt": question.turns[turn],
            "response": answers[question.id][turn],
            **asdict(rating),
        }
        for (question, turn), rating in zip(pairs, ratings, strict=True)
    ]
    reasons = Counter(rating.error for rating in ratings if rating.error is not None)

    def mean(kept: Sequence[bool]) -> Estimate | None:
        rated = [
            (rating.value, question.id)
            for (question, _), rating, keep in zip(pairs, ratings, kept, strict=True)
            if rating.value is not None and keep
        ]
        values, clusters = [value for value, _ in rated], [name for _, name in rated]
        return clustered_mean(values, clusters, confidence, seed) if rated else None

    parts = {f"turn {which + 1}": mean([turn == which for _, turn in pairs]) for which in (0, 1)}
    for category in dict.fromkeys(question.category for question in answered):
        parts[category] = mean([question.category == category for question, _ in pairs])
    return Rated(
        estimate=mean([True] * len(pairs)),
        parts={name: part for name, part in parts.items() if part is not None},
        unjudged=sum(rating.value is None for rating in ratings),
        reasons=reasons,
        too_long=len(questions) - len(answered),
        samples=samples,
    )


def load_two_turns(config: EvaluationConfig) -> list[TwoTurns]:
    """Read the questions that the configuration names, the first ``limit`` of them."""
    source = config.mt_bench.questions
    if config.mirror is not None and (Path(config.mirror).expanduser() / source).is_dir():
        source = str(Path(config.mirror).expanduser() / source)
    return two_turns_from_rows(read_rows(source))[: config.limit or None]


def remembered_answers(path: Path, of: object, make: Callable[[], Answers]) -> Answers:
    """Return the answers that are on disk for this very model and these questions, or make and save them."""
    if path.exists():
        kept = files.read_json(path)
        if kept["of"] == files.jsonable(of):
            return dict(kept["answers"])
    answers = make()
    files.write_json(path, {"of": of, "answers": answers})
    return answers
