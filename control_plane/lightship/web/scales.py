"""Web: where things lie on an axis, and what is written beside it.

Rules of this file:
* pure; times are milliseconds since the Unix epoch and are shown in UTC;
* a time that no calendar holds is shown as its number: a broken clock on a device must not break a page;
* positions are shares of the axis, 0 to 1; the plots turn them into per cent, so that they stretch with the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Final

SECOND: Final = 1_000
MINUTE: Final = 60 * SECOND
HOUR: Final = 60 * MINUTE
DAY: Final = 24 * HOUR
_STEPS: Final = (
    *(n * SECOND for n in (1, 2, 5, 10, 15, 30)),
    *(n * MINUTE for n in (1, 2, 5, 10, 15, 30)),
    *(n * HOUR for n in (1, 2, 3, 6, 12)),
    *(n * DAY for n in (1, 2, 7, 14, 30, 90, 365)),
)
_TIME_TICKS: Final = 8
_VALUE_TICKS: Final = 5
#: Neighbours on an axis keep this share of it between them.
_APART: Final = 0.13
#: Beyond, differences of values overflow.
_HUGE: Final = 1e300


@dataclass(frozen=True)
class Tick:
    """A mark on an axis, at a share of its length."""

    at: float
    text: str


@dataclass(frozen=True)
class TimeScale:
    """A span of time, in milliseconds; never empty."""

    begin: int
    end: int

    @classmethod
    def over(cls, times: Iterable[int]) -> TimeScale:
        """The span that holds all `times`; a minute around a single one."""
        known = sorted(times)
        if not known:
            return cls(0, MINUTE)
        begin, end = known[0], known[-1]
        return cls(begin, end) if end > begin else cls(begin - MINUTE // 2, end + MINUTE // 2)

    def share(self, at: int) -> float:
        """Where `at` lies, clamped to the axis."""
        return min(1.0, max(0.0, (at - self.begin) / (self.end - self.begin)))

    def ticks(self) -> list[Tick]:
        """At most `_TIME_TICKS` marks at round times."""
        span = self.end - self.begin
        step = next((s for s in _STEPS if span <= s * _TIME_TICKS), -(-span // _TIME_TICKS))
        first = -(-self.begin // step) * step
        style = _tick_style(step, span)
        return [Tick(self.share(at), moment(at, style)) for at in range(first, self.end + 1, step)]


@dataclass(frozen=True)
class ValueScale:
    """A range of values; `root` stretches small ones, as is natural for squared effects such as PSI."""

    low: float
    high: float
    root: bool = False

    @classmethod
    def over(cls, values: Iterable[float], *, floor: float | None = None, root: bool = False) -> ValueScale:
        """A range with round ends that holds all finite `values`; at least `floor` to something above it."""
        known = [min(_HUGE, max(-_HUGE, v)) for v in values if math.isfinite(v)]
        low = min(known, default=0.0) if floor is None else floor
        high = max(known, default=1.0)
        if not high > low:
            high = low + (abs(low) or 1.0)
        step = _round_step((high - low) / _VALUE_TICKS)
        return cls(math.floor(low / step) * step, math.ceil(high / step) * step, root)

    def share(self, value: float) -> float:
        """Where `value` lies, clamped to the axis."""
        span = self.high - self.low
        if not span > 0:
            return 0.5
        share = min(1.0, max(0.0, (value - self.low) / span))
        return math.sqrt(share) if self.root else share

    def ticks(self, percent: bool = False) -> list[Tick]:
        """A handful of round values that are far enough apart."""
        step = _round_step((self.high - self.low) / _VALUE_TICKS)
        values = [v for i in range(-1, 2 * _VALUE_TICKS + 2) if self.low <= (v := self._multiple(i, step)) <= self.high]
        if self.root:
            small = [self.low + m * 10**e for e in range(-2, 3) for m in (1, 2, 5)]
            values = sorted({*values[:1], *(v for v in small if v <= self.high), self.high})
        kept: list[float] = []
        for v in reversed(values):
            if not kept or self.share(kept[-1]) - self.share(v) >= _APART:
                kept.append(v)
        return [Tick(self.share(v), number(v, step, percent=percent)) for v in reversed(kept)]

    def _multiple(self, i: int, step: float) -> float:
        # Adding steps up would gather rounding errors that show as 0.30000000000000004.
        return (math.ceil(self.low / step) + i) * step


def moment(at: int, style: str = "%Y-%m-%d %H:%M:%S") -> str:
    """A time in UTC, or its bare number where no calendar holds it."""
    try:
        return datetime.fromtimestamp(at / 1_000, UTC).strftime(style)
    except (OverflowError, ValueError, OSError):
        return f"{at} ms"


def number(value: float, step: float = 0.0, *, percent: bool = False) -> str:
    """A value with as many digits as `step` needs to be told apart."""
    if percent:
        value, step = value * 100, step * 100
    if value and not 1e-4 <= abs(value) < 1e6:
        text = f"{value:.2g}"
    elif step:
        text = f"{value:.{max(0, min(6, -math.floor(math.log10(step) + 1e-9)))}f}"
        if not percent and value and abs(value) < step:
            text = f"{value:.2g}"
    else:
        text = f"{value:.4g}"
    return f"{text} %" if percent else text


def duration(seconds: float) -> str:
    """A length of time in the two largest units that matter."""
    if not math.isfinite(seconds) or seconds < 0:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    whole = int(seconds)
    for (big, size), (small, part) in pairwise(units):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {big} {rest} {small}" if rest else f"{whole // size} {big}"
    return f"{whole} s"


def _tick_style(step: int, span: int) -> str:
    if step >= 365 * DAY:
        return "%Y"
    if step >= DAY:
        return "%d %b"
    if span > DAY:
        return "%d %b %H:%M"
    return "%H:%M" if step >= MINUTE else "%H:%M:%S"


def _round_step(raw: float) -> float:
    """The smallest 1, 2 or 5 times a power of ten that is at least `raw`."""
    if not raw > 1e-300 or not math.isfinite(raw):
        return 1.0 if not raw > 0 else raw
    power = 10.0 ** math.floor(math.log10(raw))
    return next((m * power for m in (1, 2, 5) if raw <= m * power * (1 + 1e-9)), 10 * power)
