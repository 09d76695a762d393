"""The ledger: protocol, budget, kills, append-only, what labels imply."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from trlhf.errors import UserError
from trlhf.ledger import BudgetExceeded, Knowledge, LabelerError, Ledger, question_key
from trlhf.types import Label, LabelKind, Prompt, Question

ROOT = Path(__file__).parents[2]


def prompt(name: str = "p0", text: str | None = None) -> Prompt:
    return Prompt(id=name, messages=({"role": "user", "content": text or f"question {name}"},))


def verdict(name: str = "p0", answer: str | None = "5", text: str = "", repeat: int = 0, why: str = "test") -> Question:
    return Question("verdict", prompt(name), (text or f"The answer is {answer}.",), answer, why=why, repeat=repeat)


def verdicts(count: int, start: int = 0) -> list[Question]:
    return [verdict(f"p{i}", str(i)) for i in range(start, start + count)]


class Scripted:
    """Answers from a list (default: always "right") and remembers what it was asked."""

    name = "scripted"

    def __init__(self, outcomes: Sequence[object] | None = None) -> None:
        self.outcomes = outcomes
        self.asked: list[Question] = []

    def answer(self, questions: Sequence[Question]) -> list[str]:
        self.asked += questions
        return ["right"] * len(questions) if self.outcomes is None else self.outcomes  # type: ignore[return-value]


class Dies(Scripted):
    def answer(self, questions: Sequence[Question]) -> list[str]:
        super().answer(questions)
        raise KeyboardInterrupt


def label(
    prompt_id: str, answer: str | None, outcome: str, kind: LabelKind = "verdict", responses: tuple[str, ...] = ()
) -> Label:
    return Label(kind, prompt_id, responses, answer, outcome, "x", 1.0, "", 0)


# The protocol


def test_a_label_keeps_all_that_was_asked_and_is_paid_once(tmp_path: Path) -> None:
    question = Question("verdict", prompt("a"), ("It is 5.",), "5", why="top cluster has half", round=3)
    labeler = Scripted(["wrong"])
    with Ledger(tmp_path / "l.sqlite", budget=2) as ledger:
        (first,) = ledger.ask([question], labeler)
        (again,) = ledger.ask([question], labeler)
        assert first == again == ledger.labels()[0]
        assert (ledger.spent, ledger.remaining, len(labeler.asked)) == (1.0, 1.0, 1)
    assert (first.kind, first.prompt_id, first.responses, first.answer) == ("verdict", "a", ("It is 5.",), "5")
    assert (first.outcome, first.labeler, first.cost, first.why, first.round) == (
        "wrong",
        "scripted",
        1.0,
        "top cluster has half",
        3,
    )
    assert first.id == 1 and first.time > 1.6e9


def test_one_verdict_per_answer_cluster(tmp_path: Path) -> None:
    questions = [
        verdict("a", "5", "2 + 3 = 5. The answer is 5.", why="one"),
        verdict("a", "6"),
        verdict("a", "5.0", "5.0 it is", why="another reason"),
        verdict("b", "5"),
        verdict("a", "5", repeat=1),
    ]
    labeler = Scripted(["right", "wrong", "wrong", "wrong"])
    with Ledger(tmp_path / "l.sqlite", budget=10) as ledger:
        labels = ledger.ask(questions, labeler)
        assert ledger.spent == 4
    assert [given.outcome for given in labels] == ["right", "wrong", "right", "wrong", "wrong"]
    assert labels[2] == labels[0] and labels[0].why == "one"
    assert [(asked.prompt.id, asked.answer, asked.repeat) for asked in labeler.asked] == [
        ("a", "5", 0),
        ("a", "6", 0),
        ("b", "5", 0),
        ("a", "5", 1),
    ]


def test_keys_are_stable_and_tell_kinds_orders_and_texts_apart() -> None:
    pair = Question("preference", prompt("a"), ("x", "y"))
    questions = [
        verdict("a", "5"),
        verdict("a", None, "no idea"),
        verdict("a", None, "none"),
        pair,
        Question("preference", prompt("a"), ("y", "x")),
        Question("gold", prompt("a")),
    ]
    assert len({question_key(question) for question in questions}) == len(questions)
    assert question_key(verdict("a", "1,080")) == question_key(verdict("a", "$1080.00", "else", why="else"))
    written_out = b'["verdict", "p0", 0, {"answer": "5"}]'  # changing this would orphan the labels of every old ledger
    assert question_key(verdict("p0", "5")) == hashlib.sha256(written_out).hexdigest()


def test_order_is_preserved_over_batches_and_reopening(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "l.sqlite"
    with Ledger(path, budget=100) as ledger:
        ledger.ask(verdicts(10, start=5), Scripted(), batch_size=3)
    with Ledger(path, budget=100) as ledger:
        labels = ledger.ask(verdicts(20), Scripted(), batch_size=4)
        assert [given.prompt_id for given in labels] == [f"p{i}" for i in range(20)]
        order = [*range(5, 15), *range(5), *range(15, 20)]
        assert [given.prompt_id for given in ledger.labels()] == [f"p{i}" for i in order]
        assert [given.id for given in ledger.labels()] == list(range(1, 21))
        assert ledger.spent == 20


def test_labels_are_filtered(tmp_path: Path) -> None:
    later = Question("preference", prompt("a"), ("x", "y"), round=2)
    with Ledger(tmp_path / "l.sqlite", budget=9, costs={"gold": 3}) as ledger:
        ledger.ask([verdict("a"), verdict("b")], Scripted())
        ledger.ask([later], Scripted(["tie"]))
        ledger.ask([Question("gold", prompt("b"))], Scripted(["12"]))
        assert [given.prompt_id for given in ledger.labels(kind="verdict")] == ["a", "b"]
        assert [given.outcome for given in ledger.labels(round=2)] == ["tie"]
        assert [given.outcome for given in ledger.labels(prompt_id="b")] == ["right", "12"]
        assert ledger.labels(kind="gold", round=1) == []
        assert ledger.spent == 6


def test_an_interrupted_batch_is_asked_again_and_not_paid_again(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with Ledger(path, budget=3) as ledger:
        with pytest.raises(KeyboardInterrupt):
            ledger.ask(verdicts(3), Dies(), batch_size=2)
        assert (ledger.spent, ledger.labels()) == (2.0, [])
    with Ledger(path, budget=3) as ledger:
        assert ledger.unanswered() == verdicts(2)
        assert len(ledger.ask(verdicts(3), Scripted())) == 3
        assert (ledger.spent, len(ledger.labels()), ledger.unanswered()) == (3.0, 3, [])


# The budget


def test_over_budget_asks_nothing_at_all(tmp_path: Path) -> None:
    labeler = Scripted()
    with Ledger(tmp_path / "l.sqlite", budget=5) as ledger:
        ledger.ask(verdicts(2), labeler)
        with pytest.raises(BudgetExceeded, match="4 new questions cost 4, but only 3 of the budget of 5 are left"):
            ledger.ask(verdicts(6), labeler, batch_size=1)
        assert (ledger.spent, len(labeler.asked)) == (2.0, 2)
        assert len(ledger.ask(verdicts(5), labeler)) == 5  # what is known already is not counted again
        assert (ledger.spent, ledger.remaining) == (5.0, 0.0)
        assert len(ledger.ask(verdicts(5), labeler)) == 5
    assert len(labeler.asked) == 5


def test_costs_that_are_no_exact_floats_fill_the_budget(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite", budget=1, costs={"verdict": 0.1}) as ledger:
        for i in range(10):
            ledger.ask([verdict(f"p{i}")], Scripted())
        with pytest.raises(BudgetExceeded):
            ledger.ask([verdict("p10")], Scripted())


def test_the_budget_may_change_but_not_below_what_is_spent(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with Ledger(path, budget=3) as ledger:
        ledger.ask(verdicts(3), Scripted())
    with pytest.raises(UserError, match="budget=2 is below the 3 already spent; set a budget of at least 3"):
        Ledger(path, budget=2)
    with Ledger(path, budget=4) as ledger:
        ledger.ask(verdicts(4), Scripted())


@pytest.mark.parametrize("budget", [-1.0, float("nan"), float("inf")])
def test_an_impossible_budget_is_refused(tmp_path: Path, budget: float) -> None:
    with pytest.raises(UserError, match="must be a finite number >= 0"):
        Ledger(tmp_path / "l.sqlite", budget)


def test_an_impossible_cost_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cost of gold=0 must be > 0"):
        Ledger(tmp_path / "l.sqlite", 1, costs={"gold": 0})


# Labellers that misbehave


@pytest.mark.parametrize(
    ("outcomes", "message"),
    [
        (["right"], "expected 3 outcomes for 3 questions, got 1 outcomes"),
        (["right"] * 4, "got 4 outcomes"),
        (None.__class__, "got <class 'NoneType'>"),
        ("yes", "got 3 outcomes"),
    ],
)
def test_a_wrong_count_is_an_error_and_loses_nothing(tmp_path: Path, outcomes: object, message: str) -> None:
    with Ledger(tmp_path / "l.sqlite", budget=3) as ledger:
        with pytest.raises(LabelerError, match=message):
            ledger.ask(verdicts(3), Scripted(outcomes))  # type: ignore[arg-type]
        assert ledger.labels() == []
        assert len(ledger.ask(verdicts(3), Scripted())) == 3
        assert ledger.spent == 3


@pytest.mark.parametrize("nonsense", ["maybe", "A", "", None, 1])
def test_nonsense_is_an_error_that_keeps_the_good_outcomes(tmp_path: Path, nonsense: object) -> None:
    with Ledger(tmp_path / "l.sqlite", budget=3) as ledger:
        with pytest.raises(LabelerError, match=r"is no outcome of a verdict question \(prompt p1\).*1 of 3 outcomes"):
            ledger.ask(verdicts(3), Scripted(["right", nonsense, "wrong"]))
        assert [(given.prompt_id, given.outcome) for given in ledger.labels()] == [("p0", "right"), ("p2", "wrong")]
        labeler = Scripted()
        ledger.ask(verdicts(3), labeler)
        assert labeler.asked == verdicts(1, start=1)
        assert ledger.spent == 3


def test_outcomes_are_checked_by_kind(tmp_path: Path) -> None:
    pair, gold = Question("preference", prompt(), ("x", "y")), Question("gold", prompt())
    with Ledger(tmp_path / "l.sqlite", budget=9) as ledger:
        for question, bad in ((pair, "right"), (pair, "a"), (gold, "  "), (gold, "$")):
            with pytest.raises(LabelerError, match=f"{question.kind} question"):
                ledger.ask([question], Scripted([bad]))
        assert ledger.ask([pair, gold], Scripted(["B", "$1,080"]))[1].outcome == "$1,080"


@pytest.mark.parametrize(
    "question",
    [
        Question("verdict", prompt(), ("a", "b"), "5"),
        Question("preference", prompt(), ("a",)),
        Question("gold", prompt(), ("a",)),
        verdict(repeat=-1),
    ],
)
def test_a_question_that_nobody_could_answer_is_refused(tmp_path: Path, question: Question) -> None:
    with Ledger(tmp_path / "l.sqlite", budget=9) as ledger:
        with pytest.raises(ValueError, match="question about prompt p0"):
            ledger.ask([question], Scripted())
        assert ledger.spent == 0


def test_one_id_for_two_prompts_is_refused(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite", budget=9) as ledger:
        ledger.ask([verdict("p0")], Scripted())
        other = Question("verdict", prompt("p0", "something else"), ("5",), "5")
        with pytest.raises(UserError, match=r"prompt id p0 stands for two prompts: .*'question p0'.*'something else'"):
            ledger.ask([other], Scripted())


# Append-only, and files that are not what they should be


@pytest.mark.parametrize("table", ["questions", "answers"])
def test_the_file_itself_rejects_changes(tmp_path: Path, table: str) -> None:
    path = tmp_path / "l.sqlite"
    with Ledger(path, budget=9) as ledger:
        ledger.ask(verdicts(2), Scripted())
        before = ledger.labels()
        connection = sqlite3.connect(path)
        for attack in (
            f"UPDATE {table} SET time = 0",
            f"DELETE FROM {table}",
            f"DELETE FROM {table} WHERE id = 1",
            f"INSERT OR REPLACE INTO {table} SELECT * FROM {table} WHERE id = 1",
        ):
            with pytest.raises(sqlite3.IntegrityError, match="the ledger is append-only"):
                connection.execute(attack)
        connection.close()
        assert ledger.labels() == before


def test_commits_are_on_disk_in_a_write_ahead_log(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite", budget=9) as ledger, ledger._store.writing() as connection:
        settings = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")
        }
    assert settings == {"journal_mode": "wal", "synchronous": 2}


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    path.write_text("prompt,label\n" * 100)
    with pytest.raises(UserError, match=r"l\.sqlite: the file is damaged or is not a ledger .*restore it from a copy"):
        Ledger(path, budget=1)
    assert path.read_text() == "prompt,label\n" * 100


@pytest.mark.parametrize("inside", [b"question p200", b"scripted"])  # a page of either table
def test_a_damaged_ledger(tmp_path: Path, inside: bytes) -> None:
    path = tmp_path / "l.sqlite"
    with Ledger(path, budget=500) as ledger:
        ledger.ask(verdicts(300), Scripted(), batch_size=300)
    content = bytearray(path.read_bytes())
    page = content.index(inside) // 4096 * 4096
    content[page : page + 4096] = b"\x5a" * 4096
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="damaged"):
        Ledger(path, budget=500)


def test_another_program_s_database(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE recipes (name)")
    connection.close()
    with pytest.raises(UserError, match=r"not a ledger \(it holds recipes\)"):
        Ledger(path, budget=1)


def test_a_ledger_of_a_later_version(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    Ledger(path, budget=1).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(UserError, match="format is version 7"):
        Ledger(path, budget=1)


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a file, found a folder"):
        Ledger(tmp_path, budget=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="its folder cannot be made"):
        Ledger(tmp_path / "file" / "l.sqlite", budget=1)


def test_a_full_disk_is_said_in_words_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with Ledger(path, budget=500) as ledger:
        ledger.ask(verdicts(3), Scripted())
        with ledger._store.reading() as connection:  # the pool's only connection: no room for another page
            connection.exec_driver_sql("PRAGMA max_page_count = 1")
        with pytest.raises(UserError, match="full; free some disk space"):
            ledger.ask(verdicts(400), Scripted(), batch_size=400)
    with Ledger(path, budget=500) as ledger:
        assert len(ledger.labels()) == ledger.spent == 3


# Kills and crowds: one script, run as a process of its own, that forks labelling processes

_WORKER = """
import os, random, signal, sys, time
from trlhf.ledger import BudgetExceeded, Ledger
from trlhf.types import Prompt, Question

