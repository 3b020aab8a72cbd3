"""Bench drift: two pictures, of false alarms and of delays. Pure; SVG, in colours that suit a dark page too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final
from xml.sax.saxutils import escape

from .bench import YEAR
from .figures import Figures
from .streams import INDEPENDENT

_LEFT, _WIDTH, _STEP, _TOP = 300, 420, 26, 58
_OURS, _OTHERS, _REWRITTEN = "#2a9d8f", "#e08e45", "#d9b48f"
_GRID: Final = (1, 10, 100, 1_000, 10_000)
_DAYS: Final = (1, 3, 10, 30, 100)


def pictures(parts: dict[str, Any]) -> dict[str, str]:
    """By file name."""
    figures = Figures(parts)
    found = {}
    if figures.tools():
        found["drift-false-alarms.svg"] = _alarms(figures)
    if figures.part("delays"):
        found["drift-delays.svg"] = _delays(figures)
    return found


def _alarms(figures: Figures) -> str:
    """Hours of a year with a false alarm, by tool."""
    rates = [(figures.per_year(tool), tool) for tool in figures.tools()]
    found = sorted((rate, tool) for rate, tool in rates if rate is not None)
    title = (
        "Hours of a year in which something alarms although nothing happens",
        "30 features, independent rows, 200 an hour; every line is ten times the last",
    )
    lines = _frame(title, len(found), _GRID, YEAR)
    for number, (rate, tool) in enumerate(found):
        colour = _OURS if tool == "Lightship" else _OTHERS if "install_mb" in figures.tools()[tool] else _REWRITTEN
        hours = figures.tools()[tool]["alarms"][INDEPENDENT]["hours"]
        words = f"{rate:,.0f}" if rate >= 1 else f"none in {hours:,} hours"
        lines += _bar(number, tool, _place(max(rate, 1), YEAR), colour, words)
    return _svg(lines, len(found))


def _delays(figures: Figures) -> str:
    """Hours until each shift is a warning, at the default floor and without one."""
    shifts = list(dict.fromkeys(d["shift"] for d in figures.part("delays") if not d["shift"].startswith("missing")))
    title = (
        "Hours until one shifted feature of thirty is a warning (median; thin line: nine of ten)",
        "green: default floor 0.02; grey: floor 0.005; open end: not within 200 hours",
    )
    rows = [(shift, floor) for shift in shifts for floor in (0.02, 0.005)]
    lines = _frame(title, len(rows), _DAYS, 200)
    for number, (shift, floor) in enumerate(rows):
        found = figures.delay(shift, floor) or {}
        median, late = (found.get(name) for name in ("warning", "warning_90"))
        place = _place(max(median, 1) if median is not None else 200, 200)
        words = "–" if median is None else f"{median:g}"
        lines += _bar(number, shift if floor == 0.02 else "", place, _OURS if floor == 0.02 else "#999", words,
                      open_=median is None, late=_place(200 if late is None else late, 200))  # fmt: skip
    return _svg(lines, len(rows))


def _place(value: float, most: float) -> float:
    """Where a value lies on a scale of powers of ten that begins at 0.7."""
    return _WIDTH * math.log(value / 0.7) / math.log(most / 0.7)


def _frame(title: Sequence[str], rows: int, grid: Sequence[int], most: float) -> list[str]:
    lines = [f'<text x="10" y="16" font-size="14">{escape(title[0])}</text>']
    lines.append(f'<text x="10" y="33" font-size="11">{escape(title[1])}</text>')
    for value in grid:
        if value <= most:
            x = _LEFT + _place(value, most)
            lines.append(f'<line x1="{x:.0f}" x2="{x:.0f}" y1="{_TOP - 6}" y2="{_TOP + _STEP * rows}" stroke="#8884"/>')
            lines.append(f'<text x="{x:.0f}" y="{_TOP - 9}" font-size="10" text-anchor="middle">{value:,}</text>')
    return lines


def _bar(
    number: int, name: str, width: float, colour: str, words: str, *, open_: bool = False, late: float | None = None
) -> list[str]:
    y = _TOP + _STEP * number
    style = f'fill="none" stroke="{colour}" stroke-dasharray="3 3"' if open_ else f'fill="{colour}"'
    lines = [f'<text x="{_LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>']
    lines.append(f'<rect x="{_LEFT}" y="{y + 1}" width="{max(width, 2):.1f}" height="16" {style}/>')
    end = width
    if late is not None and late > width:
        middle = y + 9
        lines.append(
            f'<line x1="{_LEFT + width:.1f}" x2="{_LEFT + late:.1f}" y1="{middle}" y2="{middle}" stroke="{colour}"/>'
        )
        end = late
    lines.append(f'<text x="{_LEFT + end + 6:.1f}" y="{y + 13}">{escape(words)}</text>')
    return lines


def _svg(lines: Sequence[str], rows: int) -> str:
    box = f'viewBox="0 0 {_LEFT + _WIDTH + 90} {_TOP + _STEP * rows + 12}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="sans-serif" font-size="13" fill="#888">'
    return "\n".join([head, *lines, "</svg>", ""])
