"""The documents name what exists: every test of docs/ppo.md, every path that they link to."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROPERTIES = ROOT / "docs" / "ppo.md"


def names_in(path: Path) -> set[str]:
    """Return the names of the test functions of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_property_has_a_test_that_exists() -> None:
    rows = [line for line in PROPERTIES.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith(("| property", "| ---"))]
    assert len(rows) > 30
    for row in rows:
        assert row.startswith("| ✓ "), row
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert named, row
        for file, test in named:
            assert test in names_in(ROOT / "tests" / file), f"{file}::{test}"


def test_the_table_of_recipes_is_filled_by_tests() -> None:
    """A recipe is in the parameters of each test that its cells rest on, and its suites are those that ran."""
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| [`")]
    smoke = runpy.run_path(str(ROOT / "tests" / "smoke" / "test_recipes.py"))
    tested = {
        name: set(next(mark.args[1] for mark in test.pytestmark if mark.args[0] == "recipe"))
        for name, test in smoke.items()
        if name.startswith("test_it") and hasattr(test, "pytestmark")
    }
    assert len(tested) == 4
    assert [re.findall(r"`([\w-]+)`", row[0])[0] for row in rows] == smoke["RECIPES"]
    for recipe, (_, composes, runs, template, suites) in zip(smoke["RECIPES"], rows, strict=True):
        assert composes == "yes" and template.split()[0] in ("yes", "its")
        assert re.sub(r" \(.*?\)", "", runs) == "sft, reward, rl, eval"
        chatml = recipe in smoke["CHATML"]  # they have a test of their own
        beyond = {"test_it_goes_on_with_labels_and_rl"} if chatml else set()
        assert {name for name, recipes in tested.items() if recipe not in recipes} == beyond
        assert set(smoke["SUITES"][recipe]) <= set(re.findall(r"`([\w-]+)`", suites))
    for file, test in re.findall(r"`([\w/]+\.py)::(\w+)`", text):
        assert test in names_in(ROOT / "tests" / file), f"{file}::{test}"


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)\)", text)
    inside = [target for target in targets if not target.startswith("http")]
    missing = [target for target in inside if not ((ROOT / document).parent / target).exists()]
    assert not missing
