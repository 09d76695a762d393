"""Hub data sets: their names, one file of them, streams, scripts, a mirror, and downloads that break off."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import trlhf
from trlhf.errors import UserError
from trlhf.hub import EXPORT, HubData
from trlhf.rows import iterate_rows, read_rows

ROWS = [{"question": f"{i}?", "answer": str(i)} for i in range(400)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
FILE = "".join(json.dumps({**row, "padding": " " * 40_000}) + "\n" for row in ROWS).encode()
BREAK = 12_000_000  # byte at which the connection ends; the hub's client keeps pieces of 10 MiB


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("openai/gsm8k", HubData("openai/gsm8k")),
        ("openai/gsm8k:main", HubData("openai/gsm8k", "main")),
        (
            "Open-Orca/OpenOrca:1M-GPT4-Augmented.parquet",
            HubData("Open-Orca/OpenOrca", None, "1M-GPT4-Augmented.parquet"),
        ),
        ("o/n:data/train.jsonl", HubData("o/n", None, "data/train.jsonl")),
        ("data/train.jsonl", None),
        ("train.jsonl", None),
        ("./a/b", None),
        ("a/b/c", None),
        ("a/b:../c.jsonl", None),
    ],
)
def test_names(source: str, expected: HubData | None) -> None:
    assert HubData.parse(source) == expected


def test_a_folder_that_exists_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert HubData.parse("own/er") is not None
    (tmp_path / "own" / "er").mkdir(parents=True)
    assert HubData.parse("own/er") is None


# ---- a mirror ----


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    folder = tmp_path / "mirror" / "owner" / "name"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(f'{{"question": "{split}?", "answer": "1"}}\n')
    configs = "configs:\n- config_name: main\n  data_files:\n"
    files = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in ("train", "test"))
    (folder / "README.md").write_text(f"---\n{configs}{files}---\n")
    return tmp_path / "mirror"


def test_a_mirror_is_read_in_place_of_the_hub(mirror: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_hub(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("trlhf.rows.download", no_hub)
    monkeypatch.setattr("trlhf.rows._hub_rows", no_hub)
    for source, split in (("owner/name:main", "test"), ("owner/name", "test"), ("owner/name:test.jsonl", "train")):
        (row,) = read_rows(source, split, str(mirror))
        assert row.data == {"question": "test?", "answer": "1"}
    (own := tmp_path / "own.jsonl").write_text('{"x": 1}\n')
    assert read_rows(own, mirror=str(mirror))[0].data == {"x": 1}, "paths stay as they are"
    message = (
        "owner/other: data.mirror=.* has no .*owner/other; bring it there with: hf download owner/other --repo-type"
    )
    with pytest.raises(UserError, match=message):
        read_rows("owner/other", mirror=str(mirror))


# ---- datasets ----


def test_a_data_set_that_is_a_script_is_read_from_the_hubs_export(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[dict[str, Any]] = []

    def load(name: str, configuration: str | None = None, **rest: Any) -> list[dict[str, str]]:
        asked.append({"name": name, "configuration": configuration, **rest})
        if "revision" not in rest:
            raise RuntimeError("Dataset scripts are no longer supported, but found riddle_sense.py")
        return [{"question": "a?"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    (row,) = read_rows("INK-USC/riddle_sense", "train")
    assert (row.place, row.data) == ("riddle_sense train row 1", {"question": "a?"})
    call = {"name": "INK-USC/riddle_sense", "configuration": None, "split": "train"}
    assert asked == [call, {**call, "revision": EXPORT}]


def test_a_stream_stops_where_it_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cap of a stream is reached without reading the rest; the order is shuffled, and depends on the seed."""
    import datasets

    from trlhf.config import build_config
    from trlhf.sft.mixture import mixed_demonstrations

    given = 0

    def rows() -> Iterator[dict[str, str]]:
        nonlocal given
        for row in ROWS:
            given += 1
            yield row

    def load(name: str, configuration: str | None = None, *, split: str, streaming: bool) -> Any:
        assert (name, configuration, split, streaming) == ("o/big", "all", "train", True)
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("trlhf.hub.SHUFFLED", 20)
    source = {"path": "o/big:all", "stream": True, "cap": 5}
    found = []
    for seed in (0, 0, 1):
        given = 0
        data = {"name": "file", "mixture": {"big": source}}
        values = {"stage": "sft", "seed": seed, "labeler": {"name": "exact"}, "targeting": {"preference_share": 0}}
        demonstrations, (report,) = mixed_demonstrations(build_config({**values, "data": data}))
        found.append([demonstration.messages[0]["content"] for demonstration in demonstrations])
        assert (report.read, report.kept) == (5, 5) and given < 100
    assert found[0] == found[1] != found[2] and found[0] != [f"{i}?" for i in range(5)]


def test_a_broken_stream_names_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def rows() -> Iterator[dict[str, str]]:
        yield ROWS[0]
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    seen = []
    with pytest.raises(UserError, match=r"o/n: .*cannot be read from the Hugging Face hub \(the line is dead\)"):
        for row in iterate_rows("o/n", streamed=True):
            seen.append(row.data)
    assert seen == ROWS[:1]


def test_large_files_are_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    """The row before a broken one has been given away before the broken one is read."""
    (tmp_path / "a.jsonl").write_bytes(LINES + b"{broken\n")
    rows = iterate_rows(tmp_path / "a.jsonl")
    assert [next(rows).data for _ in ROWS] == ROWS
    with pytest.raises(UserError, match=r"a\.jsonl line 401: not valid JSON"):
        next(rows)


# ---- a download that breaks off ----


class Hub(ThreadingHTTPServer):
    """A hub with one data set of one file, whose first download breaks off in the middle."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.sent: list[tuple[int, int]] = []  # from which byte to which


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._head(200, len(FILE))

    def do_GET(self) -> None:
        if not self.path.startswith("/datasets/owner/name/resolve/main/data/train.jsonl"):
            self.send_error(404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        end = len(FILE) if self.server.sent else BREAK
        self.server.sent.append((start, end))
        more = {"Content-Range": f"bytes {start}-{len(FILE) - 1}/{len(FILE)}"} if asked else {}
        self._head(206 if asked else 200, len(FILE) - start, more)
        self.wfile.write(FILE[start:end])
        self.close_connection = True

    def _head(self, status: int, length: int, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        named = {"ETag": '"0123456789abcdef"', "X-Repo-Commit": "c" * 40, "Accept-Ranges": "bytes", **(more or {})}
        for name, value in {**named, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def test_a_download_that_broke_off_goes_on_where_it_was(tmp_path: Path) -> None:
    """Against a server on this machine; the same process or the next one goes on, from the last whole piece."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    code = "from trlhf.rows import read_rows; print(len(read_rows('owner/name:data/train.jsonl')))"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
        "PYTHONPATH": str(Path(trlhf.__file__).parents[1]),
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    try:
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
            )
            if done.returncode == 0:
                break
    finally:
        hub.shutdown()
        hub.server_close()
    assert done.stdout.strip() == str(len(ROWS)), done.stderr
    assert len(hub.sent) > 1 and hub.sent[0] == (0, BREAK)
    ((start, end),) = hub.sent[1:]
    assert 0 < start <= BREAK and end == len(FILE), "what was there was not sent again"
