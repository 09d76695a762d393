"""The claim that the tests guard every pure function, measured: one slip at a time, and which test notices it.

    python benchmarks/mutation.py                     all mutants, one process each (five minutes on one core)
    python benchmarks/mutation.py --jobs 2 --only gae
    python benchmarks/mutation.py --missing           only those that the results file does not hold yet
    python benchmarks/mutation.py --table             docs/mutants.md again, from the results file

Each mutant is applied to a copy of the package in a folder of its own, and the tests of its file run against that copy.
Exit status 1 if a mutant survives, or one that is listed as equivalent does not.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mutants import EQUIVALENT, MUTANTS
from provenance import RESULTS, ROOT, from_root, provenance

TESTS = {
    "trlhf/masks.py": ["tests/unit/test_masks.py"],
    "trlhf/advantages.py": ["tests/parity/test_advantages_papers.py", "tests/unit/test_advantages.py"],
    "trlhf/losses/ppo.py": ["tests/parity/test_ppo_papers.py", "tests/unit/test_losses.py"],
    "trlhf/losses/dpo.py": ["tests/parity/test_preference_papers.py", "tests/unit/test_losses.py"],
    "trlhf/losses/reward.py": ["tests/parity/test_preference_papers.py", "tests/unit/test_reward_losses.py"],
    "trlhf/logprobs.py": ["tests/parity/test_logprobs_papers.py", "tests/unit/test_logprobs.py"],
}
DOCUMENT = ROOT / "docs" / "mutants.md"
SECONDS = 300  # after which a test run counts as broken, not as failed
# Imported once, by the server that every mutant's process is forked from; nothing of trlhf, which must be the copy's.
PRELOADED = ["pytest", "torch", "jaxtyping", "numpy", "yaml", "sqlalchemy", "transformers.modeling_utils"]
PRELOADED += ["scipy.linalg", "scipy.optimize", "scipy.special", "scipy.stats"]
PRELOADED += ["transformers.models.mistral.modeling_mistral", "tokenizers"]


def mutate(source: str, function: str, fragment: str, replacement: str) -> str:
    """Replace a fragment in one function of a module, or in one method (``Class.method``).

    Raises:
        ValueError: the fragment does not occur exactly once there (docstring left out), or nothing but text changes.
    """
    body: Sequence[ast.stmt] = ast.parse(source).body
    *owners, name = function.split(".")
    for owner in owners:
        body = [stmt for node in body if isinstance(node, ast.ClassDef) and node.name == owner for stmt in node.body]
    nodes = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == name]
    if len(nodes) != 1:
        raise ValueError(f"there are {len(nodes)} functions {function}")
    inside = nodes[0].body[1:] if ast.get_docstring(nodes[0]) else nodes[0].body
    lines = source.splitlines(keepends=True)
    first, last = inside[0].lineno - 1, inside[-1].end_lineno
    text = "".join(lines[first:last])
    if text.count(fragment) != 1:
        raise ValueError(f"{function}: {fragment!r} occurs {text.count(fragment)} times, it must occur once")
    mutant = "".join([*lines[:first], text.replace(fragment, replacement), *lines[last:]])
    if ast.dump(ast.parse(mutant)) == ast.dump(ast.parse(source)):
        raise ValueError(f"{function}: {fragment!r} → {replacement!r} changes nothing")
    return mutant


def all_mutants() -> list[dict[str, str]]:
    """Return the table as one record a mutant, each checked against the sources as they are now."""
    records = []
    for file, functions in MUTANTS.items():
        source = (ROOT / file).read_text(encoding="utf-8")
        for function, mutants in functions.items():
            for kind, fragment, replacement in mutants:
                mutate(source, function, fragment, replacement)
                records.append({"file": file, "function": function, "kind": kind, "from": fragment, "to": replacement})
    for file, function, fragment, replacement, _ in EQUIVALENT:
        mutate((ROOT / file).read_text(encoding="utf-8"), function, fragment, replacement)
        names = {"file": file, "function": function, "kind": "equivalent", "from": fragment, "to": replacement}
        records.append(names)
    return records


def copy_package(folder: Path) -> Path:
    """Copy the package (its links followed), the tests and their settings into a folder."""
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    for name in ("trlhf", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


class Watch:
    """A pytest plugin that remembers the first test whose call failed, and anything else that went wrong."""

    def __init__(self) -> None:
        self.failed: str | None = None
        self.broken: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and report.when == "call":
            self.failed = self.failed or report.nodeid
        elif report.failed:
            self.broken.append(f"{report.nodeid} ({report.when}): {report.longreprtext}")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.broken.append(f"{report.nodeid} (collection): {report.longreprtext}")


def try_mutant(record: Mapping[str, str], template: Path) -> dict[str, Any]:
    """Apply one mutant (none without ``function``) to a copy of its own and run the tests of its file, in this process.

    Raises:
        RuntimeError: something else happened than that all tests passed or one failed, or not the copy was tested.
    """
    import pytest

    start = time.monotonic()
    sys.dont_write_bytecode = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        shutil.copytree(template, folder, dirs_exist_ok=True)
        if "function" in record:
            path = folder / record["file"]
            source = path.read_text(encoding="utf-8")
            path.write_text(mutate(source, record["function"], record["from"], record["to"]), encoding="utf-8")
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        watch, output = Watch(), io.StringIO()
        if early := [module for module in sys.modules if module.split(".")[0] == "trlhf"]:
            raise RuntimeError(f"imported before the copy: {early}")
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = pytest.main(
                ["-x", "-p", "no:cacheprovider", "--tb=short", *TESTS[record["file"]]], plugins=[watch]
            )
        os.chdir("/")
    tested = sys.modules[record["file"].removesuffix(".py").replace("/", ".")].__file__
    if tested != str(folder / record["file"]):
        raise RuntimeError(f"{tested} was tested in place of the copy in {folder}")
    if watch.broken or status not in (0, 1) or (status == 1) != (watch.failed is not None):
        raise RuntimeError(f"{dict(record)}: pytest ended with {status}: {watch.broken}\n{output.getvalue()}")
    by = watch.failed.partition("[")[0] if watch.failed else None
    return {**record, "killed": watch.failed is not None, "by": by, "seconds": round(time.monotonic() - start, 1)}


def _identity(record: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(record[name] for name in ("file", "function", "kind", "from", "to"))


def _tried(results: Mapping[str, Any]) -> dict[tuple[str, ...], dict[str, Any]]:
    """Return the mutants of a results file, each with the commit at which it was tried."""
    return {_identity(mutant): {"commit": results["commit"], **mutant} for mutant in results["mutants"]}


def summary(mutants: Sequence[Mapping[str, Any]]) -> str:
    """Return how many were killed, and which came out otherwise than they should."""
    counted = [mutant for mutant in mutants if mutant["kind"] != "equivalent"]
    lines = [f"{sum(mutant['killed'] for mutant in counted)} of {len(counted)} killed"]
    for mutant in mutants:
        if not mutant["right"]:
            wrong = "no equivalent, killed by {by}: " if mutant["killed"] else "SURVIVES: "
            lines.append((wrong + "{function}: {from!r} → {to!r}").format(**mutant))
    return "\n".join(lines)


def document(results: Mapping[str, Any]) -> str:
    """Return docs/mutants.md."""
    mutants = [mutant for mutant in results["mutants"] if mutant["kind"] != "equivalent"]
    killed = sum(mutant["killed"] for mutant in mutants)
    commits = ", ".join(dict.fromkeys(mutant.get("commit", results["commit"]) for mutant in mutants))
    lines = [
        "# Mutants",
        "",
        "<!-- generated by `python benchmarks/mutation.py`; change benchmarks/mutants.py instead -->",
        "",
        f"Does a test notice when the maths is wrong? {killed} of {len(mutants)} deliberate slips are noticed, each",
        "tried alone on a copy of the package (`python benchmarks/mutation.py`,",
        f"commits {commits}, [raw](../benchmarks/results/mutation.json)).",
        "Kinds: a sign flipped, a mask dropped, a shift by one,",
        "another denominator, two things swapped, a clip or a guard dropped, a term dropped, a gradient cut.",
        "",
    ]
    for file in MUTANTS:
        lines += [f"## {file}", "", "| function | kind | mutant | killed by |", "| --- | --- | --- | --- |"]
        for mutant in mutants:
            if mutant["file"] == file:
                change = f"{_code(mutant['from'])} → {_code(mutant['to'])}"
                by = f"`{mutant['by'].removeprefix('tests/')}`" if mutant["killed"] else "**survives**"
                lines.append(f"| `{mutant['function']}` | {mutant['kind']} | {change} | {by} |")
        lines.append("")
    lines += ["## Equivalent, not counted", "", "| function | mutant | why no test can tell |", "| --- | --- | --- |"]
    for _, function, fragment, replacement, reason in EQUIVALENT:
        lines.append(f"| `{function}` | {_code(fragment)} → {_code(replacement)} | {reason} |")
    return "\n".join([*lines, "", PARITY])


def _code(text: str) -> str:
    """Return a fragment as inline code in a table cell; nothing is shown as such."""
    text = re.sub(r"\s*\n\s*", " ⏎ ", text).strip().replace("|", r"\|")
    return f"`{text}`" if text else "nothing"


PARITY = """## What else the losses are held against

