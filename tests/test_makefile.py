"""What `make help` promises about variables reaches the commands."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HELP = re.compile(r"^([a-z0-9-]+):.*## (.*)$", re.MULTILINE)
VARIABLE = re.compile(r"\b([A-Z][A-Z_]+)=")
PROMISED = [
    (target, name)
    for target, words in HELP.findall((ROOT / "Makefile").read_text(encoding="utf-8"))
    for name in VARIABLE.findall(words)
]


def would_run(target: str, *variables: str) -> str:
    made = subprocess.run(
        ["make", "-n", target, *variables], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    return made.stdout


def test_help_names_variables() -> None:
    assert {"FUZZ_SECONDS", "ONLY", "AGAIN", "KEEP"} <= {name for _, name in PROMISED}


@pytest.mark.parametrize(("target", "name"), PROMISED)
def test_a_variable_that_help_names_changes_what_is_run(target: str, name: str) -> None:
    assert would_run(target, f"{name}=7") != would_run(target)
