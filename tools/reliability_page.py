"""docs/reliability.md: who measures writes his section, and leaves the others as they are.

Rules: a section stands between two comments with its name; what is written is what was found, also where it is bad.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from lightship_agent.files import write_durably

PAGE: Final = Path(__file__).parents[1] / "docs" / "reliability.md"


def put(section: str, text: str, page: Path = PAGE) -> None:
    """Replace a section of the page.

    Raises:
        ValueError: the page has no such section.
        StorageError: storage.full, storage.unwritable.
    """
    begin, end = f"<!-- {section}: generated -->\n", f"<!-- {section}: end -->"
    old = page.read_text(encoding="utf-8")
    if begin not in old or end not in old:
        message = f"{page.name} has no section {section!r}."
        raise ValueError(message)
    before, _, rest = old.partition(begin)
    after = rest.partition(end)[2]
    write_durably(page, f"{before}{begin}\n{text.strip()}\n\n{end}{after}".encode())


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    names = tuple(columns)
    lines = [names, ("---",) * len(names), *(tuple(row) for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
