"""MT-Bench: two turns, a judge that answers, is late, talks nonsense or refuses; over a real local server."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import trlhf
from trlhf.config import EvaluationConfig, JudgeConfig, ModelConfig, MtBenchConfig
from trlhf.errors import UserError
from trlhf.evaluation import mt_bench
from trlhf.evaluation.judge import Judge
from trlhf.evaluation.mt_bench import (
    TwoTurns,
    answer_two_turns,
    chat_of,
    judge_request,
    load_prompts,
    rate_answers,
    two_turns_from_rows,
)
from trlhf.files import write_jsonl
from trlhf.models import MICRO_BASE, load_causal_lm, load_tokenizer
from trlhf.rows import Row
from trlhf.types import Message, Prompt

Reply = tuple[int, str] | None  # status and body; None: say nothing until the client has gone


def says(text: str) -> Reply:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


class Server:
    """A judge's endpoint; ``script`` gives the reply to a request's text and to how often it came before."""

    def __init__(self, script: Callable[[str, int], Reply]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.counts: Counter[str] = Counter()
        self.closing = threading.Event()
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][-1]["content"]
                with lock:
                    outer.requests.append({"path": self.path, **body})
                    outer.headers.append(dict(self.headers))
                    before = outer.counts[text]
                    outer.counts[text] += 1
                reply = script(text, before)
                if reply is None:
                    outer.closing.wait(10)
                    return
                self.send_response(reply[0])
                self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(reply[1].encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[str, int], Reply]], Server]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers: list[Server] = []

    def start(script: Callable[[str, int], Reply]) -> Server:
        servers.append(Server(script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def judge(server: Server, cache: Path, **values: Any) -> Judge:
    return Judge(JudgeConfig(url=server.url, model="judge", **{"backoff": 0.001, "retries": 2, **values}), cache)


def ask(*texts: str) -> list[list[Message]]:
    return [[{"role": "system", "content": "Grade."}, {"role": "user", "content": text}] for text in texts]


# ---- the judge ----


def test_ratings_are_read_and_never_paid_twice(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda text, before: says(f"Between [[2]] and more. Rating: [[{7 if text == 'a' else 8.5}]]"))
    done: list[int] = []
    first = judge(server, tmp_path / "ratings.jsonl").rate(ask("a", "b", "a"), done.append)
    assert [rating.value for rating in first] == [7, 8.5, 7] and sum(done) == 3
    assert len(server.requests) == 2  # the same request is made once
    assert server.requests[0]["path"] == "/v1/chat/completions"
    assert (server.requests[0]["model"], server.requests[0]["temperature"]) == ("judge", 0)
    again = judge(server, tmp_path / "ratings.jsonl").rate(ask("a", "b", "c"))
    assert [rating.value for rating in again] == [7, 8.5, 8.5] and len(server.requests) == 3


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (says("I like it very much."), "no rating such as [[7]] in its answer"),
        (says("Rating: [[11]]"), "its rating is 11, not from 1 to 10"),
        ((200, "<html>"), "its answer is no JSON"),
        ((200, '{"choices": []}'), "its answer has no choices[0].message.content"),
        ((503, "busy"), "HTTP 503"),
        ((429, "slow down"), "HTTP 429"),
    ],
)
def test_nonsense_is_retried_and_then_recorded(serve: Any, tmp_path: Path, reply: Reply, reason: str) -> None:
    server = serve(lambda text, before: reply if text == "bad" or before == 0 else says("[[6]]"))
    found = judge(server, tmp_path / "ratings.jsonl").rate(ask("bad", "mended"))
    assert (found[0].value, found[0].error, found[0].attempts) == (None, reason, 3)
    assert (found[1].value, found[1].error) == (6, None)
    assert server.counts == {"bad": 3, "mended": 2}
    again = judge(server, tmp_path / "ratings.jsonl").rate(ask("bad", "mended"))
    assert again[0].value is None and server.counts == {"bad": 6, "mended": 2}, "a failure is no rating to keep"


def test_a_late_judge_is_asked_again(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda text, before: None if text == "late" or before == 0 else says("[[6]]"))
    patient = judge(server, tmp_path / "ratings.jsonl", timeout=0.3, retries=1, concurrency=2)
    late, mended = patient.rate(ask("late", "mended"))
    assert (late.value, late.error, late.attempts) == (None, "no answer within 0.3 s", 2)
    assert mended.value == 6


def test_nobody_there_is_recorded_too(tmp_path: Path, serve: Any) -> None:
    server = serve(lambda text, before: says("[[5]]"))
    server.close()
    (found,) = judge(server, tmp_path / "ratings.jsonl", retries=1).rate(ask("a"))
    assert found.value is None and found.error is not None and found.error.startswith("no connection (")


def test_a_refusal_that_no_retry_mends_stops_at_once(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda text, before: (401, "wrong key"))
    with pytest.raises(UserError, match=r"answers 401 .*\(wrong key\); check evaluation\.judge\.url"):
        judge(server, tmp_path / "ratings.jsonl", concurrency=1).rate(ask("a"))
    assert len(server.requests) == 1


def test_the_key_comes_from_the_environment(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(lambda text, before: says("[[5]]"))
    monkeypatch.setenv("MY_JUDGE", "secret")
    judge(server, tmp_path / "ratings.jsonl", key_env="MY_JUDGE").rate(ask("a"))
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in (tmp_path / "ratings.jsonl").read_text()


# ---- the questions ----

QUESTIONS = [
    TwoTurns("81", "writing", ("Write.", "Shorter {please}.")),
    TwoTurns("111", "math", ("2+2?", "Times 2?"), ("4", "8")),
]


def test_questions_of_both_published_shapes() -> None:
    data = [
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Shorter {please}."]},
        {"prompt_id": 111, "category": "math", "prompt": ["2+2?", "Times 2?"], "reference": ["4", "8"]},
    ]
    assert two_turns_from_rows([Row(f"f:{n}", row) for n, row in enumerate(data, 1)]) == QUESTIONS
    with pytest.raises(UserError, match=r"f\.jsonl line 3: 'turns' \(or 'prompt'\) must be a list of two texts"):
        two_turns_from_rows([Row("f.jsonl:3", {"turns": ["one"]})])


def test_the_judge_sees_what_the_protocol_says() -> None:
    prompts, answers = load_prompts(None), ["First answer.", "Second answer."]
    assert all("Rating: [[5]]" in prompts[name] for name in prompts if name != "system")
    plain = [judge_request(QUESTIONS[0], answers, turn, prompts)[1]["content"] for turn in (0, 1)]
    assert "Write." in plain[0] and "First answer." in plain[0] and "Second answer." not in plain[0]
    assert plain[1].index("First answer.") < plain[1].index("Shorter {please}.") < plain[1].index("Second answer.")
    assert not any("reference" in text.lower() for text in plain)
    marked = [judge_request(QUESTIONS[1], answers, turn, prompts)[1]["content"] for turn in (0, 1)]
    assert "=== Reference answer ===\n4\n" in marked[0]
    assert "second question ===\n8\n" in marked[1] and "first question ===\n4\n" in marked[1]


def test_prompts_of_ones_own(tmp_path: Path) -> None:
    names = ("system", "first", "first_reference", "second", "second_reference")
    (tmp_path / "mine.yaml").write_text("".join(f"{name}: '{{question}} {name}'\n" for name in names))
    assert load_prompts(str(tmp_path / "mine.yaml"))["first"] == "{question} first"
    (tmp_path / "bad.yaml").write_text("system: '{quest}'\n")
    with pytest.raises(UserError, match="it needs the texts system, first"):
        load_prompts(str(tmp_path / "bad.yaml"))


def test_the_second_turn_hears_the_first_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chat_of(QUESTIONS[1], []) == ({"role": "user", "content": "2+2?"},)
    assert chat_of(QUESTIONS[1], ["4"])[1:] == (
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Times 2?"},
    )
    model, tokenizer = load_causal_lm(MICRO_BASE, ModelConfig()), load_tokenizer(MICRO_BASE)
    heard: list[Prompt] = []
    sample = mt_bench.sample_responses

    def noted(*arguments: Any) -> Any:
        heard.extend(arguments[2])
        return sample(*arguments)

    monkeypatch.setattr(mt_bench, "sample_responses", noted)
    from trlhf.sft.templates import load_template

    tokenizer.chat_template = load_template("cerebrum")
    config = EvaluationConfig(mt_bench=MtBenchConfig(max_new_tokens=6))
    long = TwoTurns("9", "stem", ("word " * 1200, "More."))
    found = answer_two_turns(model, tokenizer, [*QUESTIONS, long], config, 0)
    turns = [(prompt.id, [message["content"] for message in prompt.messages]) for prompt in heard]
    assert turns == [
        ("111", ["2+2?"]),
        ("81", ["Write."]),
        ("111", ["2+2?", found["111"][0], "Times 2?"]),
        ("81", ["Write.", found["81"][0], "Shorter {please}."]),
    ]
    assert set(found) == {"81", "111"} and all(len(texts) == 2 for texts in found.values())
    assert found == answer_two_turns(model, tokenizer, [*QUESTIONS, long], config, 0)
    other = answer_two_turns(model, tokenizer, [*QUESTIONS, long], config, 1)
    assert other["111"] == found["111"] and other["81"] != found["81"]  # greedy, and at temperature 0.7
    with pytest.raises(UserError, match="leaves no room for a question in the 1024 tokens"):
        answer_two_turns(model, tokenizer, [long], config, 0)


# ---- the rating of a model ----


def test_an_answer_without_a_rating_is_no_loss(serve: Any, tmp_path: Path) -> None:
    """Three ratings of 8 and one that never comes: the mean is 8, and the missing one is reported."""

    def script(text: str, before: int) -> Reply:
        return says("No idea.") if "Times 2?" in text else says("Rating: [[8]]")

    answers = {"81": ["a", "b"], "111": ["4", "8"]}
    asked = judge(serve(script), tmp_path / "ratings.jsonl")
    found = rate_answers(QUESTIONS, answers, asked, load_prompts(None), 0.95, 0)
    assert found.estimate is not None and (found.estimate["value"], found.estimate["n"]) == (8.0, 2)
    assert found.unjudged == 1 and found.reasons == {"no rating such as [[7]] in its answer": 1}
    assert {name: part["value"] for name, part in found.parts.items()} == {
        "turn 1": 8.0,
        "turn 2": 8.0,
        "writing": 8.0,
        "math": 8.0,
    }
    assert [(row["turn"], row["value"]) for row in found.samples] == [(1, 8), (2, 8), (1, 8), (2, None)]


def test_no_rating_at_all_is_no_number(serve: Any, tmp_path: Path) -> None:
    asked = judge(serve(lambda text, before: says("?")), tmp_path / "ratings.jsonl", retries=0)
    found = rate_answers(QUESTIONS, {"81": ["a", "b"]}, asked, load_prompts(None), 0.95, 0)
    assert (found.estimate, found.parts, found.unjudged, found.too_long) == (None, {}, 2, 1)


def test_a_model_is_rated_and_missing_ratings_are_asked_for_again(serve: Any, tmp_path: Path) -> None:
    """The whole stage: the second start asks for what the first one got no rating for, and for nothing else."""
    mended = threading.Event()

    def script(text: str, before: int) -> Reply:
        return says("Rating: [[3]]") if "Times 2?" not in text or mended.is_set() else says("No idea.")

    server = serve(script)
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Shorter."]},
        {"question_id": 111, "category": "math", "turns": ["2+2?", "Times 2?"], "reference": ["4", "8"]},
    ]
    write_jsonl(tmp_path / "questions.jsonl", rows)
    overrides = [
        *("stage=eval", "evaluation=mt-bench", f"evaluation.model={MICRO_BASE}", f"run.dir={tmp_path / 'run'}"),
        *(f"evaluation.mt_bench.questions={tmp_path / 'questions.jsonl'}", "evaluation.mt_bench.max_new_tokens=6"),
        *(f"evaluation.judge.url={server.url}", "evaluation.judge.model=judge", "evaluation.judge.backoff=0.001"),
        *("evaluation.judge.retries=1", "hardware.device=cpu", "hardware.threads=1"),
    ]
    threads = torch.get_num_threads()
    first = trlhf.run(overrides).summary["suites"]["mt-bench"]["mt-bench"]["model"]
    assert (first["value"], first["n"]) == (3.0, 2) and sum(server.counts.values()) == 5
    mended.set()
    trlhf.run(overrides)
    assert sum(server.counts.values()) == 6
    trlhf.run(overrides)
    assert sum(server.counts.values()) == 6
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    metrics = json.loads((tmp_path / "run/eval/metrics.json").read_text(encoding="utf-8"))
    entry = metrics["suites"]["mt-bench"]["mt-bench"]["model"]
    assert entry["metric"] == "rating" and "unjudged" not in entry and entry["members"]["turn 2"]["value"] == 3.0
    (row,) = metrics["published"]
    assert row["published"] == "6.86" and re.fullmatch(r"3\.00 \[.*\] \(model\)", row["here"])
    assert "rated by judge with our prompts" in row["difference"] and "GPT-4" in row["difference"]
    log = (tmp_path / "run/trlhf.log").read_text(encoding="utf-8")
    assert "mt-bench: 1 answers of model have no rating: no rating such as [[7]] in its answer" in log
