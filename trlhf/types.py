"""The words that every stage shares. No torch here.

Axes, used in every tensor annotation of this library:
``B`` batch, ``P`` prompt, ``R`` response, ``T = P + R`` sequence, ``V`` vocabulary, ``G`` group (samples of one
prompt), ``K`` heads of the reward ensemble, ``D`` hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypedDict

LabelKind = Literal["verdict", "preference", "gold"]
Outcome = Literal["right", "wrong", "A", "B", "tie"]


class Message(TypedDict):
    """One turn of a chat, in the Hugging Face convention."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Prompt:
    """A chat that waits for a response. It never carries its gold answer: training must not see it.

    Attributes:
        id: unique within its data set and stable between runs.
        messages: the chat so far; the last message is the user's.
        kind: family of the prompt (``"money"``, ``"fact"``, ``"gsm8k"``); free text, used for tables and diversity.
        task: ``"exact"``: the response ends in an answer that can be right or wrong; ``"open"``: a matter of taste.
        reasoning: whether it needs thinking (so that the model should plan first).
    """

    id: str
    messages: tuple[Message, ...]
    kind: str = "prompt"
    task: Literal["exact", "open"] = "exact"
    reasoning: bool = True


@dataclass(frozen=True)
class Demonstration:
    """A chat that ends in the assistant's turn, to be imitated; ``source`` says where it came from (``file:line``)."""

    messages: tuple[Message, ...]
    source: str = ""
    kind: str = "demonstration"


@dataclass(frozen=True)
class Rollout:
    """One sampled response.

    Attributes:
        prompt_id: the prompt's id.
        text: the response, without EOS and without surrounding white space.
        token_ids: the response's tokens, EOS included when it was sampled; length R.
        logprobs: the sampler's own log-probability of each token, in nats, at the sampling temperature; length R.
        finished: whether EOS was sampled before the length limit.
        answer: the canonical final answer (``evaluation.answers.extract_answer``), None if there is none.
    """

    prompt_id: str
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finished: bool = True
    answer: str | None = None


@dataclass(frozen=True)
class Question:
    """What a labeller is asked, once.

    Attributes:
        kind: ``verdict``: is the first response's final answer right?; ``preference``: which of two responses is
            better?; ``gold``: what is the right answer?
        prompt: the chat in question.
        responses: one text for a verdict, two (A, B) for a preference, none for gold.
        answer: for a verdict, the canonical final answer that the verdict is about.
        why: why it was asked, in words a person can read.
        round: round of the rl stage, 0 for the reward stage.
        repeat: 0 for the first time; a deliberate repeat (order swapped, say) counts up and is paid again.
    """

    kind: LabelKind
    prompt: Prompt
    responses: tuple[str, ...] = ()
    answer: str | None = None
    why: str = ""
    round: int = 0
    repeat: int = 0


@dataclass(frozen=True)
class Label:
    """A question with its outcome: ``right`` / ``wrong``, ``A`` / ``B`` / ``tie``, or the gold answer itself."""

    kind: LabelKind
    prompt_id: str
    responses: tuple[str, ...]
    answer: str | None
    outcome: str
    labeler: str
    cost: float
    why: str
    round: int
    repeat: int = 0
    id: int = 0
    time: float = 0.0


class Labeler(Protocol):
    """Who answers questions: a verifier, a judge, a person, a simulated person."""

    name: str

    def answer(self, questions: Sequence[Question]) -> list[str]:
        """Return one outcome for each question, in order."""
        ...


@dataclass(frozen=True)
class Score:
    """What the reward model thinks of one response, in calibrated units (logit of being right, or of being liked).

    Attributes:
        mean: mean over the heads.
        sd: standard deviation over the heads: the model's own uncertainty.
    """

    mean: float
    sd: float


class Scorer(Protocol):
    """Anything that scores responses: the reward model on disk, or a function of the user's."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Score]:
        """Score ``responses[i]`` as the reply to ``prompts[i]``."""
        ...


@dataclass
class RowReport:
    """What happened to the rows of a data set: nothing vanishes uncounted.

    Attributes:
        source: file or data set.
        read: rows read.
        kept: rows used.
        dropped: reason → the places (``file:line``) of the rows left out for it.
    """

    source: str
    read: int = 0
    kept: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, place: str) -> None:
        """Count a row as left out."""
        self.dropped.setdefault(reason, []).append(place)

    def describe(self) -> str:
        """Say in words how many rows were kept, and for each reason which ones were not."""
        lines = [f"{self.source}: {self.kept} of {self.read} rows used"]
        for reason, places in self.dropped.items():
            shown = ", ".join(places[:5]) + (f" and {len(places) - 5} more" if len(places) > 5 else "")
            lines.append(f"  left out {len(places)}: {reason} ({shown})")
        return "\n".join(lines)
