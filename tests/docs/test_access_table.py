"""The operator's guide says in a table which role may do what. Each row is asked of the rules."""

from __future__ import annotations

import pytest
from tests.docs.fences import ROOT

from lightship.access.rules import RULES, Grant, Role, Verb, permit
from lightship_agent.contract.codes import AccessError

GUIDE = ROOT / "docs" / "operators-guide.md"
COLUMNS = ("verb", *(role.value for role in Role), "what it is")


def rows() -> list[dict[str, str]]:
    lines = GUIDE.read_text().splitlines()
    start = lines.index(f"| {' | '.join(COLUMNS)} |") + 2
    found = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        found.append(dict(zip(COLUMNS, (cell.strip(" `") for cell in line.strip("|").split("|")), strict=True)))
    return found


def may(role: Role, verb: Verb) -> str:
    try:
        permit(Grant("x", role, "here"), verb, environment="here", open_reads=False)
    except AccessError:
        return "no"
    return "yes"


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["verb"])
def test_the_rules_allow_what_the_guide_says(row: dict[str, str]) -> None:
    verb = Verb(row["verb"])
    assert {role.value: may(role, verb) for role in Role} == {role.value: row[role.value] for role in Role}
    assert row["what it is"] == RULES[verb].words


def test_the_table_holds_every_verb_but_the_one_that_asks_nobody_who_they_are() -> None:
    assert [row["verb"] for row in rows()] == [v.value for v in Verb if v is not Verb.OPEN]
