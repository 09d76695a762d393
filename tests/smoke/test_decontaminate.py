"""Cleaned data all the way into a stage: what was left out is not trained on, and is not looked for twice."""

from __future__ import annotations

import json
from pathlib import Path

import trlhf


def test_sft_learns_from_clean_rows_only(tmp_path: Path) -> None:
    things = ["plums", "three old boats", "tea", "gulls at noon", "a harbour", "red apples", "rain", "snow", "my aunt"]
    rows = [{"prompt": f"Say something about {thing}, in a few words."} for thing in things]
    for name, kept in (("chats", rows), ("test", rows[:3])):
        text = "".join(json.dumps({**row, "completion": "It is so.", "answer": "5"}) + "\n" for row in kept)
        (tmp_path / f"{name}.jsonl").write_text(text)
    overrides = ["data=file", f"data.sft={tmp_path}/chats.jsonl", f"data.test={tmp_path}/test.jsonl", "stage=sft"]
    overrides += ["data.decontaminate=true", "sft.epochs=1", "hardware.device=cpu", f"run.dir={tmp_path}/run"]
    done = trlhf.run(overrides)
    path = tmp_path / "run/check/offending.jsonl"
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [
        f"chats.jsonl:{n}" for n in (1, 2, 3)
    ]
    assert done.summary["contamination"]["offending"] == {"sft": 3} and done.summary["demonstrations"] == 6
    before = path.stat().st_mtime_ns
    assert trlhf.run(overrides).summary == done.summary
    assert path.stat().st_mtime_ns == before
