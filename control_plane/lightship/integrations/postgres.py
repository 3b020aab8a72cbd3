"""Integrations: the history of reports on PostgreSQL, for fleets that have outgrown a file.

Rules:
* one statement writes a batch: `INSERT … SELECT unnest(arrays) ON CONFLICT DO NOTHING`, as fast as COPY, and it knows
  duplicates; arrays go as PostgreSQL keeps them: as text the driver would look at every item for what needs quotes;
* a table of its own for each day, made ahead and dropped whole;
* a report of a day for which there is no table yet makes one; two workers that do so at once make one between them;
* the driver is an extra: `pip install 'lightship[postgres]'`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from lightship.monitoring.history import DAY_MS, HOUR_MS, Keep, Numbers, Report, Rollup
from lightship_agent.contract.codes import StorageError

AHEAD_DAYS: Final = 2
#: Several workers commit at once: what came so long before a mark may have appeared behind it, in milliseconds.
OVERLAP_MS: Final = 5_000
_LOCK: Final = 7_421_190_002  # an advisory lock's number, ours
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS reports (device text NOT NULL, ts bigint NOT NULL, epoch text NOT NULL, seq bigint NOT NULL,
    recv bigint NOT NULL, kind text NOT NULL, approx boolean NOT NULL, body bytea NOT NULL,
    PRIMARY KEY (device, ts, epoch, seq)) PARTITION BY RANGE (ts);
CREATE INDEX IF NOT EXISTS reports_came ON reports USING brin (recv);
CREATE TABLE IF NOT EXISTS due (hour bigint PRIMARY KEY);
CREATE TABLE IF NOT EXISTS hourly (device text NOT NULL, begins bigint NOT NULL, numbers bytea NOT NULL,
    PRIMARY KEY (device, begins));
CREATE TABLE IF NOT EXISTS daily (device text NOT NULL, begins bigint NOT NULL, numbers bytea NOT NULL,
    PRIMARY KEY (device, begins));
"""
_INSERT: Final = """
INSERT INTO reports SELECT * FROM unnest(%s::text[], %s::bigint[], %s::text[], %s::bigint[], %s::bigint[], %s::text[],
    %s::boolean[], %s::bytea[]) ON CONFLICT DO NOTHING
"""
#: Of PostgreSQL's types: their numbers, and those of arrays of them.
_TEXT, _BYTES, _INTEGER, _TRUTH = (25, 1009), (17, 1001), (20, 1016), (16, 1000)
_ROLL: Final = {
    name: f"INSERT INTO {name} VALUES (%s, %s, %s) "  # noqa: S608 - two names of ours
    "ON CONFLICT (device, begins) DO UPDATE SET numbers = excluded.numbers"
    for name in ("hourly", "daily")
}
_ROLLUPS: Final = {
    name: f"SELECT device, begins, numbers FROM {name} WHERE begins >= %s AND begins < %s "  # noqa: S608 - as above
    "ORDER BY device, begins"
    for name in ("hourly", "daily")
}


