"""Uploading to a stand-in of the hub on this machine, through the hub's own client: what arrives is what was there."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, constants

import trlhf
from trlhf.card.push import push
from trlhf.compose import compose
from trlhf.config import CardConfig, plain
from trlhf.errors import UserError
from trlhf.models import MICRO_BASE
from trlhf.run import RunDirectory


class Hub(ThreadingHTTPServer):
    """As much of the hub's protocol as an upload of small files takes.

    Attributes:
        files: path in the repository → content.
        made: what was asked for when the repository was made.
        token: the only one that may write.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.made: list[dict[str, Any]] = []
        self.token = "hf_may_write"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.reply(401, {"error": "Invalid credentials in Authorization header"})
        elif path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            self.reply(200, {"url": f"{self.server.address}/me/model"})
        elif path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif path == "/api/models/me/model/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.reply(200, {"files": files})
        elif path == "/api/models/me/model/commit/main":
            for one in map(json.loads, body.splitlines()):
                if one["key"] == "file":
                    self.server.files[one["value"]["path"]] = base64.b64decode(one["value"]["content"])
            self.reply(200, {"commitUrl": f"{self.server.address}/me/model/commit/{'a' * 40}", "commitOid": "a" * 40})
        else:
            self.reply(404, {"error": f"nothing at {path}"})

    def do_GET(self) -> None:
        self.reply(200, {"id": "me/model", "sha": "a" * 40, "siblings": []})

    def reply(self, status: int, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A model's folder and an adapter's."""
    for name, weights in (("model", b"whole"), ("adapter", b"small")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"---\nlicense: mit\n---\n# {name}\n")
        (tmp_path / name / "weights.safetensors").write_bytes(weights * 1000)
    return [tmp_path / "model", tmp_path / "adapter"]


def test_model_and_card_arrive_whole(hub: Hub, folders: list[Path]) -> None:
    assert push(folders[:1], "me/model", CardConfig()) == f"{hub.address}/me/model"
    assert hub.files == {path.name: path.read_bytes() for path in folders[0].iterdir()}
    assert hub.made == [{"name": "model", "organization": "me", "visibility": "private"}]


def test_an_adapter_goes_into_a_folder_of_its_own(hub: Hub, folders: list[Path]) -> None:
    push(folders, "me/model", CardConfig(private=False))
    assert {name: content[:5] for name, content in hub.files.items()} == {
        **{"README.md": b"---\nl", "weights.safetensors": b"whole"},
        **{"adapter/README.md": b"---\nl", "adapter/weights.safetensors": b"small"},
    }
    assert hub.made[0]["visibility"] == "public"


def test_stage_card_writes_the_card_and_uploads_both(hub: Hub, tmp_path: Path) -> None:
    """Through the command's own code: what the hub has is the folder, and the card in it is read back."""
    config = compose(["stage=sft", "experiment=jackalope", "model=micro"]).configs[0]
    stage = RunDirectory(tmp_path / "run").stage("sft")
    shutil.copytree(MICRO_BASE, stage.path / "model")
    (stage.path / "config.yaml").write_text(yaml.safe_dump(plain(config)))
    stage.complete({"demonstrations": 8, "response_tokens": 80})
    trlhf.run([f"run.dir={tmp_path / 'run'}", "stage=card", "push=me/model", "card.license=mit"])
    assert hub.files == {path.name: path.read_bytes() for path in (stage.path / "model").iterdir()}
    card = ModelCard(hub.files["README.md"].decode())
    assert (card.data.model_name, card.data.license, card.data.base_model) == ("me/model", "mit", "micro")
    assert "Open-Orca/SlimOrca" in card.data.datasets and 'model="me/model"' in card.text


def test_without_a_token_nothing_is_sent(hub: Hub, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"push=me/model: there is no token for http://.*; run 'hf auth login', or"):
        push(folders, "me/model", CardConfig())
    assert not hub.made and not hub.files


def test_a_token_that_may_not_write_is_told(hub: Hub, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_may_read")
    with pytest.raises(UserError, match=r"push=me/model: the upload to http://.* failed \(.*401.*mend it and run"):
        push(folders, "me/model", CardConfig())
    assert not hub.files


def test_no_connection_is_told(hub: Hub, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody answers
    with pytest.raises(UserError, match=r"the upload to http://127.0.0.1:9 failed \(.*nothing of the run is lost"):
        push(folders, "me/model", CardConfig())
