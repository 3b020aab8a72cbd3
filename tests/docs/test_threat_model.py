"""docs/threat-model.md: every test it names exists, every key has a row, every attack of the list is answered."""

from __future__ import annotations

import ast
import re

import pytest
from tests.docs.fences import ROOT

from lightship.release.keys import ROLES

PAGE = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| stolen ")]
ATTACKS = (
    "unsigned",
    "wrong key",
    "under the threshold",
    "expired",
    "frozen",
    "rolled back",
    "fast-forwarded",
    "mix-and-match",
    "endless data",
    "slow drip",
    "truncation",
    "wrong bytes",
    "revoked key",
    "revoked release",
    "foreign, replayed",
    "zstd bomb",
    "JSON bomb",
    "traversal, links, duplicates, device nodes, huge counts",
    "external data",
    "custom operators",
    "computes for ever",
    "negative feature",
    "giant initialisers",
    "token reuse",
    "foreign name",
    "another's topic",
    "client id",
)


def written() -> set[str]:
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        found |= {node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    return found


def test_every_test_that_is_named_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))

    assert len(named) > 50
    assert named - written() == set()


def test_every_row_names_a_test() -> None:
    tables = [row for row in ROWS if not set(row) <= {"|", "-", " "} and "shown by" not in row]

    assert [row[:60] for row in tables if "`test_" not in row] == []


@pytest.mark.parametrize("role", ROLES)
def test_every_role_has_a_row_of_what_its_key_is_worth_to_a_thief(role: str) -> None:
    section = PAGE.partition("## Who can do what with a stolen key")[2].partition("\n## ")[0]

    assert any(f"`{role}`" in row.split("|")[1] for row in section.splitlines() if row.startswith("| "))


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_has_a_row(attack: str) -> None:
    assert any(attack in row.split("|")[1] for row in ROWS)
