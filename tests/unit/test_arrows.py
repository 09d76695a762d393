"""Who may import whom: config ← maths ← models ← stages ← pipeline ← command line."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import trlhf

PACKAGE = Path(trlhf.__file__).parent
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "pandas", "pyarrow", "scipy", "sqlalchemy")
NO_TORCH = (
    *("config", "schema", "checks", "types", "errors", "files", "fingerprint", "run", "admission", "compose"),
    *("preemption", "closing", "hardware", "hardware_checks", "attention", "checks_mixture", "data_report"),
    *("contamination.grams", "contamination.near", "contamination.ngrams", "contamination.compare"),
    *(f"evaluation.{name}" for name in ("suites", "checks", "protocol", "published", "report")),
)
STAGES = ("sft", "reward", "rl")
MATHS = ("losses", "masks", "advantages")


def modules() -> dict[str, ast.Module]:
    """Return every module by dotted name; the links are followed."""
    found = {}
    for folder, _, names in os.walk(PACKAGE, followlinks=True):
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                parts = ("trlhf", *path.relative_to(PACKAGE).with_suffix("").parts)
                found[".".join(parts).removesuffix(".__init__")] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(node: ast.AST, *, deep: bool = True, typing: bool = False) -> Iterator[str]:
    """Yield what a module imports.

    Args:
        node: the module.
        deep: also inside functions.
        typing: also under ``if TYPE_CHECKING``.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative import"
            yield str(child.module)
            yield from (f"{child.module}.{alias.name}" for alias in child.names if child.module == "trlhf")
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test) and not typing:
            continue
        elif deep or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from imports(child, deep=deep, typing=typing)


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


MODULES = modules()


def test_the_links_are_followed() -> None:
    assert {"trlhf", "trlhf.config", "trlhf.conf", "trlhf.sft"} <= set(MODULES)


@pytest.mark.parametrize("name", NO_TORCH)
def test_configuration_knows_nothing_heavy(name: str) -> None:
    assert [found for found in imports(MODULES[f"trlhf.{name}"]) if inside(found, *HEAVY)] == []


@pytest.mark.parametrize("name", ["trlhf", "trlhf.__main__", "trlhf.console"])
def test_the_command_line_loads_nothing_heavy_by_being_imported(name: str) -> None:
    assert [found for found in imports(MODULES[name], deep=False) if inside(found, *HEAVY)] == []


def test_only_the_command_line_sees_hydra() -> None:
    users = {name for name, tree in MODULES.items() if any(inside(x, "hydra", "omegaconf") for x in imports(tree))}
    assert users <= {"trlhf.__main__", "trlhf.compose"}


def test_stages_never_import_each_other() -> None:
    for name, tree in MODULES.items():
        own = [stage for stage in STAGES if inside(name, f"trlhf.{stage}")]
        others = [f"trlhf.{stage}" for stage in STAGES if own and stage not in own]
        assert [found for found in imports(tree, typing=True) if inside(found, *others)] == [], name


def test_losses_are_maths_only() -> None:
    allowed = ("torch", "jaxtyping", "numpy", "trlhf.types", *(f"trlhf.{name}" for name in MATHS))
    for name, tree in MODULES.items():
        if inside(name, *(f"trlhf.{maths}" for maths in MATHS)):
            foreign = [found for found in imports(tree) if not inside(found, *allowed, *sys.stdlib_module_names)]
            assert foreign == [], name


def test_what_is_below_does_not_import_what_is_above() -> None:
    above = ("trlhf.pipeline", *(f"trlhf.{stage}" for stage in STAGES))
    for name, tree in MODULES.items():
        if inside(
            name, *(f"trlhf.{low}" for low in ("models", "rollout", "export", "logprobs", "labelers", "ledger", *MATHS))
        ):
            assert [found for found in imports(tree) if inside(found, *above)] == [], name


def test_only_the_command_line_imports_the_pipeline() -> None:
    users = {name for name, tree in MODULES.items() if any(inside(x, "trlhf.pipeline") for x in imports(tree))}
    assert users <= {"trlhf", "trlhf.__main__"}


def test_nobody_imports_the_top_level_folders() -> None:
    for name, tree in MODULES.items():
        assert [found for found in imports(tree, typing=True) if inside(found, "sft", "reward", "conf")] == [], name


def test_every_folder_with_modules_is_a_package() -> None:
    for folder, _, names in os.walk(PACKAGE, followlinks=True):
        if any(name.endswith(".py") for name in names):
            assert "__init__.py" in names, f"{folder} would be missing from the wheel"
