"""Bench drift: the figures as a page, and what they are held to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from .measures import Delay, Quiet, Size

COMMAND: Final = "make bench-drift"


@dataclass(frozen=True)
class Bar:
    """A figure, and the limit that it must not exceed (`least`: not fall below)."""

    name: str
    value: float
    limit: float
    least: bool = False

    @property
    def holds(self) -> bool:
        """Whether it does."""
        return self.value >= self.limit if self.least else self.value <= self.limit

    def plain(self) -> dict[str, Any]:
        """For JSON; what never happened is null."""
        value = round(self.value, 4) if math.isfinite(self.value) else None
        return {"name": self.name, "value": value, "limit": self.limit, "least": self.least, "holds": self.holds}


@dataclass(frozen=True)
class Figures:
    """Everything that was measured."""

    size: Size
    quiet: list[Quiet]
    delays: list[Delay]
    joint: dict[str, float]
    fleets: dict[str, float]
    concept: dict[str, float]
    cost: dict[str, float]
    machine: str

    def bars(self) -> list[Bar]:
        """What the figures are held to."""
        quiet = {(q.nature, q.floor): q for q in self.quiet}
        free = quiet["independent", 0.0]
        bars = [
            # The upper 99 % of a Poisson count at a ladder's share of the budget.
            Bar("false alarms per device-year, independent rows, no floor", free.warnings, _poisson99(0.7, free.years)),
            Bar("false alarms per device-year of the joint rule, independent rows", free.criticals, 1.0),
        ]
        for nature in ("AR(1) 0.9", "daily cycle 0.3 sd"):
            q = quiet[nature, 0.02]
            bars.append(Bar(f"false alarms per device-year, {nature}, calibrated", q.warnings, 15))
            bars.append(Bar(f"false alarms per device-year of record, {nature}", q.records, 3))
            bars.append(Bar(f"false alarms per device-year of the joint rule, {nature}", q.criticals, 1))
        for shift, floor, limit in _DELAY_BARS:
            found = next(d for d in self.delays if d.shift == shift and d.floor == floor)
            value = found.warning if found.warning is not None else math.inf
            bars.append(Bar(f"delay in hours, {shift}, floor {floor:g}", value, limit))
        return [
            *bars,
            Bar("share of swapped columns seen in 1,000 rows", self.joint["two columns swapped"], 0.99, least=True),
            Bar("fleet: false alarms per month, offsets of 0.3 sd", self.fleets["false alarms per fleet-month"], 3.2),
            Bar("fleet: delay in hours, 0.05 sd on all of 100 devices", self.fleets["0.05 sd on all"], 1),
            Bar("fleet: delay in hours, 1 sd on 5 of 100 devices", self.fleets["1 sd on 5 of 100"], 24),
            Bar("labels until errors of 0.10 to 0.20 are critical: delay", self.concept["0.10 to 0.20"], 1_000),
            Bar("false alarms per device-year of labelled errors", self.concept["false alarms per device-year"], 1),
            Bar(
                "state in bytes, remembered per device of 30 features", self.cost["bytes remembered per device"], 12_288
            ),
        ]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "command": COMMAND,
            "machine": self.machine,
            "device_years": self.size.years,
            "dependent_device_years": self.size.dependent_years,
            "runs": self.size.runs,
            "false_alarms": msgspec.to_builtins(self.quiet),
            "delays": msgspec.to_builtins(self.delays),
            "joint": self.joint,
            "fleets": self.fleets,
            "concept": self.concept,
            "cost": {k: round(v, 2) for k, v in self.cost.items()},
            "bars": [bar.plain() for bar in self.bars()],
        }


_DELAY_BARS: Final = (
    ("mean +0.5 sd", 0.005, 3.0),
    ("mean +0.25 sd", 0.005, 10.0),
    ("mean +0.25 sd", 0.02, 30.0),
    ("mean +1 sd", 0.005, 2.0),
    ("spread × 1.25", 0.005, 10.0),
    ("category, total variation 0.05", 0.005, 15.0),
    ("missing 1% to 5%", 0.005, 5.0),
    ("mean to +1 sd over 500 windows", 0.005, 140.0),
)


def _poisson99(rate: float, years: int) -> float:
    """The count that a Poisson of `rate`·`years` exceeds in less than 1 %, per year."""
    mean, k, total = rate * years, 0, math.exp(-rate * years)
    term = total
    while total < 0.99:
        k += 1
        term *= mean / k
        total += term
    return k / years


def page(figures: Figures) -> str:
    """docs/benchmarks/drift.md."""
    size = figures.size
    delays = [
        (d.shift, f"{d.floor:g}", f"{d.effect:.3f}", _hours(d.warning, d.warning_90), _hours(d.critical, d.critical_90))
        for d in figures.delays
    ]
    further = (figures.joint, figures.fleets, figures.concept, figures.cost)
    head = _HEAD.format(
        command=COMMAND, machine=figures.machine, years=size.years, some=size.dependent_years, runs=size.runs
    )
    parts = [
        head,
        _table(("Figure", "Found", "Limit", ""), [_bar(b) for b in figures.bars()]),
        _QUIET,
        _table(_QUIET_HEAD, [_quiet(q) for q in figures.quiet]),
        _DELAYS,
        _table(("One feature of 30", "Floor", "w²", "Warning, h", "Critical, h"), delays),
        _REST,
        _table(("What", "Found"), [(k, f"{v:g}") for part in further for k, v in part.items()]),
        _LIMITS,
    ]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


_QUIET_HEAD: Final = ("Rows", "Floor", "Device-years", "Bare, single windows", "Warnings", "Record", "Critical")


def _quiet(q: Quiet) -> tuple[str, ...]:
    alarms = (f"{v:,.2f}" for v in (q.warnings, q.records, q.criticals))
    return q.nature, f"{q.floor:g}", str(q.years), f"{q.bare:,.1f}", *alarms


def _hours(median: float | None, late: float | None) -> str:
    if median is None:
        return "–"
    return f"{median:g} [{'–' if late is None else f'{late:g}'}]"


def _bar(bar: Bar) -> tuple[str, ...]:
    found = f"{bar.value:,.2f}" if math.isfinite(bar.value) else "never"
    return bar.name, found, f"{'≥ ' if bar.least else ''}{bar.limit:,.3g}", "holds" if bar.holds else "**missed**"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" if n == 0 else "---:" for n in range(len(head))), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


_HEAD: Final = """
# Drift alarms: how often false, how soon true