- Loops over plain floats, written from the papers: `tests/parity/test_*_papers.py`, in float64 to 1e-9 or better.
  `token_logprobs`, `token_entropy` and `full_kl_loss` compute in float32: to 1e-6.
- TRL 1.16's own code, `tests/parity/test_trl.py`: the losses of DPO (also from tokens to gradients, through a
  `DPOTrainer`), its likelihood of the chosen response, the reward model's loss, GRPO's clipped surrogate, its `delta`
  (our dual clip) and its KL (k3), RLOO's advantages with and without the KL in the reward, GKD's full KL,
  log-probabilities and entropy. Methods of its trainers are called on a stand-in that holds what they read.
- TRL has nothing to compare with for `gae`, `value_loss`, `explained_variance` and `adapted_kl_coef` (it has no PPO),
  `verdict_loss`, ties and flipped labels. `whiten` divides by the standard deviation over n, RLOO's normalised
  advantages by that over n - 1, plus 1e-4: not the same quantity.
"""


def write(results: Mapping[str, Any], kept: Mapping[tuple[str, ...], Any], wanted: Sequence[Mapping[str, str]]) -> None:
    """Write the results, those kept from before among them, in the order of the table, and the document."""
    found = {**kept, **{_identity(mutant): mutant for mutant in results["mutants"]}}
    whole = {**results, "mutants": [found[_identity(record)] for record in wanted if _identity(record) in found]}
    text = json.dumps(whole, indent=2, ensure_ascii=False)
    (RESULTS / "mutation.json").write_text(text + "\n", encoding="utf-8")
    DOCUMENT.write_text(document(whole), encoding="utf-8")


def main() -> int:
    """Try the mutants, write the results and the document; 1 when one survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="processes at the same time")
    parser.add_argument("--only", help="mutants of this function (or file) only; written with --missing only")
    parser.add_argument("--missing", action="store_true", help="only what the results file lacks; the rest is kept")
    parser.add_argument("--table", action="store_true", help="write docs/mutants.md from the results file, run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        DOCUMENT.write_text(
            document(json.loads((RESULTS / "mutation.json").read_text(encoding="utf-8"))), encoding="utf-8"
        )
        return 0
    wanted = all_mutants()
    kept = _tried(json.loads((RESULTS / "mutation.json").read_text(encoding="utf-8"))) if arguments.missing else {}
    records = [r for r in wanted if arguments.only in (None, r["function"], r["file"]) and _identity(r) not in kept]
    results: dict[str, Any] = provenance()
    results["mutants"] = []
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as name, context.Pool(arguments.jobs, maxtasksperchild=1) as pool:
        template = copy_package(Path(name).resolve())
        unchanged: list[Mapping[str, str]] = [{"file": file} for file in dict.fromkeys(r["file"] for r in records)]
        pending = [pool.apply_async(try_mutant, (record, template)) for record in [*unchanged, *records]]
        for record in unchanged:
            result = pending.pop(0).get(SECONDS)
            if result["killed"]:
                sys.exit(f"{result['by']} fails before anything is changed in {record['file']}")
        for task in pending:
            result = task.get(SECONDS)
            results["mutants"].append(result)
            result["right"] = result["killed"] != (result["kind"] == "equivalent")
            result["commit"] = results["commit"]
            outcome = f"killed by {result['by']}" if result["killed"] else "survives"
            change = f"{result['from']!r} → {result['to']!r}"
            if arguments.missing and len(results["mutants"]) % 10 == 0:
                write(results, kept, wanted)
            print(f"{result['seconds']:5.1f} s  {result['function']}: {change}: {outcome}", flush=True)
    print(summary(results["mutants"]))
    if arguments.only is None or arguments.missing:
        write(results, kept, wanted)
        print(f"written to {from_root(RESULTS / 'mutation.json')} and {from_root(DOCUMENT)}")
    return 0 if all(mutant["right"] for mutant in results["mutants"]) else 1


if __name__ == "__main__":
    sys.exit(main())