class PostgresHistory:
    """One connection, opened again when it was lost."""

    def __init__(self, url: str) -> None:
        """Connect, and make the tables that are missing.

        Raises:
            StorageError: storage.unwritable where the driver is missing or the server is not there.
        """
        try:
            import psycopg
        except ImportError as e:
            remedy = "pip install 'lightship[postgres]'"
            raise StorageError("storage.unwritable", "The PostgreSQL driver is not installed.", remedy=remedy) from e
        self._psycopg = psycopg
        self._url = url
        self._lock = threading.Lock()
        self._days: set[int] = set()
        self._connection: Any = None
        with self._transaction() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
            for statement in _SCHEMA.split(";\n"):
                if statement.strip():
                    cursor.execute(statement)

    def write(self, reports: Sequence[Report]) -> int:
        """Keep them, each once; how many were new."""
        if not reports:
            return 0
        days = {r.ts - r.ts % DAY_MS for r in reports}
        hours = sorted({r.ts - r.ts % HOUR_MS for r in reports})
        with self._transaction() as cursor:
            self._make_days(cursor, days)
            cursor.execute(_INSERT, _columns(reports))
            new = int(cursor.rowcount)
            if new:
                cursor.execute("INSERT INTO due SELECT unnest(%s::bigint[]) ON CONFLICT DO NOTHING", (hours,))
        return new

    def read(self, since: int, until: int, device: str = "") -> Iterator[Report]:
        """What was reported from `since` to before `until`, by device and time; a part at a time."""
        query = "SELECT * FROM reports WHERE ts >= %s AND ts < %s AND (%s = '' OR device = %s)"
        after: tuple[Any, ...] = ("", 0, "", 0)
        while True:
            with self._transaction() as cursor:
                cursor.execute(
                    f"{query} AND (device, ts, epoch, seq) > (%s, %s, %s, %s) "
                    "ORDER BY device, ts, epoch, seq LIMIT 10000",
                    (since, until, device, device, *after),
                )
                rows = cursor.fetchall()
            yield from (Report(*row) for row in rows)
            if len(rows) < 10_000:
                return
            after = rows[-1][:4]

    def end(self) -> int:
        """A mark behind what has come so far."""
        with self._transaction() as cursor:
            cursor.execute("SELECT max(recv) FROM reports")
            (last,) = cursor.fetchone()
        return int(last or 0)

    def arrivals(self, mark: int, devices: Sequence[str], limit: int = 1_000) -> tuple[int, list[Report]]:
        """What of these devices came behind a mark, in the order of arrival, and the mark behind that.

        The last `OVERLAP_MS` come a second time; more than `limit` where they came in the same millisecond.
        """
        query = """SELECT * FROM reports WHERE recv > %s AND device = ANY(%s)
            ORDER BY recv FETCH FIRST %s ROWS WITH TIES"""
        with self._transaction() as cursor:
            cursor.execute(query, (mark, list(devices), limit))
            found = [Report(*row) for row in cursor.fetchall()]
        if not found:
            return mark, []
        last = found[-1].recv
        return (last if len(found) >= limit else max(mark, last - OVERLAP_MS)), found

    def due(self, before: int) -> list[int]:
        """Hours that ended before then, in which something came that is not rolled up."""
        with self._transaction() as cursor:
            cursor.execute("SELECT hour FROM due WHERE hour + %s <= %s ORDER BY hour", (HOUR_MS, before))
            return [hour for (hour,) in cursor.fetchall()]

    def roll(self, hour: int, hourly: Sequence[Rollup], daily: Sequence[Rollup]) -> None:
        """Keep the rollups of an hour, and of its day; the hour is no longer due."""
        with self._transaction() as cursor:
            for name, rollups in (("hourly", hourly), ("daily", daily)):
                rows = [(r.device, r.begins, msgspec.msgpack.encode(r.numbers)) for r in rollups]
                if rows:
                    cursor.executemany(_ROLL[name], rows)
            cursor.execute("DELETE FROM due WHERE hour = %s", (hour,))

    def rollups(self, table: str, since: int, until: int) -> Iterator[Rollup]:
        """Rollups of "hourly" or "daily", by device and time."""
        with self._transaction() as cursor:
            cursor.execute(_ROLLUPS[table], (since, until))
            rows = cursor.fetchall()
        for device, begins, numbers in rows:
            yield Rollup(device, begins, msgspec.msgpack.decode(numbers, type=dict[str, Numbers]))

    def prune(self, now: int, keep: Keep) -> None:
        """Drop the days that are too old, and make those to come."""
        today = now - now % DAY_MS
        with self._transaction() as cursor:
            self._make_days(cursor, {today + n * DAY_MS for n in range(AHEAD_DAYS + 1)})
            cursor.execute("SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'reports'::regclass")
            for (name,) in cursor.fetchall():
                if _begins(name) + DAY_MS <= now - keep.raw:
                    cursor.execute(f"DROP TABLE {name}")
                    self._days.discard(_begins(name))
            cursor.execute("DELETE FROM due WHERE hour < %s", (now - keep.raw,))
            cursor.execute("DELETE FROM hourly WHERE begins < %s", (now - keep.hourly,))
            cursor.execute("DELETE FROM daily WHERE begins < %s", (now - keep.daily,))

    def close(self) -> None:
        """Close it."""
        if self._connection is not None:
            self._connection.close()

    def _make_days(self, cursor: Any, days: set[int]) -> None:
        missing = days - self._days
        if not missing:
            return
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        for day in sorted(missing):
            cursor.execute(
                f"CREATE TABLE IF NOT EXISTS {_name(day)} PARTITION OF reports "
                f"FOR VALUES FROM ({day}) TO ({day + DAY_MS})"
            )
        self._days |= missing

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        with self._lock:
            try:
                if self._connection is None or self._connection.closed:
                    self._days = set()
                    self._connection = self._psycopg.connect(self._url, connect_timeout=10)
                    self._connection.adapters.register_dumper(_Array, _ArrayDumper)
                with self._connection.transaction(), self._connection.cursor(binary=True) as cursor:
                    yield cursor
            except self._psycopg.Error as e:
                self._days = set()
                if self._connection is not None:
                    self._connection.close()
                code = "storage.full" if getattr(e, "sqlstate", "") == "53100" else "storage.unwritable"
                raise StorageError(code, f"The history of reports can't be used: {str(e).strip()[:300]}.") from e


