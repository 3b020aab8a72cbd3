"""Monitoring: the history in SQLite, in a file of its own beside the fleet's database.

Rules:
* a file of its own: what ingest writes there a thousand times a second keeps nobody waiting who writes to the fleet's;
* one index, (device, ts, epoch, seq), tells duplicates and finds a device's day; the table itself is in the order of
  arrival, which is a quarter of the writing that a table in the order of that index would take, and what is too old is
  at its beginning;
* WAL, BEGIN IMMEDIATE, a sync at each commit, which is one for a batch.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from lightship_agent.contract.codes import StorageError

from .history import HOUR_MS, Keep, Numbers, Report, Rollup

BUSY_SECONDS: Final = 30
VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE reports (device TEXT NOT NULL, ts INTEGER NOT NULL, epoch TEXT NOT NULL, seq INTEGER NOT NULL,
    recv INTEGER NOT NULL, kind TEXT NOT NULL, approx INTEGER NOT NULL, body BLOB NOT NULL);
CREATE UNIQUE INDEX reports_once ON reports (device, ts, epoch, seq);
CREATE TABLE due (hour INTEGER PRIMARY KEY);
CREATE TABLE hourly (device TEXT NOT NULL, begins INTEGER NOT NULL, numbers BLOB NOT NULL,
    PRIMARY KEY (device, begins)) WITHOUT ROWID;
CREATE TABLE daily (device TEXT NOT NULL, begins INTEGER NOT NULL, numbers BLOB NOT NULL,
    PRIMARY KEY (device, begins)) WITHOUT ROWID;
"""
_TABLES: Final = {
    "hourly": "SELECT device, begins, numbers FROM hourly WHERE begins >= ? AND begins < ? ORDER BY device, begins",
    "daily": "SELECT device, begins, numbers FROM daily WHERE begins >= ? AND begins < ? ORDER BY device, begins",
}
_PRUNED_AT_ONCE: Final = 20_000  # rows


