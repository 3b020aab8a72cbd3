"""The crash test's table: docs/reliability.md says what the code defines, and some of its rows are played here."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from crash_test import page
from crash_test.__main__ import all_rows, areas, run

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
KINDS = ("error", "SIGKILL", "hang", "disk full", "read-only", "clock", "lost report", "stored state", "network")
#: Of most kinds of fault, and of both programs.
SAMPLE = (
    "SIGKILL: entering `swapped`: before its rename",
    "SIGKILL: step `soaking`: ",
    "disk full: entering `trying`: update.json can't be written",
    "hang: step `reaching`: ",
    "stored state: update.json: its last 20 bytes are missing",
    "lost report: report of the commit: killed once the server has it",
    "SIGKILL: release: timestamp: before its rename",
    "SIGKILL: rollout: first wave: after its commit",
)


def listed() -> list[tuple[str, ...]]:
    """The rows on the page: fault, point, how, states, serves, result."""
    part = PAGE.partition("<!-- crash-test: generated -->")[2].partition("<!-- crash-test: end -->")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ") and not line.startswith(("| fault", "| ---"))]
    return [tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]) for line in lines]


def test_there_are_at_least_a_hundred_rows_and_each_has_a_name_of_its_own() -> None:
    names = Counter(row.name for row in all_rows())

    assert len(names) >= 100
    assert [name for name, n in names.items() if n > 1] == []


def test_the_page_has_every_row_that_is_defined_and_no_other() -> None:
    assert [row[:3] for row in listed()] == [page.cells(row) for rows in areas().values() for row in rows]


def test_every_row_on_the_page_is_as_expected_or_says_what_it_needs() -> None:
    odd = [row for row in listed() if not row[5].startswith(("as expected", "skipped: needs "))]

    assert odd == []


def test_the_page_says_what_the_code_expects() -> None:
    played = [(row, want) for row, want in zip(listed(), all_rows(), strict=True) if not row[5].startswith("skipped")]

    assert [row[:3] for row, want in played if row[3:5] != (want.path or "–", want.serves)] == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_fault_has_rows(kind: str) -> None:
    assert [row for row in all_rows() if row.kind == kind]


def test_every_state_is_killed_starved_and_hung_on_entry() -> None:
    found = {(row.kind, row.point) for row in all_rows()}

    for state in ("fetching", "trying", "swapped", "reaching", "idle"):
        assert {(kind, f"entering `{state}`") for kind in ("SIGKILL", "hang", "disk full", "read-only")} <= found


def test_a_row_that_misses_is_told_and_is_no_success(tmp_path: Path) -> None:
    row = next(r for r in all_rows() if r.kind == "undisturbed")
    wrong = type(row)(**{**{f: getattr(row, f) for f in row.__dataclass_fields__}, "serves": "v1"})

    (found,) = run([wrong], tmp_path / "rows")

    assert found.wrong == ("serves: expected v1, found v2",)


@pytest.mark.slow
def test_a_sample_of_the_rows_is_as_expected(tmp_path: Path) -> None:
    rows = [row for row in all_rows() if row.name in SAMPLE]
    assert len(rows) == len(SAMPLE)

    found = run(rows, tmp_path / "rows")

    assert {f.row.name: f.wrong for f in found if f.wrong} == {}
