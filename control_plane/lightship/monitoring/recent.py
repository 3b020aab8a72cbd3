"""Monitoring: a device's recent past in columns of equal time, from its reports.

Rules:
* pure: reports go in, the bounds and the number of columns too;
* what a device counts is counted since a beginning: a column has what was counted in it, and where counting began anew,
  all of it is new;
* latencies of a column are added up cell by cell, over all models, and the quantiles are those of the sum;
* a column in which nothing was reported has None, which is not zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from lightship_agent.contract.codes import WireError
from lightship_agent.contract.latency import grown, merged, quantile
from lightship_agent.contract.messages import AnyRecord, Application, Heartbeat, Running
from lightship_agent.contract.wire import decode

from .history import Report

COLUMNS: Final = 48
#: Of `health`, by the name of the row.
_HEALTH: Final = {
    "temperature_c": "temperature_c",
    "memory_mb": "memory_self_mb",
    "cpu_percent": "cpu_percent",
    "outbox": "outbox_records",
    "rtt_ms": "link_rtt_ms",
}
_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_NOTHING: Final = Running(model="", version=0, digest="0" * 64, since=0)
Column = float | None


class Recent(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of columns, the oldest first; `seconds` is the width of a column."""

    since: int  # wall ms
    until: int
    seconds: float
    reports: int
    rows: dict[str, tuple[Column, ...]]


class _Columns:
    """What is known of each column."""

    def __init__(self, since: int, until: int, count: int) -> None:
        self._since, self._width, self._count = since, max(1.0, (until - since) / count), count
        self.latencies: list[list[Sequence[int]]] = [[] for _ in range(count)]
        self.requests: list[Column] = [None] * count
        self.errors: list[Column] = [None] * count
        self.plain: dict[str, list[list[float]]] = {}
        self._known: dict[tuple[str, int], Running] = {}
        self._errors: dict[str, int] | None = None  # as the report before said them

    def of(self, at: int) -> int:
        return min(self._count - 1, max(0, int((at - self._since) / self._width)))

    def beat(self, column: int, beat: Heartbeat) -> None:
        for running in beat.running:
            before = self._known.get((running.digest, running.since), _NOTHING)
            if before is not _NOTHING or self._errors is not None:  # the very first report is of another time
                self._served(column, before, running)
            self._known[running.digest, running.since] = running
        if self._errors is not None:
            self.errors[column] = (self.errors[column] or 0) + _new(self._errors, beat.errors)
        self._errors = beat.errors
        for name, source in _HEALTH.items():
            if source in beat.health:
                self.note(name, column, beat.health[source])

    def _served(self, column: int, before: Running, after: Running) -> None:
        new = grown(before.latencies, after.latencies)
        rows = after.requests - before.requests if after.requests >= before.requests else after.requests
        self.latencies[column].append(new)
        self.requests[column] = (self.requests[column] or 0) + (sum(new) if after.latencies else rows)

    def note(self, name: str, column: int, value: float) -> None:
        if math.isfinite(value):
            self.plain.setdefault(name, [[] for _ in range(self._count)])[column].append(value)


def recent(
    reports: Iterable[Report],
    since: int,
    until: int,
    *,
    columns: int = COLUMNS,
    drift: Iterable[tuple[int, float | None]] = (),
) -> Recent:
    """The columns.

    Args:
        reports: of one device, by time.
        since: wall ms at which the first column begins.
        until: wall ms at which the last one ends.
        columns: how many.
        drift: the distance of each window, and when it was closed.
    """
    found = _Columns(since, until, columns)
    count = 0
    for report in reports:
        count += 1
        column, record = found.of(report.ts), _record(report)
        if isinstance(record, Heartbeat):
            found.beat(column, record)
        elif isinstance(record, Application):
            for name, value in {**record.numbers.counters, **record.numbers.gauges}.items():
                found.note(f"app.{name}", column, value)
    for at, distance in drift:
        if distance is not None and since <= at < until:
            found.note("drift", found.of(at), distance)
    return Recent(since=since, until=until, seconds=(until - since) / columns / 1_000, reports=count, rows=_rows(found))


def sparkline(values: Sequence[Column]) -> str:
    """One character a column, from the least to the greatest; a blank where nothing is known."""
    known = [v for v in values if v is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    step = (high - low) / (len(_BLOCKS) - 1)
    return "".join(" " if v is None else _BLOCKS[round((v - low) / step) if step else 0] for v in values)


def _new(before: dict[str, int], after: dict[str, int]) -> int:
    began_anew = any(after.get(code, 0) < n for code, n in before.items())
    return sum(n if began_anew else n - before.get(code, 0) for code, n in after.items())


def _rows(found: _Columns) -> dict[str, tuple[Column, ...]]:
    sums = [merged(one) for one in found.latencies]
    rows: dict[str, tuple[Column, ...]] = {
        "requests": tuple(found.requests),
        "errors": tuple(found.errors),
        "latency_p50_ms": tuple(_ms(quantile(one, 0.5)) for one in sums),
        "latency_p99_ms": tuple(_ms(quantile(one, 0.99)) for one in sums),
    }
    for name, columns in sorted(found.plain.items()):
        rows[name] = tuple(sum(values) / len(values) if values else None for values in columns)
    return rows


def _ms(seconds: float | None) -> Column:
    return None if seconds is None else seconds * 1_000


def _record(report: Report) -> AnyRecord | None:
    try:
        record: AnyRecord = decode(report.body, AnyRecord)  # type: ignore[arg-type]
    except WireError:  # of a later version
        return None
    return record
