"""Bench serving: parts as serving.json keeps them, so that a later run need not measure them all again. Pure.

Rules: a part is kept whole, with when and of what revision it was measured; of bursts only the figures the page is made
of, to six digits. A part is taken back only on the machine it was measured on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

#: Of each list of bursts what is kept of one; the rest of a part is kept as it is.
_BURSTS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "speed": {"bursts": ("cpu", "p50", "p90", "p99", "rate"), "paced": ("cpu",)},
    "watched": {"watched": ("cpu", "beside"), "many": ("p50", "cpu")},
}
_KEYS: Final = ("who", "how", "model", "c")
_ABOUT: Final = ("at", "seconds", "load", "revision")


def about(part: Mapping[str, Any]) -> dict[str, Any]:
    """When a part was measured, and of what."""
    return {name: part.get(name) for name in _ABOUT}


def kept(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """What a part found, its bursts packed: a line of numbers for each figure."""
    packed = _BURSTS.get(name, {})
    return {key: _packed(value, packed[key]) if key in packed else value for key, value in found.items()}


def parts_of(told: Mapping[str, Any], machine: str) -> dict[str, dict[str, Any]]:
    """The parts that a serving.json holds; none of another machine, or of a quick run."""
    if told.get("machine") != machine or told.get("quick"):
        return {}
    found = {}
    for name, when in told["measured"].items():
        if told.get(name) is not None:
            packed = _BURSTS.get(name, {})
            whole = {key: _unpacked(value) if key in packed else value for key, value in told[name].items()}
            found[name] = {**when, "found": whole}
    return found


def _packed(seen: Sequence[Mapping[str, Any]], figures: Sequence[str]) -> list[dict[str, Any]]:
    lines: dict[tuple[tuple[str, Any], ...], dict[str, list[str]]] = {}
    for one in seen:
        key = tuple((name, one[name]) for name in _KEYS if name in one)
        line = lines.setdefault(key, {figure: [] for figure in figures if figure in one})
        for figure in line:
            line[figure].append(f"{one[figure]:.6g}")
    return [{**dict(key), **{name: " ".join(of) for name, of in line.items()}} for key, line in lines.items()]


def _unpacked(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    seen = []
    for line in lines:
        key = {name: line[name] for name in _KEYS if name in line}
        figures = {name: map(float, text.split()) for name, text in line.items() if name not in key}
        seen += [{**key, **dict(zip(figures, of, strict=True))} for of in zip(*figures.values(), strict=True)]
    return seen