path, log, count = sys.argv[1], sys.argv[2], int(sys.argv[3])

class Logged:
    name = "logged"
    def answer(self, questions):
        outcomes = ["right" if int(q.answer) % 3 else "wrong" for q in questions]
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for q, outcome in zip(questions, outcomes):
            os.write(file, f"{os.getpid()} {q.prompt.id} {outcome}\\n".encode())
        os.close(file)
        time.sleep(random.random() * 0.004)  # delivered, not yet written by the ledger
        return outcomes

def questions():
    for i in range(count):
        prompt = Prompt(f"p{i}", ({"role": "user", "content": f"question {i}"},))
        yield Question("verdict", prompt, (f"It is {i}.",), str(i))

def work(budget, seed):
    random.seed(seed)
    wanted = list(questions())
    with Ledger(path, budget) as ledger:
        for start in range(0, count, 7):
            ledger.ask(wanted[start:start + 7], Logged(), batch_size=3)

def start(budget, seed):
    pid = os.fork()
    if pid == 0:
        try:
            work(budget, seed)
        except BudgetExceeded:
            os._exit(3)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid
"""

_KILLS = """
random.seed(11)
kills, lines = 0, []

def written():
    return os.path.getsize(log) if os.path.exists(log) else 0

while kills < 24:
    goal, pid = written() + random.randrange(1, 400), start(count, kills)
    if kills % 2:  # while labels flow; otherwise at any moment from the fork on, opening and creating included
        while written() < goal and os.waitpid(pid, os.WNOHANG) == (0, 0):
            time.sleep(0.0005)
    time.sleep(random.random() * (0.004 if kills % 2 else 0.03))
    try:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        break  # it was done before it could be killed
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        break
    kills += 1
    lines.append(written())
