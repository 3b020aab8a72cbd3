"""Monitoring: the statements of ingest, said directly, because there are so many.

Rules:
* SQL that every engine of ours knows; values are always parameters;
* what a statement does to a thousand rows is one call of the driver; an object per row costs four times as much;
* JSON goes in and comes out as the columns keep it, so that others read it through the models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Final

import msgspec
from sqlalchemy.orm import Session

#: The fewest parameters that an engine of ours takes in a statement; SQLite's limit is 32,766.
MOST_NAMES: Final = 10_000

ACTIVE: Final = "SELECT id, tenant FROM devices WHERE state = 'active' AND id IN ({})"
DEVICES: Final = 'SELECT id, tenant, "group", state, boot, last_seen FROM devices WHERE id IN ({})'
EPOCHS: Final = "SELECT device, epoch, next_seq, lost, ahead, beat FROM device_epochs WHERE device IN ({})"
OPEN_SPANS: Final = (
    "SELECT device, digest, began_at, requests, failures, busy_us, latencies FROM exposures "
    "WHERE ended_at IS NULL AND device IN ({})"
)
#: What a heartbeat sets: columns of JSON, and the others.
JSON_FACTS: Final = ("running", "health", "degraded", "errors")
PLAIN_FACTS: Final = (
    "running_model",
    "running_version",
    "running_digest",
    "phase",
    "assignment_seq",
    "agent",
    "onnxruntime",
    "machine",
)
_SET: Final = ", ".join(f"{name} = ?" for name in (*JSON_FACTS, *PLAIN_FACTS))
BEAT: Final = f"UPDATE devices SET {_SET}, last_seen = ? WHERE id = ?"  # noqa: S608 - names of ours
SEEN: Final = "UPDATE devices SET last_seen = ? WHERE id = ?"
STATE: Final = "UPDATE devices SET boot = ?, online = ? WHERE id = ?"
GROWN: Final = (
    "UPDATE exposures SET requests = ?, failures = ?, busy_us = ?, latencies = ? "
    "WHERE device = ? AND digest = ? AND began_at = ?"
)
MOVED: Final = (
    "UPDATE device_epochs SET next_seq = ?, lost = ?, ahead = ?, beat = ?, updated_at = ? "
    "WHERE device = ? AND epoch = ?"
)
FRESH: Final = (
    "INSERT INTO device_epochs (next_seq, lost, ahead, beat, updated_at, device, epoch) VALUES (?, ?, ?, ?, ?, ?, ?)"
)


def run(session: Session, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """Do it for each of the rows."""
    if rows:
        connection = session.connection()
        connection.exec_driver_sql(_spelt(statement, connection.dialect.paramstyle), list(rows))


def of(session: Session, statement: str, names: Iterable[str]) -> list[Any]:
    """What a query says of so many names."""
    connection, every = session.connection(), tuple(names)
    found: list[Any] = []
    for first in range(0, len(every), MOST_NAMES):
        some = every[first : first + MOST_NAMES]
        asked = _spelt(statement.format(",".join("?" * len(some))), connection.dialect.paramstyle)
        found += connection.exec_driver_sql(asked, some).fetchall()
    return found


def as_json(value: Any) -> str:
    """As a column of JSON keeps it."""
    return msgspec.json.encode(value).decode()


def from_json(value: Any) -> Any:
    """What such a column says; some drivers have read it already."""
    return msgspec.json.decode(value) if isinstance(value, str) else value


@cache
def _spelt(statement: str, style: str) -> str:
    """With the marks that the driver knows for a parameter."""
    return statement if style == "qmark" else statement.replace("?", "%s")
