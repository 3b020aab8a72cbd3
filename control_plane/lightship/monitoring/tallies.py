"""Monitoring: counters for the control plane's metrics, which several processes add to.

Rules:
* what a transaction did is counted in the session (`count`), and added up only where that transaction was committed;
* a process adds what it has counted to the database a few seconds later, in one short transaction: by addition, so
  that it matters not who counted, and never goes back when a process ends. One that is killed forgets those seconds;
* what nobody has added to for a month is dropped: versions and groups come and go, and every one is a series.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from typing import Final, NamedTuple

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from lightship.storage.audit import now_ms
from lightship.storage.database import Database
from lightship.storage.models import ModelVersion
from lightship_agent.contract.codes import StorageError

log = logging.getLogger(__name__)

FLUSH_SECONDS: Final = 5.0
KEEP_MS: Final = 30 * 86_400_000
#: So long after its last sign a worker is remembered, and missed.
BEAT_KEPT_MS: Final = 86_400_000
#: The model of what devices claim to serve, and we never made.
UNKNOWN: Final = "(unknown)"
#: Where a session keeps what its transaction has counted.
KEY: Final = "tallies"
_ADD: Final = text(
    "INSERT INTO tallies (name, labels, value, first_at, updated_at) VALUES (:name, :labels, :value, :at, :at) "
    "ON CONFLICT (name, labels) DO UPDATE SET value = tallies.value + excluded.value, updated_at = excluded.updated_at"
)
_KNOWN: Final = select(ModelVersion.model, ModelVersion.version)
_DROP: Final = text("DELETE FROM tallies WHERE updated_at < :before")
_BEAT: Final = text(
    "INSERT INTO ingest_beats (worker, at) VALUES (:worker, :at) ON CONFLICT (worker) DO UPDATE SET at = excluded.at"
)
_DROP_BEATS: Final = text("DELETE FROM ingest_beats WHERE at < :before")


class Key(NamedTuple):
    """A series: its metric, and its labels in their order."""

    name: str
    labels: tuple[tuple[str, str], ...]


Counts = dict[Key, float]


def key(name: str, **labels: object) -> Key:
    """The series of a metric with these labels."""
    return Key(name, tuple((k, str(v)) for k, v in labels.items()))


def count(session: Session, n: float, name: str, **labels: object) -> None:
    """Count what this transaction does; it is lost with the transaction."""
    if n:
        merge(counted(session), {key(name, **labels): n})


def counted(session: Session) -> Counts:
    """What was counted in a session so far."""
    found: Counts = session.info.setdefault(KEY, {})
    return found


def merge(into: Counts, counts: Mapping[Key, float]) -> None:
    """Add counts to others."""
    for series, n in counts.items():
        into[series] = into.get(series, 0) + n


def add(session: Session, counts: Mapping[Key, float], now: int) -> None:
    """Add counts to the database's."""
    known = {(model, str(version)) for model, version in session.execute(_KNOWN)} if counts else set()
    stored: dict[tuple[str, str], float] = {}
    for (name, labels), n in counts.items():
        said = dict(labels)
        if said.get("model") and (said["model"], said.get("version", "")) not in known:
            # Devices say what they serve: what we never made is one series, however many names it is given.
            said |= {"model": UNKNOWN, "version": ""}
        place = name, json.dumps(said)
        stored[place] = stored.get(place, 0) + n
    # In one order everywhere, so that two that add never wait for each other.
    rows = [{"name": name, "labels": labels, "value": n, "at": now} for (name, labels), n in sorted(stored.items())]
    if rows:
        session.execute(_ADD, rows)


class Tallies:
    """What this process has counted and not added to the database yet. Safe to use from several threads."""

    def __init__(self, database: Database, worker: str = "") -> None:
        """Nothing is counted. `worker`: under which name to say that we are at work, if at all."""
        self._database = database
        self._worker = worker
        self._lock = threading.Lock()
        self._counts: Counts = {}
        self._flushed = -FLUSH_SECONDS

    def take(self, counts: Mapping[Key, float]) -> None:
        """Take what a committed transaction has counted."""
        with self._lock:
            merge(self._counts, counts)

    def flush(self, *, now: bool = False) -> None:
        """Add it to the database, if it is time; what can't be written now is kept for the next time."""
        with self._lock:
            if not now and time.monotonic() - self._flushed < FLUSH_SECONDS:
                return
            self._flushed = time.monotonic()
            counts, self._counts = self._counts, {}
        if not counts and not self._worker:
            return
        try:
            with self._database.write() as session:
                self._write(session, counts, now_ms())
        except StorageError as e:
            log.warning("counters wait: %s: %s", e.code, e)
            self.take(counts)
        except BaseException:
            self.take(counts)
            raise

    def _write(self, session: Session, counts: Counts, at: int) -> None:
        add(session, counts, at)
        session.execute(_DROP, {"before": at - KEEP_MS})
        if self._worker:
            session.execute(_BEAT, {"worker": self._worker, "at": at})
            session.execute(_DROP_BEATS, {"before": at - BEAT_KEPT_MS})