class _Array(NamedTuple):
    """An array as PostgreSQL keeps it, of a type with this number."""

    oid: int
    data: bytes


class _ArrayDumper:
    """Hands an `_Array` to the driver as it is."""

    format = 1  # binary
    oid = 0  # of arrays of a type that the first of them says

    def __init__(self, _kind: type, _context: object = None) -> None:
        """As the driver makes them."""

    def get_key(self, array: _Array, _format: object) -> tuple[type, int]:
        """What tells one of these from another."""
        return _Array, array.oid

    def upgrade(self, array: _Array, _format: object) -> _ArrayDumper:
        """The one for arrays of this type."""
        made = _ArrayDumper(_Array)
        made.oid = array.oid
        return made

    def dump(self, array: _Array) -> bytes:
        """What goes to the server."""
        return array.data


def _columns(reports: Sequence[Report]) -> tuple[_Array, ...]:
    device, ts, epoch, seq, recv, kind, approx, body = zip(*reports, strict=True)
    return (
        _pieces(_TEXT, map(str.encode, device)),
        _numbers(_INTEGER, ts, ">i8"),
        _pieces(_TEXT, map(str.encode, epoch)),
        _numbers(_INTEGER, seq, ">i8"),
        _numbers(_INTEGER, recv, ">i8"),
        _pieces(_TEXT, map(str.encode, kind)),
        _numbers(_TRUTH, approx, "?"),
        _pieces(_BYTES, body),
    )


def _numbers(kind: tuple[int, int], values: Sequence[int], stored: str) -> _Array:
    items = np.empty(len(values), [("size", ">i4"), ("value", stored)])
    items["size"], items["value"] = items.dtype["value"].itemsize, values
    return _Array(kind[1], _head(kind, len(values)) + items.tobytes())


def _pieces(kind: tuple[int, int], values: Iterable[bytes]) -> _Array:
    sized = [part for value in values for part in (len(value).to_bytes(4, "big"), value)]
    return _Array(kind[1], b"".join([_head(kind, len(sized) // 2), *sized]))


def _head(kind: tuple[int, int], count: int) -> bytes:
    """One dimension, no NULL in it, of what type, how many, counted from 1."""
    return b"".join(n.to_bytes(4, "big") for n in (1, 0, kind[0], count, 1))


def _name(day: int) -> str:
    return f"reports_{datetime.fromtimestamp(day / 1_000, UTC):%Y%m%d}"


def _begins(name: str) -> int:
    at = datetime.strptime(name.rpartition("_")[2], "%Y%m%d").replace(tzinfo=UTC)
    return int(at.timestamp()) * 1_000
