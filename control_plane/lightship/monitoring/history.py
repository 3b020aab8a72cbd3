"""Monitoring: the history of reports, as they came, outside the fleet's database.

What ingest makes of a report is in the fleet's database, and small. What it said is here, for as long as it is worth
its room: to look at a device's past, to roll it up by hour and by day, and to hand it to other tools.

Rules:
* a row is known by (device, time, epoch, seq), so that what comes again is recognised within its own day;
* it is written before the fleet's database says that the report is stored: after a crash in between it comes again;
* a clock that is in the future, or before anything could have been made, is not believed: the row is kept at the time
  at which the server heard it, and marked;
* days are dropped, not deleted row by row, where the engine can.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, Protocol

from sqlalchemy import select

from lightship.storage.database import Database
from lightship.storage.models import Device
from lightship_agent.contract.messages import Envelope
from lightship_agent.contract.wire import encode

from .ingest import FUTURE_MS, Understood

#: 2020-01-01: a clock that says less was never set.
EARLIEST_MS: Final = 1_577_836_800_000


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


class History(Protocol):
    """Where reports are kept."""

    def write(self, reports: Sequence[Report]) -> int:
        """Keep them, each once; how many were new.

        Raises:
            StorageError: storage.full, storage.unwritable, storage.busy; nothing was written.
        """

    def read(self, since: int, until: int, device: str = "") -> Iterator[Report]:
        """What was reported in that time, by device and time."""

    def close(self) -> None:
        """Close it."""


def reports_of(messages: Sequence[Understood], tenants: dict[str, str], now: int) -> list[Report]:
    """The rows in what was understood of devices that are known, by their tenants."""
    rows = []
    for message, said in messages:
        tenant = tenants.get(message.device)
        if tenant is None or not isinstance(said, Envelope) or (message.tenant and message.tenant != tenant):
            continue
        for record in said.r:
            approx = not EARLIEST_MS <= record.t <= now + FUTURE_MS
            at = now if approx else record.t
            kind = record.__struct_config__.tag
            rows.append(Report(message.device, at, said.e, record.s, now, str(kind), approx, encode(record)))
    return rows


def remember(database: Database, history: History, messages: Sequence[Understood], now: int) -> int:
    """Keep what active devices report; how many rows were new."""
    names = {message.device for message, said in messages if isinstance(said, Envelope)}
    with database.read() as session:
        active = select(Device.id, Device.tenant).where(Device.id.in_(names), Device.state == "active")
        tenants = {device: tenant for device, tenant in session.execute(active)}  # noqa: C416 - rows are not pairs
    rows = reports_of(messages, tenants, now)
    return history.write(rows) if rows else 0
