"""Bench serving: a picture of what a request costs each server. Pure; SVG, in colours that suit a dark page too."""

from __future__ import annotations

import math
from xml.sax.saxutils import escape

from .figures import Figures
from .speed import TITLES

_TITLE = "CPU of one request, µs (gradient boosting, one row; each line is ten times the last)"
_LEFT, _WIDTH, _STEP, _TOP = 330, 400, 26, 34


def picture(figures: Figures) -> str:
    """Bars of CPU per request, on a scale of powers of ten."""
    found = [(of.median, who) for who in figures.servers() if (of := figures.burst(who, "cpu")) is not None]
    found.sort()
    highest = math.ceil(math.log10(max((cpu for cpu, _ in found), default=10)))
    height = _TOP + _STEP * len(found) + 10
    box = f'viewBox="0 0 {_LEFT + _WIDTH + 80} {height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="sans-serif" font-size="13" fill="#888">',
        f'<text x="10" y="16">{_TITLE}</text>',
    ]
    for power in range(highest + 1):
        x = _LEFT + _WIDTH * power / highest
        lines.append(f'<line x1="{x:.0f}" x2="{x:.0f}" y1="{_TOP - 8}" y2="{height - 8}" stroke="#8884"/>')
    for number, (cpu, who) in enumerate(found):
        y = _TOP + _STEP * number
        width = _WIDTH * max(0.0, math.log10(max(1.0, cpu))) / highest
        colour = "#2a9d8f" if who.startswith("ours") else "#bbb" if who == "echo" else "#e08e45"
        lines += [
            f'<text x="{_LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(TITLES[who])}</text>',
            f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="17" fill="{colour}"/>',
            f'<text x="{_LEFT + width + 6:.1f}" y="{y + 13}">{cpu:,.0f}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])
