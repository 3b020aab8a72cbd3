"""docs/network-faults.md names a test for each fault, and each test of the network is in it."""

from __future__ import annotations

import ast
import re

import pytest
from tests.docs.fences import ROOT

PAGE = (ROOT / "docs" / "network-faults.md").read_text(encoding="utf-8")


def listed() -> set[str]:
    return set(re.findall(r"\| `(test_\w+)` \|$", PAGE, re.MULTILINE))


def written() -> set[str]:
    trees = [ast.parse(path.read_text()) for path in (ROOT / "tests" / "network").glob("test_*.py")]
    names = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return {name for name in names if name.startswith("test_")}


def test_the_page_and_the_tests_know_the_same_faults() -> None:
    assert listed() == written()


@pytest.mark.parametrize(
    "fault",
    ["drop|closes", "RST", "404", "403", "503", "truncated", "slow", "Content-Range", "302", "captive portal", "IPv6"],
)
def test_every_kind_of_fault_has_a_row(fault: str) -> None:
    assert any(re.search(fault, row) for row in PAGE.splitlines() if row.startswith("| "))
