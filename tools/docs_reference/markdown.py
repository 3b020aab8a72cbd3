"""Markdown: the few forms the reference needs. Rules: pure; what a table can't hold is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

NOTICE = "<!-- Generated from the code by `make docs`; edit the code instead. -->"


def page(title: str, introduction: str, *sections: str) -> str:
    """A whole page."""
    return "\n\n".join([NOTICE, f"# {title}", introduction.strip(), *sections]).rstrip() + "\n"


def section(title: str, *parts: str, level: int = 2) -> str:
    """A heading and what stands below it; empty parts are left out."""
    return "\n\n".join([f"{'#' * level} {title}", *(p for p in parts if p)])


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, or nothing when it has no row."""
    lines = [f"| {' | '.join(_cell(c) for c in row)} |" for row in rows]
    if not lines:
        return ""
    return "\n".join([f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *lines])


def code(text: str) -> str:
    """Inline code; nothing for nothing."""
    return f"`{text}`" if text else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|") or "–"
