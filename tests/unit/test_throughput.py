"""What benchmarks/throughput.py says of its options, its marks and its FLOPs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import throughput
import torch
from provenance import RESULTS, ROOT
from throughput_limit import decoding_bytes, training_flops, weights_of
from throughput_scaling import worse
from throughput_setting import SHAPES, Shape


def test_options_are_taken_as_the_command_line_of_trlhf_takes_them() -> None:
    options = throughput.parse(["hardware=gpu", "model=mistral-7b", "weights=random", "--repeats", "2"])
    assert (options.hardware, options.models, options.repeats) == ("gpu", ["mistral-7b"], 2)
    assert throughput.parse([]).models == ["micro", "25m"]
    assert throughput.parse(["hardware=gpu"]).models == ["mistral-7b"]
    for wrong in (["model=mistral-7b"], ["hardware=gpu", "model=micro"], ["weights=pretrained"]):
        with pytest.raises(SystemExit):
            throughput.parse(wrong)


def test_a_gpu_that_is_not_there_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="finds no CUDA device here; run this on a machine with an NVIDIA card"):
        throughput.refuse_without_card(throughput.parse(["hardware=gpu"]))
    throughput.refuse_without_card(throughput.parse(["hardware=gpu", "--quick"]))
    throughput.refuse_without_card(throughput.parse([]))


def test_every_missed_mark_is_said() -> None:
    arm: dict[str, Any] = {"per_second": 1.0, "peak_mb": 30_000.0, "of_limit": 0.3}
    compared = {
        "arms": {"trlhf": arm},
        "ratios": {"TRL": 0.9},
        "marks": {"TRL": 1.0},
        "limit_mark": 0.5,
        "gib_mark": 24,
    }
    cells = {"sft": compared, "scaling": {"rows": [], "worse_than_linear": ["labels"]}}
    assert throughput.missed(cells) == [
        "sft: 0.90 times TRL, mark 1.0",
        "sft: 30% of the limit, mark 50%",
        "sft: 27.9 GiB, mark 24",
        "scaling: labels is worse than linear",
    ]


def test_growth_is_judged_at_the_largest_size_and_not_where_it_should_be_quadratic() -> None:
    def row(series: str, growth: float, linear: bool = True) -> dict[str, Any]:
        return {"series": series, "growth": growth, "linear": linear}

    rows = [row("a", 1.0), row("b", 1.0), row("c", 1.0, False), row("a", 2.0), row("b", 1.2), row("c", 3.0, False)]
    assert worse(rows) == ["a"]


def test_flops_and_bytes_by_hand() -> None:
    shape = Shape(hidden=8, intermediate=16, layers=2, heads=2, kv_heads=1, vocabulary=10)
    assert weights_of(shape) == 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 10 * 8
    assert training_flops(shape, 3, 0) == 3 * 6 * weights_of(shape)
    assert training_flops(shape, 1, 6, 2) - training_flops(shape, 1, 0, 2) == 2 * (2 * 2 * 8 * 6) / 2  # qk and pv, half
    assert decoding_bytes(shape, 5, 7, 2) == 2 * (weights_of(shape) + 5 * 7 * 2 * 2 * 4)
    assert 7.0e9 < weights_of(SHAPES["mistral-7b"]) < 7.2e9


def test_the_document_has_the_tables_of_the_results(tmp_path: Path) -> None:
    document = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert document.count(throughput.BEGIN) == document.count(throughput.END) == 1
    path = RESULTS / "throughput.json"
    if path.exists():
        assert throughput.of_docs(json.loads(path.read_text(encoding="utf-8"))) in document
    copy = tmp_path / "copy.md"
    copy.write_text(document, encoding="utf-8")
    arm = {"per_second": 2.0, "peak_mb": 3.0}
    compared = {"unit": "tokens/s", "arms": {"trlhf": arm, "TRL": arm}, "marks": {}, "load": [0.5, 1.0]}
    compared |= {"ratios": {"TRL": 1.0}, "ratios_cpu": {"TRL": 1.0}}
    machine = {"cpu": "a CPU", "threads": "1"}
    throughput.write_docs({"command": "c", "commit": "d", "hardware": machine, "cells": {"x": compared}}, copy)
    written = copy.read_text(encoding="utf-8")
    assert "`c`, commit d, a CPU, 1 thread, load 0.5 to 1:" in written and "| x | TRL | 2 tokens/s | 1.00 |" in written
    assert written.startswith(document.split(throughput.BEGIN)[0])
    assert written.endswith(document.split(throughput.END)[1])
