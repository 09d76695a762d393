"""What results say of the command that made them."""

from pathlib import Path

import pytest
from provenance import public

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        (str(ROOT / "benchmarks" / "kill.py"), "benchmarks/kill.py"),
        (f"run.dir={ROOT / 'runs' / 'a'}", "run.dir=runs/a"),
        ("/somewhere/else/grid", "…/grid"),
        ("run.dir=/somewhere/else/grid", "run.dir=…/grid"),
        ("rl.kl_coef=0.1", "rl.kl_coef=0.1"),
        ("--folder", "--folder"),
        ("key=", "key="),
    ],
)
def test_a_command_names_no_folder_above_the_repository(argument, shown):
    assert public(argument) == shown
