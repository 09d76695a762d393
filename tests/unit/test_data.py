"""Reading rows, and the prompts and gold answers in them; every bad file gets one clear message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trlhf.config import build_config
from trlhf.data import Row, prompts_from_rows, read_rows
from trlhf.errors import UserError
from trlhf.sft.gsm8k import gsm8k_splits

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return _write


def test_jsonl_tolerates_blank_lines_and_keeps_line_numbers(write: Write) -> None:
    rows = read_rows(write("a.jsonl", '\ufeff{"x": 1}\n\n  \n{"x": "\u2028é"}\n'))
    assert rows == [Row("a.jsonl:1", {"x": 1}), Row("a.jsonl:4", {"x": "\u2028é"})]


def test_json_arrays_objects_and_misnamed_jsonl(write: Write) -> None:
    assert [r.data for r in read_rows(write("a.json", '[{"x": 1}, {"x": 2}]'))] == [{"x": 1}, {"x": 2}]
    assert [r.data for r in read_rows(write("b.json", '{"version": 1, "data": [{"x": 1}]}'))] == [{"x": 1}]
    assert read_rows(write("c.json", '{"x": 1}\n{"x": 2}\n'))[1] == Row("c.json:2", {"x": 2})


def test_csv_counts_lines_not_records(write: Write) -> None:
    rows = read_rows(write("a.csv", 'question,answer\n"two\nlines",4\n\nplain,\n'))
    assert rows == [
        Row("a.csv:2", {"question": "two\nlines", "answer": "4"}),
        Row("a.csv:5", {"question": "plain", "answer": None}),
    ]


def test_parquet_and_local_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    data = datasets.Dataset.from_list([{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}])
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(str(tmp_path / "saved"))
    monkeypatch.chdir(tmp_path)
    assert [row.data["question"] for row in read_rows("a.parquet")] == ["a", "b"]
    assert read_rows("saved")[1] == Row("saved train row 2", {"question": "b", "answer": "2"})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", r"a\.jsonl: the file is empty"),
        ("a.jsonl", "\n\n", r"a\.jsonl: the file is empty"),
        ("a.csv", "question,answer\n", r"a\.csv: the file is empty"),
        ("a.json", "[]", r"a\.json: the file is empty"),
        ("train.jsonl", '{"x": 1}\n' * 6 + '{"x": \n', r"train\.jsonl line 7: not valid JSON \(Expecting value"),
        ("a.json", '[{"x": 1},\n{"x" 2}]', r"a\.json line 2: not valid JSON"),
        ("a.jsonl", '{"x": 1}\n[1]\n', r"a\.jsonl line 2: an object with named fields was expected, found list"),
        ("a.csv", "x,y\n1,2\n1,2,3\n", r"a\.csv line 3: 3 values under 2 column names"),
        ("a.parquet", "nonsense", r"a\.parquet: not a readable parquet file"),
        ("a.txt", "x", r"a\.txt: unknown kind of file; give one of \.jsonl, \.json, \.csv, \.parquet"),
    ],
)
def test_bad_files_name_file_and_line(write: Write, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_rows(write(name, text))


def test_text_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"x": 1}\n{"x": "\xff"}\n')
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        read_rows(tmp_path / "a.jsonl")


def test_what_is_missing_says_what_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=rf"looked for {tmp_path}/gone\.jsonl"):
        read_rows(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match="no such file or folder"):
        read_rows("./gone")

    import datasets

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"nobody/nothing: there is no such path.*Hugging Face hub.*check the name"):
        read_rows("nobody/nothing")


def _rows(*data: dict[str, Any]) -> list[Row]:
    return [Row(f"test.jsonl:{line}", item) for line, item in enumerate(data, start=1)]


def test_prompts_keep_their_gold_answers_apart() -> None:
    prompts, gold, report = prompts_from_rows(
        _rows(
            {"question": "2+3?", "answer": "2+3 = <<2+3=5>>5\n#### 1,005"},
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}], "task": "open"},
            {"prompt": "2*3?", "answer": 6, "kind": "product", "reasoning": False},
        ),
        "test.jsonl",
        answers="required",
    )
    assert [prompt.id for prompt in prompts] == ["test.jsonl:1", "test.jsonl:2", "test.jsonl:3"]
    assert [prompt.messages[-1]["content"] for prompt in prompts] == ["2+3?", "Hi", "2*3?"]
    assert all(len(prompt.messages) == 1 for prompt in prompts), "no prompt carries a response"
    assert gold == {"test.jsonl:1": "1005", "test.jsonl:3": "6"}
    assert [(prompt.kind, prompt.task, prompt.reasoning) for prompt in prompts] == [
        ("prompt", "exact", True),
        ("prompt", "open", False),
        ("product", "exact", False),
    ]
    assert report.kept == 3


def test_an_answerless_row_is_an_error_in_a_test_set_and_a_prompt_in_a_pool() -> None:
    rows = _rows(*[{"question": f"{i}?", "answer": "1"} for i in range(6)], {"question": "7?", "answer": None})
    with pytest.raises(UserError, match=r"test\.jsonl line 7: no answer"):
        prompts_from_rows(rows, "test.jsonl", answers="required")
    prompts, gold, _ = prompts_from_rows(rows, "pool.jsonl")
    assert len(prompts) == 7 and len(gold) == 6


def test_rows_left_out_are_counted_and_listed() -> None:
    rows = _rows({"question": "a", "answer": "1"}, {"question": "b", "options": ["x"], "answer": "x"}, {"question": ""})
    prompts, _, report = prompts_from_rows(rows, "test.jsonl")
    assert len(prompts) == 1 and report.read == 3 and report.kept == 1
    text = report.describe()
    assert "multiple choice ('options'), which is not read yet (test.jsonl:2)" in text
    assert "question is empty (test.jsonl:3)" in text
    with pytest.raises(UserError, match=r"test\.jsonl line 1: missing 'messages'.*found 'text'.*'conversations'"):
        prompts_from_rows(_rows({"text": "a"}), "test.jsonl")


@pytest.fixture
def small_gsm8k(tmp_path: Path) -> Path:
    def solved(i: int) -> dict[str, str]:
        return {"question": f"What is {i} + 1?", "answer": f"{i}+1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"}

    def save(name: str, rows: list[Any]) -> None:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    save("train.jsonl", [solved(i) for i in range(20)] + [{"question": "what is  100 + 1?", "answer": "#### 101"}])
    save("test.jsonl", [solved(i) for i in range(100, 110)])
    solution = {"one": {"solution": "1\nA: 1", "is_correct": True}, "two": {"solution": "cut", "is_correct": False}}
    save("example_model_solutions.jsonl", [{"question": solved(i)["question"], **solution} for i in range(100, 110)])
    return tmp_path


def _questions(items: Any) -> set[str]:
    return {item.messages[0]["content"] for item in items}


def _assert_disjoint(splits: Any) -> None:
    learned, pool, test = _questions(splits.demonstrations), _questions(splits.pool), _questions(splits.test)
    rewarded = _questions([labelled.prompt for labelled in splits.labelled])
    assert not learned & pool and not learned & test and not pool & test
    assert not rewarded & test and not rewarded & pool and not rewarded & learned


def test_gsm8k_parts_share_no_question(small_gsm8k: Path) -> None:
    splits = gsm8k_splits(small_gsm8k, sft_prompts=5, pool_prompts=10, test_prompts=4, seed=3)
    assert [len(part) for part in (splits.demonstrations, splits.pool, splits.test, splits.labelled)] == [5, 10, 4, 12]
    _assert_disjoint(splits)
    assert splits.demonstrations[0].messages[-1]["content"].startswith("Plan: add.")
    assert [(x.response, x.right) for x in splits.labelled[:2]] == [
        ("Plan: work it out in one step. 1. The answer is 1.", True),
        ("Plan: work it out in one step. cut.", False),
    ]
    assert splits.reports[0].dropped, "the training question that is also a test question is left out, visibly"
    again = gsm8k_splits(small_gsm8k, sft_prompts=5, pool_prompts=10, test_prompts=4, seed=3)
    assert again == splits
    assert gsm8k_splits(small_gsm8k, sft_prompts=5, pool_prompts=10, test_prompts=4, seed=4).test != splits.test


def test_gsm8k_caps_and_missing_files(small_gsm8k: Path) -> None:
    everything = gsm8k_splits(small_gsm8k, sft_prompts=5, pool_prompts=0, test_prompts=0)
    assert len(everything.pool) == 15 and len(everything.test) == 10 and everything.labelled == []
    with pytest.raises(UserError, match="both SFT and the pool need some"):
        gsm8k_splits(small_gsm8k, sft_prompts=0, pool_prompts=0, test_prompts=4)
    (small_gsm8k / "example_model_solutions.jsonl").unlink()
    assert gsm8k_splits(small_gsm8k, sft_prompts=5, pool_prompts=5, test_prompts=4).labelled == []
    (small_gsm8k / "test.jsonl").unlink()
    with pytest.raises(UserError, match=r"test\.jsonl is not there \(looked for"):
        gsm8k_splits(small_gsm8k, sft_prompts=5, pool_prompts=5, test_prompts=4)


@pytest.mark.parametrize(("path", "configuration"), [("openai/gsm8k", "main"), ("openai/gsm8k:socratic", "socratic")])
def test_gsm8k_from_the_hub_names_a_configuration(
    monkeypatch: pytest.MonkeyPatch, path: str, configuration: str
) -> None:
    import datasets

    asked: list[tuple[str, str | None, str]] = []

    def load(name: str, configuration: str | None = None, *, split: str) -> list[dict[str, str]]:
        asked.append((name, configuration, split))
        return [
            {"question": f"{split} {i} + 1?", "answer": f"{i}+1 = <<{i}+1={i + 1}>>\n#### {i + 1}"} for i in range(4)
        ]

    monkeypatch.setattr(datasets, "load_dataset", load)
    splits = gsm8k_splits(path, sft_prompts=2, pool_prompts=2, test_prompts=4)
    assert asked == [("openai/gsm8k", configuration, "train"), ("openai/gsm8k", configuration, "test")]
    assert [len(part) for part in (splits.demonstrations, splits.pool, splits.test)] == [2, 2, 4]
    assert sorted(splits.test_gold.values()) == ["1", "2", "3", "4"]
    values = {"data": {"name": "gsm8k", "path": path}, "labeler": {"name": "exact"}}
    assert build_config({**values, "targeting": {"preference_share": 0}}).data.path == path


def test_the_real_gsm8k_parts_share_no_question(shared_data: Callable[[str], Path]) -> None:
    splits = gsm8k_splits(shared_data("gsm8k"), sft_prompts=500, pool_prompts=1000, test_prompts=100, seed=0)
    assert [len(part) for part in (splits.demonstrations, splits.pool, splits.test)] == [500, 1000, 100]
    assert len(splits.labelled) == 4 * (1319 - 100)
    assert 0.3 < sum(labelled.right for labelled in splits.labelled) / len(splits.labelled) < 0.5
    assert len(splits.test_gold) == 100 and len(splits.pool_gold) == 1000
    _assert_disjoint(splits)
