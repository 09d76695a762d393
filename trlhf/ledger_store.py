"""The SQLite file under the ledger: two tables that only grow, and every failure of the file said in words."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    CheckConstraint,
    Column,
    ColumnElement,
    Connection,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    func,
    inspect,
    select,
)
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

from trlhf.errors import UserError
from trlhf.types import Label, Prompt, Question

_metadata = MetaData()
question_table = Table(
    "questions",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("key", String, nullable=False, unique=True),
    Column("kind", String, nullable=False),
    Column("prompt_id", String, nullable=False),
    Column("prompt", JSON, nullable=False),
    Column("responses", JSON, nullable=False),
    Column("answer", String),
    Column("why", String, nullable=False),
    Column("round", Integer, nullable=False),
    Column("repeat", Integer, nullable=False),
    Column("cost", Float, CheckConstraint("cost > 0"), nullable=False),
    Column("time", Float, nullable=False),
    sqlite_autoincrement=True,
)
answer_table = Table(
    "answers",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("question_key", String, ForeignKey("questions.key"), nullable=False, unique=True),
    Column("outcome", String, nullable=False),
    Column("labeler", String, nullable=False),
    Column("time", Float, nullable=False),
    sqlite_autoincrement=True,
)
# Of a question, what its label also says: the chat, the largest column by far, is not read.
LABEL_COLUMNS = [column for column in question_table.c if column.name not in ("id", "prompt", "time")]
_VERSION = 1
_LOCK_SECONDS = 60.0


def _triggers() -> Iterator[str]:
    """Reject updates and deletions, and INSERT OR REPLACE, which is both in disguise."""
    for table, key in (("questions", "key"), ("answers", "question_key")):
        for action in ("UPDATE", "DELETE"):
            yield (
                f"CREATE TRIGGER {table}_no_{action.lower()} BEFORE {action} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, 'the ledger is append-only: {action} on {table}'); END"
            )
        yield (
            f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} "
            f"WHEN EXISTS (SELECT 1 FROM {table} WHERE {key} = NEW.{key} OR id = NEW.id) "
            f"BEGIN SELECT RAISE(ABORT, 'the ledger is append-only: this row of {table} exists'); END"
        )


class Store:
    """The open file: :meth:`reading` and :meth:`writing` give transactions, errors come out as ``UserError``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"ledger {path}: its folder cannot be made ({error}); choose another run.dir") from error
        if path.is_dir():
            raise UserError(f"ledger {path}: expected a file, found a folder; give the path of a file in it")
        self._engine = create_engine(URL.create("sqlite", database=str(path)), connect_args={"timeout": _LOCK_SECONDS})
        event.listen(self._engine, "connect", _configure)
        event.listen(self._engine, "begin", _begin)
        try:
            with self.writing() as connection:
                self._make_or_check(connection)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all connections; nothing needs to be flushed."""
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Give a transaction that sees one state of the file and locks nobody out."""
        with self._in_words(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Give the only transaction that may write; it is on disk when the block ends."""
        with self._in_words(), self._engine.connect() as plain:
            connection = plain.execution_options(ledger_begin="IMMEDIATE")
            with connection.begin():
                yield connection

    def _make_or_check(self, connection: Connection) -> None:
        version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        if version == 0:
            if tables := inspect(connection).get_table_names():
                raise UserError(
                    f"ledger {self.path}: this is a SQLite database, but not a ledger (it holds {', '.join(tables)}); "
                    "choose another path"
                )
            _metadata.create_all(connection)
            for trigger in _triggers():
                connection.exec_driver_sql(trigger)
            connection.exec_driver_sql(f"PRAGMA user_version = {_VERSION}")
        elif version != _VERSION:
            raise UserError(
                f"ledger {self.path}: its format is version {version}, this trlhf reads version {_VERSION}; "
                "use the trlhf that wrote it"
            )
        problem = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
        if problem != "ok":
            raise UserError(self._damaged(problem))

    def _damaged(self, problem: object) -> str:
        return (
            f"ledger {self.path}: the file is damaged or is not a ledger ({problem}); restore it from a copy, or save "
            f"what is left with `sqlite3 {self.path} .recover`, or move it away to start with no labels"
        )

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except (DBAPIError, sqlite3.Error) as error:
            cause = error.orig if isinstance(error, DBAPIError) else error
            if isinstance(cause, sqlite3.OperationalError):
                raise UserError(f"ledger {self.path}: {_remedy(str(cause))}") from error
            if type(cause) is sqlite3.DatabaseError:
                raise UserError(self._damaged(cause)) from error
            raise


def _remedy(problem: str) -> str:
    """Say what to do about what SQLite reports."""
    remedies = {
        "full": "free some disk space and run the same command again; no label is lost",
        "disk i/o": "check the disk and its free space, then run the same command again",
        "locked": f"another process has kept it locked for {_LOCK_SECONDS:g} s; end that process, then run again",
        "readonly": "make the file and its folder writable",
        "unable to open": "check that the folder exists and that you may read and write there",
    }
    remedy = next((text for word, text in remedies.items() if word in problem.lower()), "is it a ledger of trlhf?")
    return f"{problem}; {remedy}"


def _configure(connection: Any, _record: object) -> None:
    """Set up one connection: our own BEGIN, a write-ahead log, and every commit on disk before it returns."""
    connection.isolation_level = None
    cursor = connection.cursor()
    if cursor.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        cursor.execute("PRAGMA journal_mode = WAL")
    for setting in ("synchronous = FULL", "foreign_keys = ON"):
        cursor.execute(f"PRAGMA {setting}")
    cursor.close()


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get('ledger_begin', 'DEFERRED')}")


def among(keys: Sequence[str]) -> ColumnElement[bool]:
    """Select questions by any number of keys (as one JSON parameter: SQLite limits the number of parameters)."""
    return question_table.c.key.in_(select(func.json_each(json.dumps(keys)).table_valued("value").c.value))


def question_row(question: Question) -> dict[str, Any]:
    """Write a question for the table, without its key, cost and time."""
    row = {name: getattr(question, name) for name in ("kind", "answer", "why", "round", "repeat")}
    prompt = {**asdict(question.prompt), "messages": list(question.prompt.messages)}
    return {**row, "prompt_id": question.prompt.id, "prompt": prompt, "responses": list(question.responses)}


def read_question(row: Mapping[Any, Any]) -> Question:
    """Rebuild a question from its row."""
    prompt = Prompt(**{**row["prompt"], "messages": tuple(row["prompt"]["messages"])})
    columns = {name: row[name] for name in ("kind", "answer", "why", "round", "repeat")}
    return Question(prompt=prompt, responses=tuple(row["responses"]), **columns)


def read_label(row: Mapping[Any, Any]) -> Label:
    """Build a label from the row of a question and the columns ``label`` (id) and ``answered`` of its answer."""
    names = ("kind", "prompt_id", "answer", "outcome", "labeler", "cost", "why", "round", "repeat")
    columns = {name: row[name] for name in names}
    return Label(responses=tuple(row["responses"]), id=row["label"], time=row["answered"], **columns)


def check_same_prompt(stored: Mapping[str, Any], asked: Prompt) -> None:
    """Refuse to use a label for another prompt that happens to have the same id."""
    before, now = (messages[-1]["content"] if messages else "" for messages in (stored["messages"], asked.messages))
    if before != now:
        raise UserError(
            f"prompt id {asked.id} stands for two prompts: the ledger holds a label for {before[:60]!r}, now it is "
            f"{now[:60]!r}; give prompts unique ids, or start a new run.dir for other data"
        )
