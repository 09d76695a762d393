"""The table of mutants is in step with the sources, and what was measured is in step with the table."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
NEED_A_MODEL = {"can_share_prompts", "measured_logprobs", "response_hidden", "response_logprobs"}
CHECKS_AND_WORDS = {"_check_design", "same_lengths", "_drawn", "_in_a_row", "_refund", "_check", "is_repetitive"}
SEEN_THROUGH_OTHERS = {"_quadratic", "_longest_run", "_maximise"}  # chunks, runs, a search whose end `_polish` settles
NOT_MUTATED = NEED_A_MODEL | CHECKS_AND_WORDS | SEEN_THROUGH_OTHERS


@pytest.fixture
def mutation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import mutation

    return mutation


def test_every_fragment_occurs_exactly_once_in_its_function(mutation: ModuleType) -> None:
    assert len(mutation.all_mutants()) > 100


def test_every_pure_function_has_at_least_four_mutants(mutation: ModuleType) -> None:
    for file in mutation.TESTS:
        body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        functions = {node.name for node in body if isinstance(node, ast.FunctionDef)} - NOT_MUTATED
        mutated = {name for name, mutants in mutation.MUTANTS[file].items() if len(mutants) >= 4 and "." not in name}
        assert mutated == functions, file


def test_results_and_document_are_those_of_this_table(mutation: ModuleType) -> None:
    results = json.loads((ROOT / "benchmarks/results/mutation.json").read_text(encoding="utf-8"))
    tried = [
        {name: mutant[name] for name in ("file", "function", "kind", "from", "to")} for mutant in results["mutants"]
    ]
    assert tried == mutation.all_mutants(), "run python benchmarks/mutation.py"
    assert all(mutant["right"] for mutant in results["mutants"])
    assert mutation.DOCUMENT.read_text(encoding="utf-8") == mutation.document(results)


def test_a_fragment_that_is_gone_or_not_unique_or_changes_nothing_is_refused(mutation: ModuleType) -> None:
    source = 'def f(x):\n    """Return x + 1."""\n    return x + 1\n\n\ndef g(x):\n    return x + 1 + 1\n'
    assert mutation.mutate(source, "f", "x + 1", "x - 1") == source.replace("return x + 1\n\n", "return x - 1\n\n")
    with pytest.raises(ValueError, match="occurs 0 times"):
        mutation.mutate(source, "f", "y", "x")
    with pytest.raises(ValueError, match="occurs 2 times"):
        mutation.mutate(source, "g", "+ 1", "- 1")
    with pytest.raises(ValueError, match="changes nothing"):
        mutation.mutate(source, "f", "x + 1", "(x + 1)")
    method = "class C:\n    def f(self):\n        return 1\n"
    assert mutation.mutate(method, "C.f", "1", "2") == method.replace("1", "2")
    with pytest.raises(ValueError, match=r"0 functions D\.f"):
        mutation.mutate(method, "D.f", "1", "2")
    with pytest.raises(ValueError, match="0 functions h"):
        mutation.mutate(source, "h", "x", "y")
