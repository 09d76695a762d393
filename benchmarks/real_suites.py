"""Claim: real AGIEval and GSM8K go through the suites ``agieval`` and ``reasoning``, and a tiny model is near chance.

``TRLHF_SHARED_DATA=FOLDER python benchmarks/real_suites.py`` makes offline copies of both from the files as published
(``FOLDER/agieval``, ``FOLDER/gsm8k``), asks every question of AGIEval's eight English multiple-choice tasks and of
GSM8K's test, and, as a file of one's own, AGIEval's selection of MATH, with the embedded base. It knows one small
generated world: what is shown is that the whole way runs and that chance is told from skill, not what a model can do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from provenance import RESULTS, ROOT, provenance

from trlhf.evaluation import mirror
from trlhf.evaluation.suites import SUITES
from trlhf.files import write_json
from trlhf.models import MICRO_BASE

SHARED = Path(os.environ.get("TRLHF_SHARED_DATA") or ROOT.parent / "shared" / "data")
KEPT = ("value", "low", "high", "n", "metric", "shots", "chance", "at_chance", "truncated", "too_long")


def measure(shared: Path, folder: Path, model: str, limit: int, votes: int) -> dict[str, Any]:
    """Ask everything; return suite → task → entry, and the published rows that were printed beside."""
    mirror.main([str(folder / "mirror"), f"agieval={shared / 'agieval'}", f"gsm8k={shared / 'gsm8k'}"])
    tasks = [*(task.name for task in SUITES["agieval"].tasks), "gsm8k", "file"]
    command = [sys.executable, "-m", "trlhf", "stage=eval", "hardware.device=cpu"]
    command += [f"evaluation.mirror={folder / 'mirror'}"]
    command += ["evaluation.suites=[agieval,reasoning,file]", f"evaluation.tasks=[{','.join(tasks)}]"]
    command += [f"evaluation.model={model}", f"evaluation.file={shared / 'agieval' / 'math.jsonl'}"]
    command += [f"evaluation.limit={limit}", f"evaluation.majority={votes}", f"run.dir={folder / 'run'}"]
    command += ["evaluation.batch_size=64", "evaluation.max_new_tokens=96"]
    subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    found = json.loads((folder / "run/eval/metrics.json").read_text())
    seconds = json.loads((folder / "run/summary.json").read_text())["seconds"]["eval"]
    suites = {
        suite: {task: {key: one["model"][key] for key in KEPT if key in one["model"]} for task, one in rows.items()}
        for suite, rows in found["suites"].items()
    }
    shown = ("task", "model", "published", "here", "difference")
    beside = [{key: row[key] for key in shown} for row in found["published"]]
    return {"seconds": round(seconds, 1), "suites": suites, "published": beside}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MICRO_BASE), help="folder or hub name; the embedded base by default")
    parser.add_argument("--limit", type=int, default=0, help="first questions of each task; 0: all")
    parser.add_argument("--votes", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS / "real_suites.json")
    asked = parser.parse_args(arguments)
    result = provenance()
    with tempfile.TemporaryDirectory() as name:
        result |= measure(SHARED, Path(name), asked.model, asked.limit, asked.votes)
    write_json(asked.out, result)


if __name__ == "__main__":
    main()