_, status = os.waitpid(start(count, 99), 0)
print(kills, len(set(lines)))
sys.exit(os.waitstatus_to_exitcode(status))
"""

_CROWD = """
pids = [start(float(sys.argv[4]), seed) for seed in range(4)]
print(sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))
"""


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _WORKER + script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def delivered(log: Path) -> list[tuple[str, str]]:
    return [(name, outcome) for _, name, outcome in map(str.split, log.read_text().splitlines())]


def test_sigkill_at_any_moment_loses_and_doubles_nothing(tmp_path: Path) -> None:
    path, log, count = tmp_path / "l.sqlite", tmp_path / "log", 1200
    result = run_script(_KILLS, path, log, count)
    assert result.returncode == 0, result.stderr
    kills, different_moments = map(int, result.stdout.split())
    assert kills >= 10 and different_moments >= 8
    with Ledger(path, budget=count) as ledger:
        labels = ledger.labels()
        assert ledger.spent == len(labels) == count and ledger.unanswered() == []
    assert sorted(given.prompt_id for given in labels) == sorted(f"p{i}" for i in range(count))
    assert all(given.outcome == ("right" if int(given.answer or 0) % 3 else "wrong") for given in labels)
    log_lines = delivered(log)
    assert {(given.prompt_id, given.outcome) for given in labels} == set(log_lines)
    assert (
        len(log_lines) - count <= kills * 3
    )  # only what a kill left unwritten was asked again: at most one batch a kill


@pytest.mark.parametrize("budget", [200, 20])
def test_processes_that_ask_at_once_share_one_budget(tmp_path: Path, budget: int) -> None:
    path, log, count = tmp_path / "l.sqlite", tmp_path / "log", 60
    result = run_script(_CROWD, path, log, count, budget)
    assert result.stderr == ""
    assert json.loads(result.stdout) == ([0] * 4 if budget >= count else [3] * 4)
    with Ledger(path, budget) as ledger:
        labels = ledger.labels()
        assert ledger.spent == len(labels) <= min(budget, count)
        assert max(Counter(given.prompt_id for given in labels).values()) == 1
        assert budget < count or len(labels) == count
        assert {(given.prompt_id, given.outcome) for given in labels} <= set(delivered(log))


# What labels imply


def test_a_right_verdict_makes_every_other_answer_wrong_for_ever() -> None:
    knowledge = Knowledge([label("a", "5", "right")])
    assert knowledge.known("a", "5") is True and knowledge.known("a", "$5.00") is True
    assert knowledge.known("a", "6") is False and knowledge.known("a", None) is False
    assert knowledge.known("b", "5") is None
    assert knowledge.right_answer("a") == "5" and knowledge.right_answer("b") is None
    assert knowledge.verifiable_prompts() == ["a"]


def test_a_wrong_verdict_rules_out_one_answer_only() -> None:
    knowledge = Knowledge([label("a", "0.5", "wrong")])
    assert knowledge.known("a", "0.50") is False and knowledge.known("a", "1/2") is False
    assert knowledge.known("a", "6") is None
    assert knowledge.ruled_out("a") == {"0.5"} and knowledge.ruled_out("b") == frozenset()
    assert knowledge.verifiable_prompts() == []


def test_gold_settles_a_prompt_and_outvotes_verdicts() -> None:
    wrongly = [label("a", "7", "right"), label("a", "7", "right", "verdict"), label("a", "5", "wrong")]
    knowledge = Knowledge([*wrongly, label("a", None, "$5", kind="gold")])
    assert knowledge.right_answer("a") == "5" and knowledge.known("a", "7") is False
    assert knowledge.ruled_out("a") == {"7"}


def test_a_response_without_an_answer_is_wrong_whatever_else_is_known() -> None:
    assert Knowledge().known("a", None) is False
    assert Knowledge().known("a", "  ") is False
    assert Knowledge([label("a", None, "right")]).verifiable_prompts() == []


def test_preferences_say_nothing_about_right_and_wrong() -> None:
    knowledge = Knowledge([label("a", "5", "A", kind="preference", responses=("x", "y"))])
    assert knowledge.known("a", "5") is None


@pytest.mark.parametrize(
    ("votes", "right", "wrong"),
    [
        (["5+", "7+"], None, set()),
        (["5+", "7+", "5+"], "5", {"7"}),
        (["5+", "7+", "7-"], "5", {"7"}),
        (["5+", "5-"], None, set()),
        (["5+", "5-", "5-"], None, {"5"}),
        (["5+", "5+", "5-", "6-"], "5", {"6"}),
        (["5+", "7+", "6-"], None, {"6"}),
        (["5+", "5+", "7+", "7+", "7+"], "7", {"5"}),
    ],
)
def test_contradictions_are_settled_by_margins_in_any_order(
    votes: list[str], right: str | None, wrong: set[str]
) -> None:
    labels = [label("a", vote[:-1], "right" if vote[-1] == "+" else "wrong") for vote in votes]
    for order in itertools.permutations(labels):
        knowledge = Knowledge(order)
        assert knowledge.right_answer("a") == right
        assert knowledge.ruled_out("a") == wrong
        assert knowledge.known("a", "99") is (None if right is None else False)


def test_disagreeing_gold_labels_go_by_majority_then_by_verdicts() -> None:
    golds = [label("a", None, "5", kind="gold"), label("a", None, "7", kind="gold")]
    assert Knowledge(golds).right_answer("a") is None
    assert Knowledge([*golds, golds[1]]).right_answer("a") == "7"
    assert Knowledge([*golds, label("a", "5", "right")]).right_answer("a") == "5"


def test_the_ledger_s_knowledge_grows_with_it(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite", budget=9) as ledger:
        knowledge = ledger.knowledge()
        assert knowledge.known("p0", "0") is None
        ledger.ask(verdicts(2), Scripted(["right", "wrong"]))
        assert ledger.knowledge() is knowledge
        assert knowledge.known("p0", "0") is True and knowledge.known("p1", "1") is False
        ledger.ask([verdict("p1", "1", repeat=1)], Scripted(["right"]))
        assert ledger.knowledge().known("p1", "1") is None
    with Ledger(tmp_path / "l.sqlite", budget=9) as ledger:
        assert ledger.knowledge().right_answer("p0") == "0"


def test_what_was_spent_is_added_up_from_where_the_last_look_ended(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite", 10) as one, Ledger(tmp_path / "l.sqlite", 10, {"verdict": 0.5}) as two:
        one.ask(verdicts(2), Scripted())
        assert (one.spent, two.spent) == (2, 2)
        two.ask(verdicts(2, start=2), Scripted())  # half price, by another process
        assert (one.spent, two.spent, one.remaining) == (3, 3, 7)
        with pytest.raises(BudgetExceeded):
            one.ask(verdicts(8, start=4), Scripted())
        with pytest.raises(RuntimeError), one._store.writing() as connection:
            one._affordable(connection, {question_key(q): q for q in verdicts(1, start=4)})
            columns = "kind, prompt_id, prompt, responses, answer, why, round, repeat"
            copy = f"INSERT INTO questions SELECT 99, 'x', {columns}, 5, time FROM questions WHERE id = 1"
            connection.exec_driver_sql(copy)
            raise RuntimeError("rolled back")
        assert one.spent == two.spent == 3
