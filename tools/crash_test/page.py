"""Crash test: its section of docs/reliability.md, and what came of each row as a line of JSON.

Rules: every row that was defined is listed, those that missed and those that were skipped too.
"""

from __future__ import annotations

import platform
import sys
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
import onnxruntime

import reliability_page

from .row import Found, Row

COMMAND: Final = "make crash-test"
SECTION: Final = "crash-test"


def cells(row: Row) -> tuple[str, str, str]:
    """How a row is named on the page: fault, point, how exactly."""
    return row.kind, row.point, row.fault or "–"


class Note(msgspec.Struct, kw_only=True):
    """What came of a row, for programs."""

    name: str
    path: str
    serves: str
    debris: tuple[str, ...]
    steps: tuple[str, ...]
    seconds: float
    wrong: tuple[str, ...]
    skipped: str


def note(found: Found, notes: Path) -> None:
    """Keep what came of a row, as a line of JSON."""
    made = Note(
        name=found.row.name, path=found.path, serves=found.serves, debris=found.debris, steps=found.steps,
        seconds=found.seconds, wrong=found.wrong, skipped=found.skipped,
    )  # fmt: skip
    with notes.open("ab") as f:
        f.write(msgspec.json.encode(made) + b"\n")


def noted(rows: Iterable[Row], notes: Path) -> dict[str, Found]:
    """What was kept of these rows, the newest of each."""
    of, found = {row.name: row for row in rows}, {}
    for line in notes.read_bytes().splitlines() if notes.exists() else ():
        n = msgspec.json.decode(line, type=Note)
        row = of.get(n.name)
        if row is not None:
            found[n.name] = Found(row, n.path, n.serves, n.debris, n.steps, n.seconds, n.wrong, n.skipped)
    return found


def write(areas: dict[str, list[Found]]) -> None:
    """Write the section."""
    reliability_page.put(SECTION, section(areas))


def section(areas: dict[str, list[Found]]) -> str:
    """The text of the section."""
    everything = [f for found in areas.values() for f in found]
    missed, skipped = [f for f in everything if f.wrong], [f for f in everything if f.skipped]
    kinds = Counter(f.row.kind for f in everything)
    facts = (
        f"**{len(everything)} rows: {len(everything) - len(missed) - len(skipped)} as expected, {len(missed)} not, "
        f"{len(skipped)} skipped.** `{COMMAND}`, {datetime.now(UTC):%Y-%m-%d}; "
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, "
        f"onnxruntime {onnxruntime.__version__}."
    )
    counts = ", ".join(f"{kind} {n}" for kind, n in kinds.most_common())
    parts = [facts, f"By fault: {counts}."]
    for area, found in areas.items():
        parts += [f"### {area}", _table(found)]
    return "\n\n".join(parts)


def _table(found: Iterable[Found]) -> str:
    columns = ("fault", "point", "how", "states passed", "serves", "result")
    return reliability_page.table(columns, ((*cells(f.row), f.path or "–", f.serves or "–", _result(f)) for f in found))


def _result(found: Found) -> str:
    if found.skipped:
        return f"skipped: needs {found.skipped}"
    if found.wrong:
        return "**not as expected**: " + "; ".join(found.wrong)
    return "as expected" + (f"; left: {', '.join(found.debris)}" if found.debris else "")


def say(words: str) -> None:
    """Progress, at once."""
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()
