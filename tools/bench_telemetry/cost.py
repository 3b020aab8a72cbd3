"""Bench telemetry: what a report costs at ingest: CPU and memory of a real `lightship ingest`, as the kernel counts.

Rules: over TLS, from a real mosquitto, into the database of a real home; the process's start is not in the figure. The
fleet's own database is SQLite in all rows; the history of reports is in SQLite or on PostgreSQL.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlalchemy import func, select

from lightship.fleet.broker import control_plane_context
from lightship.integrations.mosquitto import CONTROL_PLANE_USER
from lightship.storage.audit import now_ms
from lightship.storage.models import Device, DeviceEpoch
from lightship_agent.contract.codes import StorageError

from .publisher import Publisher, publisher
from .reports import messages, name
from .site import Site, cpu, peak_mb, site, until

DEVICES: Final = 2_000
FLEET_RATE: Final = 1_667  # messages a second: a hundred thousand devices, each once a minute


@dataclass(frozen=True)
class Cost:
    """Of one way of ingest."""

    history: str  # sqlite | postgres
    protocol: str  # 3.1.1 | 5
    batch: int  # reports in a message
    messages: int
    micros: float  # of CPU per message
    broker_micros: float

    @property
    def report_micros(self) -> float:
        """Of CPU per report."""
        return self.micros / self.batch


@dataclass(frozen=True)
class Steady:
    """A fleet's rate for a while, and somebody who writes to the fleet's database as the API does."""

    rate: float  # messages a second that were asked for
    seconds: float
    share: float  # of a core, ingest
    writes: int  # of the API, beside it
    locked: int  # of those, and in ingest's own log
    slowest_ms: float  # write of the API


@dataclass(frozen=True)
class Stalled:
    """The database locked by somebody for a while, at a fleet's rate."""

    seconds: float
    peak_mb: float
    lost: int


def measure(folder: Path, url: str, sizes: tuple[int, int]) -> list[Cost]:
    """Each way once; `sizes`: messages of one report, and of fifty."""
    found = []
    for history in ("", *([url] if url else [])):
        for protocol in ("3.1.1", "5"):
            for batch, count in ((1, sizes[0]), (50, sizes[1])):
                with _fed(folder, history, protocol) as (place, out):
                    found.append(_cost(place, out, "postgres" if history else "sqlite", protocol, batch, count))
                print(f"  {found[-1]}", flush=True)
    return found


@contextmanager
def _fed(folder: Path, history: str = "", protocol: str = "auto") -> Iterator[tuple[Site, Publisher]]:
    """A site with a fleet, a broker, one worker that has stored a report of each device, and a publisher."""
    with site(folder / "site", history=history, protocol=protocol) as place:
        place.add_devices([name(n) for n in range(DEVICES)])
        broker = place.start_broker("mosquitto")
        place.start_worker()
        tls = control_plane_context(place.folder, place.home.ca)
        with publisher(broker.info.port, tls, CONTROL_PLANE_USER) as out:
            # Nobody keeps what is said before the worker listens: the first reports go until they are stored.
            first = list(messages(DEVICES, 0, DEVICES, 1, now_ms()))
            while stored(place) < DEVICES:
                out.publish(first)
                time.sleep(2)
            _rests(place.workers[0].pid)
            yield place, out


def _rests(pid: int) -> None:
    """Wait until it has nothing to do any more: what was said again to begin with is no part of what is measured."""
    busy = 1.0
    while busy > 0.05:
        before = cpu(pid)
        time.sleep(1)
        busy = cpu(pid) - before


def _cost(place: Site, out: Publisher, history: str, protocol: str, batch: int, count: int) -> Cost:
    assert place.broker is not None
    before = stored(place)
    # Message n of a device carries numbers that follow those of the one before it.
    said = list(messages(DEVICES, DEVICES, DEVICES + count, batch, now_ms()))
    if batch > 1:
        said = list(_after_first(count, batch))
    pid, broker = place.workers[0].pid, place.broker.process.pid
    began, broker_began = cpu(pid), cpu(broker)
    out.publish(said)
    until(lambda: stored(place) >= before + count * batch, 180)
    micros = (cpu(pid) - began) / count * 1e6
    return Cost(history, protocol, batch, count, micros, (cpu(broker) - broker_began) / count * 1e6)


def _after_first(count: int, batch: int) -> Iterator[tuple[str, bytes]]:
    from lightship_agent.contract import topics
    from lightship_agent.contract.messages import Envelope
    from lightship_agent.contract.wire import pack

    from .reports import EPOCH, beat
    from .site import TENANT

    now = now_ms()
    for n in range(count):
        begins = n // DEVICES * batch + 2
        records = tuple(beat(seq, now + seq) for seq in range(begins, begins + batch))
        yield topics.telemetry(TENANT, name(n % DEVICES)), pack(Envelope(e=EPOCH, b=1, us=1, lo=1, r=records))


def steady(folder: Path, seconds: float) -> Steady:
    """So long, with an operator who writes all the time."""
    with _fed(folder) as (place, out):
        said = list(messages(DEVICES, DEVICES, DEVICES + int(FLEET_RATE * seconds), 1, now_ms()))
        pid, end, slowest, errors, writes = place.workers[0].pid, threading.Event(), [0.0], [0], [0]

        def write() -> None:
            while not end.wait(0.05):
                began = time.monotonic()
                try:
                    with place.home.database.write() as session:
                        # Read, then write: what a transaction that begins as a reader fails at.
                        device = session.scalars(select(Device).where(Device.id == name(writes[0] % DEVICES))).one()
                        device.labels = {"hall": str(writes[0])}
                except StorageError:
                    errors[0] += 1
                writes[0] += 1
                slowest[0] = max(slowest[0], time.monotonic() - began)

        operator = threading.Thread(target=write)
        operator.start()
        began, at = cpu(pid), time.monotonic()
        out.publish(said, FLEET_RATE)
        took = time.monotonic() - at
        share = (cpu(pid) - began) / took
        until(lambda: stored(place) >= DEVICES + len(said), 120)
        end.set()
        operator.join()
        locked = errors[0] + place.log.read_text(errors="replace").count("locked")
    return Steady(len(said) / took, took, share, writes[0], locked, slowest[0] * 1_000)


def stalled(folder: Path, seconds: float) -> Stalled:
    """Somebody holds the database's write lock for so long, while a fleet reports."""
    with _fed(folder) as (place, out):
        said = list(messages(DEVICES, DEVICES, DEVICES + int(FLEET_RATE * seconds), 1, now_ms()))
        holder = sqlite3.connect(place.home.path / "lightship.db", isolation_level=None, timeout=30)
        holder.execute("BEGIN IMMEDIATE")
        out.publish(said, FLEET_RATE)
        peak = peak_mb(place.workers[0].pid)
        holder.execute("ROLLBACK")
        holder.close()
        with suppress(TimeoutError):
            until(lambda: stored(place) >= DEVICES + len(said), 180)
        lost = DEVICES + len(said) - stored(place)
        return Stalled(seconds, max(peak, peak_mb(place.workers[0].pid)), lost)


def stored(place: Site) -> int:
    """Reports that the fleet's database says are stored, without gaps."""
    with place.home.database.read() as session:
        return int(session.scalar(select(func.sum(DeviceEpoch.next_seq - 1))) or 0)