Written by `{command}` on {machine}. A window is an hour of 200 rows, the reference 10,000 rows, a device has 30
features, the budget is one false alarm per device-year. {years} device-years of independent rows, {some} of each
dependent nature, {runs} devices per shift. The product's own code decides, on drawn counts; seeds are fixed.
"""
_QUIET: Final = """
## False alarms

Nothing happens in these streams. Per device-year: tests of single windows beyond the uncalibrated line; warnings of the
calibrated ladder; alarms of record; and critical ones, for which ladder, record and floor must agree.
"""
_DELAYS: Final = """
## Delays

Hours until a warning, and until critical: median [90 %], after two weeks of healthy windows. A dash: not within 200
hours (512 for missing rates); at or below the floor that is by design. Shifts of a few times the floor take the longest
blocks, and there the device's own history costs the most: two weeks hold ten blocks of 32 hours, and the tail pays for
knowing their mean from ten. The bare ladder sees 0.25 sd at a floor of 0.02 in about half of the time, and keeps its
budget only where rows are independent.
"""
_REST: Final = """
## Joint drift, fleets, labels, cost

Shares of 1,000-row windows in which a change is seen that no histogram shows; fleets of 100 devices with offsets of
their own, by paired Hotelling T² (common shift) and by the count of drifting devices (few), in hours; labels until
errors are critical.
"""
_LIMITS: Final = """
## What this does not show

Normal features and simulated natures only; no peer tools, no real datasets. The paired fleet test is measured here and
not yet an alarm of the product: a season moves all devices together, so it needs the same hour of the week, or a
control group.
"""