class SqliteHistory:
    """One file. Safe to use from several threads and processes."""

    def __init__(self, path: Path) -> None:
        """Open it, or make it.

        Raises:
            StorageError: storage.unwritable, storage.full, storage.corrupt, storage.schema.
        """
        self._lock = threading.Lock()
        with _explained():
            self._db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            with self._transaction():
                (version,) = self._db.execute("PRAGMA user_version").fetchone()
                if version == 0:
                    for statement in _SCHEMA.split(";\n"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version={VERSION}")
            if version not in (0, VERSION):
                raise StorageError("storage.schema", f"{path}: expected version {VERSION}, found {version}.")

    def write(self, reports: Sequence[Report]) -> int:
        """Keep them, each once; how many were new."""
        hours = {(r.ts - r.ts % HOUR_MS,) for r in reports}
        with self._transaction():
            before = self._db.total_changes
            self._db.executemany("INSERT OR IGNORE INTO reports VALUES (?, ?, ?, ?, ?, ?, ?, ?)", reports)
            new = self._db.total_changes - before
            if new:
                self._db.executemany("INSERT OR IGNORE INTO due VALUES (?)", hours)
        return new

    def read(self, since: int, until: int, device: str = "") -> Iterator[Report]:
        """What was reported from `since` to before `until`, by device and time."""
        mine = "AND device = ?" if device else "AND ? = ''"
        query = f"SELECT * FROM reports WHERE ts >= ? AND ts < ? {mine} ORDER BY device, ts, epoch, seq"  # noqa: S608
        with _explained():
            for row in self._db.cursor().execute(query, (since, until, device)):
                yield Report._make((*row[:6], bool(row[6]), row[7]))

    def end(self) -> int:
        """A mark behind what has come so far."""
        with _explained():
            (last,) = self._db.cursor().execute("SELECT max(rowid) FROM reports").fetchone()
        return int(last or 0)

    def arrivals(self, mark: int, devices: Sequence[str], limit: int = 1_000) -> tuple[int, list[Report]]:
        """What of these devices came behind a mark, in the order of arrival, and the mark behind that."""
        end = self.end()
        if end < mark:  # everything was pruned, and rows are counted from 1 again
            mark = 0
        query = """SELECT rowid, * FROM reports WHERE rowid > ? AND rowid <= ?
            AND device IN (SELECT value FROM json_each(?)) ORDER BY rowid LIMIT ?"""
        names = msgspec.json.encode(list(devices)).decode()
        with _explained():
            rows = self._db.cursor().execute(query, (mark, end, names, limit)).fetchall()
        found = [Report._make((*row[1:7], bool(row[7]), row[8])) for row in rows]
        return (rows[-1][0] if len(rows) == limit else end), found

    def due(self, before: int) -> list[int]:
        """Hours that ended before then, in which something came that is not rolled up."""
        with _explained():
            query = "SELECT hour FROM due WHERE hour + ? <= ? ORDER BY hour"
            found = self._db.cursor().execute(query, (HOUR_MS, before))
            return [hour for (hour,) in found]

    def roll(self, hour: int, hourly: Sequence[Rollup], daily: Sequence[Rollup]) -> None:
        """Keep the rollups of an hour, and of its day; the hour is no longer due."""
        with self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO hourly VALUES (?, ?, ?)", map(_packed, hourly))
            self._db.executemany("INSERT OR REPLACE INTO daily VALUES (?, ?, ?)", map(_packed, daily))
            self._db.execute("DELETE FROM due WHERE hour = ?", (hour,))

    def rollups(self, table: str, since: int, until: int) -> Iterator[Rollup]:
        """Rollups of "hourly" or "daily", by device and time."""
        with _explained():
            for device, begins, numbers in self._db.cursor().execute(_TABLES[table], (since, until)):
                yield Rollup(device, begins, msgspec.msgpack.decode(numbers, type=dict[str, Numbers]))

    def prune(self, now: int, keep: Keep) -> None:
        """Drop what came too long ago, and the oldest where the reports take too much room; a part at a time."""
        while self._prune_some(now - keep.raw, keep.raw_bytes):
            pass
        with self._transaction():
            self._db.execute("DELETE FROM due WHERE hour < ?", (now - keep.raw,))
            self._db.execute("DELETE FROM hourly WHERE begins < ?", (now - keep.hourly,))
            self._db.execute("DELETE FROM daily WHERE begins < ?", (now - keep.daily,))

    def _prune_some(self, came_before: int, most_bytes: int) -> bool:
        """Whether there may be more to drop. Others write in between."""
        with self._transaction():
            (pages,), (size,), (free,) = (
                self._db.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size", "freelist_count")
            )
            if (pages - free) * size > most_bytes:
                came_before = 2**62
            oldest = "SELECT rowid AS id, recv FROM reports ORDER BY rowid LIMIT ?"
            query = f"DELETE FROM reports WHERE rowid <= (SELECT max(id) FROM ({oldest}) WHERE recv < ?)"  # noqa: S608
            gone = self._db.execute(query, (_PRUNED_AT_ONCE, came_before)).rowcount
        return gone == _PRUNED_AT_ONCE

    def close(self) -> None:
        """Close it."""
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, _explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")


@contextmanager
def _explained() -> Iterator[None]:
    """Say what an error of SQLite means."""
    try:
        yield
    except sqlite3.DatabaseError as e:
        text = str(e)
        kinds = {"full": "storage.full", "locked": "storage.busy", "malformed": "storage.corrupt"}
        kind = next((code for word, code in kinds.items() if word in text), "storage.unwritable")
        raise StorageError(kind, f"The history of reports can't be used: {text}.") from e


def _packed(rollup: Rollup) -> tuple[str, int, bytes]:
    return (rollup.device, rollup.begins, msgspec.msgpack.encode(rollup.numbers))
