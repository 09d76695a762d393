"""The documents name what exists: every test of docs/ppo.md, every path that they link to."""

from __future__ import annotations

import ast
import re
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


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)\)", text)
    inside = [target for target in targets if not target.startswith("http")]
    missing = [target for target in inside if not ((ROOT / document).parent / target).exists()]
    assert not missing
