"""Bench drift: what the figures are held to. Pure.

Rules: each bar is computed from what was measured, and nothing else; one whose part was not measured is not held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from .figures import Figures
from .streams import INDEPENDENT, NATURES

#: The ladder's part of a budget of one.
_LADDER: Final = 0.7
#: And that of labels.
_LABELS: Final = 0.1


@dataclass(frozen=True)
class Bar:
    """A figure, and the limit on the one side or the other; NaN where nothing was measured, inf for never."""

    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the figure is on the right side."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def shown(self) -> str:
        """The figure in words."""
        if math.isnan(self.value):
            return "not measured"
        return "never" if math.isinf(self.value) else f"{self.value:,.2f}"

    @property
    def shown_limit(self) -> str:
        """The limit in words."""
        return f"{'≥ ' if self.at_least else ''}{self.limit:,.4g}"

    def plain(self) -> dict[str, Any]:
        """For JSON; what never happened, or was not measured, is null."""
        value = round(self.value, 4) if math.isfinite(self.value) else None
        return {"name": self.name, "value": value, "limit": self.limit, "at_least": self.at_least, "holds": self.holds}


#: Shift, floor, hours.
_DELAYS: Final = (
    ("mean +0.5 sd", 0.005, 3.0),
    ("mean +0.25 sd", 0.005, 10.0),
    ("mean +0.25 sd", 0.02, 30.0),
    ("mean +1 sd", 0.005, 2.0),
    ("spread × 1.25", 0.005, 10.0),
    ("category, total variation 0.05", 0.005, 15.0),
    ("missing 1% to 5%", 0.005, 5.0),
    ("mean to +1 sd over 500 windows", 0.005, 140.0),
)


def bars(parts: dict[str, Any]) -> list[Bar]:
    """All of them, in the order of the page."""
    figures = Figures(parts)
    return [
        *_false_alarms(figures), *_first_weeks(figures), *_delays(figures), *_joint(figures), *_fleets(figures),
        *_common(figures),
        *_labels(figures),
        *_others(figures), *_real(figures), *_cost(figures),
    ]  # fmt: skip


def _false_alarms(f: Figures) -> Iterator[Bar]:
    yield Bar("device-years simulated of every nature of rows", _number(f.years()), 40, at_least=True)
    free = f.quiet(INDEPENDENT, 0.0)
    # So many false alarms are seen by chance in 99 of 100 such runs, where the budget is kept.
    limit = _chance(_LADDER * free["years"]) / free["years"] if free else _LADDER
    name = "false alarms per device-year, independent rows, no floor, the ladder alone"
    yield Bar(name, _get(free, "warnings"), limit)
    for nature in (INDEPENDENT, *NATURES):
        q = f.quiet(nature, 0.02)
        yield Bar(f"false alarms per device-year of the whole rule, {nature}", _get(q, "criticals"), 1)
        if nature in ("AR(1) 0.9", "daily cycle 0.3 sd"):
            yield Bar(f"false alarms per device-year, warnings, {nature}", _get(q, "warnings"), 15)
            yield Bar(f"false alarms per device-year of record, {nature}", _get(q, "records"), 3)


def _delays(f: Figures) -> Iterator[Bar]:
    for shift, floor, limit in _DELAYS:
        found = f.delay(shift, floor)
        yield Bar(f"delay in hours, {shift}, floor {floor:g}", _get(found, "warning"), limit)


def _joint(f: Figures) -> Iterator[Bar]:
    swapped, nothing = f.joint("two columns swapped", 1_000), f.joint("nothing", 1_000)
    yield Bar("joint drift: share of swapped columns seen in 1,000 rows", _get(swapped, "pairs"), 0.99, at_least=True)
    yield Bar("joint drift: share of windows of 1,000 rows in which nothing is seen", _get(nothing, "pairs"), 0)


def _fleets(f: Figures) -> Iterator[Bar]:
    paired, few = f.fleet("paired Hotelling", 0.3), f.fleet("count of small p", 0.3)
    yield Bar("fleet: false alarms per month, offsets of 0.3 sd, paired", _get(paired, "false_alarms"), 3.2)
    yield Bar("fleet: false alarms per month, offsets of 0.3 sd, count", _get(few, "false_alarms"), 1)
    all_, five = (None if x is None else x["delays"] for x in (paired, few))
    yield Bar("fleet: delay in hours, 0.05 sd on all of 100 devices", _get(all_, "0.05 sd on all"), 1)
    yield Bar("fleet: delay in hours, 1 sd on 5 of 100 devices", _get(five, "1 sd on 5"), 24)


def _common(f: Figures) -> Iterator[Bar]:
    told = f.part("common_shift")
    worst = math.nan if told is None else max(q["alarms"] for q in told["quiet"])
    soon = None if told is None else told["default"]
    yield Bar("fleet: false alarms of all devices together per fleet-year, the worst nature", worst, 1)
    yield Bar("fleet: delay of that alarm in looks, 0.1 sd on all of 100 devices", _get(soon, "0.1 sd"), 24)


def _labels(f: Figures) -> Iterator[Bar]:
    told = f.part("labels")
    fifth = None if told is None else next(d for d in told["delays"] if d["rate"] == 0.2)
    yield Bar("labels until errors of 0.10 to 0.20 are critical: delay", _get(fifth, "labels"), 1_000)
    yield Bar("false alarms per device-year of labelled errors", _get(told, "false_alarms"), 1)
    told = told if told and "residuals" in told else None
    moved = {} if told is None else {r["change"]: r for r in told["residuals"]}
    for change in ("bias +0.5 sd", "spread × 1.5"):
        yield Bar(f"labels until residuals of {change} are critical: delay", _get(moved.get(change), "labels"), 600)
    quiet = {} if told is None else {r["nature"]: r for r in told["residuals_quiet"]}
    for nature in (INDEPENDENT, "AR(1) 0.9"):
        found = quiet.get(nature)
        # Of a tenth of the budget, as many as chance shows in 99 of 100 such runs.
        limit = _chance(_LABELS * found["years"]) / found["years"] if found else _LABELS
        yield Bar(f"false alarms per device-year of errors and residuals, {nature}", _get(found, "false_alarms"), limit)


def _others(f: Figures) -> Iterator[Bar]:
    measured = [told for told in f.tools().values() if "install_mb" in told]
    yield Bar(
        "other tools, as packages, shown the same rows",
        float(len(measured)) if f.tools() else math.nan,
        6,
        at_least=True,
    )
    ours = f.tools().get("Lightship", {}).get("alarms", {}).get(INDEPENDENT)
    yield Bar("hours with a false alarm on the rows that all tools see, independent", _get(ours, "alarming_hours"), 0)


def _real(f: Figures) -> Iterator[Bar]:
    found = f.part("real")
    sets = found["datasets"] if found else []
    yield Bar("real datasets", float(len(sets)) if found else math.nan, 4, at_least=True)
    for fault, limit, words in (
        ("nothing", 0.0, "false alarms: share of windows in which nothing happened that alarm, the worst real dataset"),
        ("unit error × 1000", 0.99, "real datasets: share of unit errors seen in the first window, the worst"),
        ("stuck sensor", 0.99, "real datasets: share of stuck sensors seen in the first window, the worst"),
        ("two columns swapped", 0.99, "real datasets: share of swapped columns seen in the first window, the worst"),
        (
            "+1 sd, and one value of 1e6",
            0.99,
            "real datasets: share of shifts by 1 sd seen beside an outlier, the worst",
        ),
    ):
        seen = [_get(f.fault(d["name"], fault), "seen") for d in sets]
        worst = (max if fault == "nothing" else min)(seen, default=math.nan)
        yield Bar(words, worst, limit, at_least=fault != "nothing")


def _first_weeks(f: Figures) -> Iterator[Bar]:
    for words, course, warm_up in (
        ("a daily cycle of 1 sd", "daily cycle 1 sd", 48),
        ("weekends 1 sd lower, drift_warm_up = 336", "weekends 1 sd lower", 336),
    ):
        told = f.weeks(course, warm_up)
        yield Bar(
            f"false alarms per device, critical, in its first three weeks, {words}",
            math.nan if told is None else float(told["criticals"][0]),
            0.1,
        )


def _cost(f: Figures) -> Iterator[Bar]:
    told = f.part("cost")
    payload = None if told is None else told["payload"]
    for rows in ("200", "20000"):
        yield Bar(f"payload in bytes, a window of {int(rows):,} rows of 30 features", _get(payload, rows), 1_536)
    yield Bar("cost: ms of CPU per 1,000 rows of 30 features, on the device", _get(told, "ms_per_1000_rows"), 1.2)
    yield Bar("cost: µs per row on the hot path", _get(told, "us_per_row_hot_path"), 2)
    yield Bar("cost: state in bytes on the device, 30 features", _get(told, "device_state_bytes"), 12_288)
    own = "cost: MB of memory of its own that counting adds to an agent that has numpy"
    yield Bar(own, _get(told, "counting_adds_own_mb"), 1)
    yield Bar("cost: state in bytes remembered per device of 30 features", _get(told, "memory_bytes"), 12_288)
    yield Bar("cost: ms to merge the windows of 1,000 devices", _get(told, "ms_to_merge_1000"), 5)


def _get(found: dict[str, Any] | None, name: str) -> float:
    """NaN where nothing was measured; where it was, and nothing came, infinite."""
    if found is None:
        return math.nan
    value = found[name]
    return math.inf if value is None else float(value)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _chance(mean: float) -> int:
    """The count that a Poisson of this mean exceeds in less than 1 %."""
    k, term = 0, math.exp(-mean)
    total = term
    while total < 0.99:
        k += 1
        term *= mean / k
        total += term
    return k
