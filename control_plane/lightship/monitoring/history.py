"""Monitoring: the history of reports, as they came, outside the fleet's database.

What ingest makes of a report is in the fleet's database, and small. What it said is here, for as long as it is worth
its room: to look at a device's past, to roll it up by hour and by day, and to hand it to other tools.

Rules:
* a row is known by (device, time, epoch, seq), so that what comes again is recognised within its own day;
* it is written before the fleet's database says that the report is stored: after a crash in between it comes again;
* a clock that is in the future, or further back than an outbox reaches, is not believed: the row is kept at the time
  at which the server heard it, and marked;
* days are dropped, not deleted row by row, where the engine can.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Final, NamedTuple, Protocol, get_args
from urllib.parse import urlsplit

from lightship.storage.database import Database
from lightship_agent.contract.codes import SettingsError, WireError
from lightship_agent.contract.messages import AnyRecord, Application, Envelope, Heartbeat, Window
from lightship_agent.contract.wire import decode, encode

from . import direct
from .ingest import FUTURE_MS, Understood

HOUR_MS: Final = 3_600_000
DAY_MS: Final = 24 * HOUR_MS
#: A clock that says that a report waited for longer was not set: an outbox holds a hundred days at most.
OLDEST_MS: Final = 120 * DAY_MS
#: So long after its end an hour is rolled up; what comes later has it rolled up again.
GRACE_MS: Final = 5 * 60_000
#: How many, their sum, the least, the greatest.
Numbers = tuple[int, float, float, float]
_KINDS: Final = {kind: str(kind.__struct_config__.tag) for kind in get_args(AnyRecord)}


class Report(NamedTuple):
    """A row of the history."""

    device: str
    ts: int  # wall ms
    epoch: str
    seq: int
    recv: int  # wall ms of the server
    kind: str  # heartbeat, window …
    approx: bool  # the device's clock could not be believed
    body: bytes  # the record, MessagePack


class Rollup(NamedTuple):
    """What a device reported in an hour or a day: of each number, how many, their sum, the least and the greatest."""

    device: str
    begins: int  # wall ms
    numbers: dict[str, Numbers]


class Keep(NamedTuple):
    """How long things are kept, in milliseconds, and how large the reports may get."""

    raw: int
    hourly: int
    daily: int
    raw_bytes: int


class History(Protocol):
    """Where reports are kept. Every method raises StorageError: storage.full, storage.unwritable, storage.busy."""

    def write(self, reports: Sequence[Report]) -> int:
        """Keep them, each once; how many were new. On an error nothing was written."""

    def read(self, since: int, until: int, device: str = "") -> Iterator[Report]:
        """What was reported from `since` to before `until`, by device and time."""

    def end(self) -> int:
        """A mark behind what has come so far."""

    def arrivals(self, mark: int, devices: Sequence[str], limit: int = 1_000) -> tuple[int, list[Report]]:
        """What of these devices came behind a mark, in the order of arrival, and the mark behind that.

        The last few seconds may come a second time.
        """

    def due(self, before: int) -> list[int]:
        """Hours that ended before then, in which something came that is not rolled up."""

    def roll(self, hour: int, hourly: Sequence[Rollup], daily: Sequence[Rollup]) -> None:
        """Keep the rollups of an hour, and of its day; the hour is no longer due."""

    def rollups(self, table: str, since: int, until: int) -> Iterator[Rollup]:
        """Rollups of "hourly" or "daily", by device and time."""

    def prune(self, now: int, keep: Keep) -> None:
        """Drop what is too old; make room for the days to come."""

    def close(self) -> None:
        """Close it."""


def open_history(home: Path, url: str) -> History:
    """The history beside the fleet's database, or on a PostgreSQL server.

    Raises:
        SettingsError: settings.invalid for an address of another kind.
        StorageError: storage.unwritable where it can't be opened.
    """
    if url.startswith(("postgresql://", "postgres://")):
        if urlsplit(url).password:
            remedy = "Leave it out, and put it into a password file (PGPASSFILE)."
            raise SettingsError("settings.invalid", "history: no setting may hold a password.", remedy=remedy)
        from lightship.integrations.postgres import PostgresHistory

        return PostgresHistory(url)
    if url:
        raise SettingsError("settings.invalid", f"history: expected postgresql://…, found {url.partition(':')[0]!r}.")
    from .sqlite_history import SqliteHistory

    return SqliteHistory(home / "telemetry.db")


def roll_up(history: History, now: int) -> int:
    """Bring the rollups up to date; how many hours were rolled up."""
    due = history.due(now - GRACE_MS)
    for hour in due:
        hourly = [Rollup(device, hour, numbers) for device, numbers in _by_device(history, hour)]
        day = hour - hour % DAY_MS
        others = (r for r in history.rollups("hourly", day, day + DAY_MS) if r.begins != hour)
        merged: dict[str, dict[str, Numbers]] = {}
        for rollup in (*others, *hourly):
            mine = merged.setdefault(rollup.device, {})
            for name, numbers in rollup.numbers.items():
                mine[name] = merge(mine[name], numbers) if name in mine else numbers
        history.roll(hour, hourly, [Rollup(device, day, numbers) for device, numbers in sorted(merged.items())])
    return len(due)


def merge(a: Numbers, b: Numbers) -> Numbers:
    """What two spans of time amount to together."""
    return (a[0] + b[0], a[1] + b[1], min(a[2], b[2]), max(a[3], b[3]))


def numbers_of(report: Report) -> dict[str, float]:
    """The numbers in a report that are worth a rollup."""
    try:
        record: AnyRecord = decode(report.body, AnyRecord)  # type: ignore[arg-type]
    except WireError:  # of a later version
        return {}
    found: dict[str, float] = {}
    if isinstance(record, Heartbeat):
        found = {f"health.{name}": value for name, value in record.health.items()}
        for running in record.running[:1]:
            found["latency_ms"] = running.latency_ms
            found["requests"] = running.requests
            found["failures"] = running.failures
    elif isinstance(record, Window):
        found = {"window.rows": record.rows, "window.invalid": record.invalid}
    elif isinstance(record, Application):
        plain = {**record.numbers.counters, **record.numbers.gauges}
        found = {f"app.{name}": value for name, value in plain.items()}
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def _by_device(history: History, hour: int) -> Iterator[tuple[str, dict[str, Numbers]]]:
    for device, reports in groupby(history.read(hour, hour + HOUR_MS), key=lambda r: r.device):
        out: dict[str, Numbers] = {}
        for report in reports:
            for name, value in numbers_of(report).items():
                one = (1, value, value, value)
                out[name] = merge(out[name], one) if name in out else one
        if out:
            yield device, out


def reports_of(messages: Sequence[Understood], tenants: dict[str, str], now: int) -> list[Report]:
    """The rows in what was understood of devices that are known, by their tenants."""
    rows = []
    for message, said in messages:
        tenant = tenants.get(message.device)
        if tenant is None or not isinstance(said, Envelope) or (message.tenant and message.tenant != tenant):
            continue
        for record in said.r:
            approx = not now - OLDEST_MS <= record.t <= now + FUTURE_MS
            at = now if approx else record.t
            rows.append(Report(message.device, at, said.e, record.s, now, _KINDS[type(record)], approx, encode(record)))
    return rows


def remember(database: Database, history: History, messages: Sequence[Understood], now: int) -> int:
    """Keep what active devices report; how many rows were new."""
    names = {message.device for message, said in messages if isinstance(said, Envelope)}
    with database.read() as session:
        tenants = dict(tuple(row) for row in direct.of(session, direct.ACTIVE, names))
    rows = reports_of(messages, tenants, now)
    return history.write(rows) if rows else 0
