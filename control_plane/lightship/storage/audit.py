"""Storage: the audit log, append-only and hash-chained.

Rules:
* every mutating act appends one event in the same transaction: who, from where, what, to what, and why where a reason
  was given;
* an event's digest covers its content and the digest before it, so an event that was changed, inserted, reordered or
  removed from the middle is found by `verify`;
* whoever can write the database can make the whole chain anew, or cut its end: that is found by comparing with a
  head that was noted elsewhere, and by nothing else.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from lightship_agent.contract.codes import StorageError
from lightship_agent.contract.wire import canonical_json, sha256_hex

from .models import AuditEvent

GENESIS: Final = "0" * 64
_REMEDY: Final = "Find out by whom before you restore; keep the database as it is."
_ORIGIN: ContextVar[str] = ContextVar("origin", default="")


@dataclass(frozen=True)
class Chain:
    """What `verify` found."""

    events: int
    head: str
    since: int = 0  # events after the noted head


def now_ms() -> int:
    """Wall-clock milliseconds since the Unix epoch."""
    return time.time_ns() // 1_000_000


@contextmanager
def coming_from(origin: str) -> Iterator[None]:
    """What is audited inside came from there: an address, a terminal."""
    before = _ORIGIN.set(origin)
    try:
        yield
    finally:
        _ORIGIN.reset(before)


def append(
    session: Session, *, actor: str, verb: str, subject: str, detail: dict[str, Any] | None = None
) -> AuditEvent:
    """Record that `actor` did `verb` to `subject`."""
    last = session.scalars(select(AuditEvent).order_by(AuditEvent.seq.desc()).limit(1)).first()
    event = AuditEvent(
        seq=last.seq + 1 if last else 1,
        at=now_ms(),
        actor=actor,
        verb=verb,
        subject=subject,
        detail=detail or {},
        previous=last.digest if last else GENESIS,
        origin=_ORIGIN.get(),
    )
    event.digest = _digest(event)
    session.add(event)
    session.flush()
    return event


def head(session: Session) -> str:
    """The digest of the newest event: who notes it elsewhere can tell a log whose end was cut off."""
    return session.scalar(select(AuditEvent.digest).order_by(AuditEvent.seq.desc()).limit(1)) or GENESIS


def verify(session: Session, noted: str = "") -> Chain:
    """How long the chain is, if it is whole, and goes on from the head that was `noted` earlier.

    Raises:
        StorageError: storage.corrupt, naming the first event that does not fit, or the head that is missing.
    """
    return check(session.scalars(select(AuditEvent).order_by(AuditEvent.seq)).yield_per(500), noted)


def check(events: Iterable[AuditEvent], noted: str = "") -> Chain:
    """The same, of events from wherever they come, in their order.

    Raises:
        StorageError: storage.corrupt.
    """
    previous, count, found = GENESIS, 0, 0 if noted == GENESIS else None
    for event in events:
        count += 1
        if event.seq != count or event.previous != previous or event.digest != _digest(event):
            message = f"Audit event {event.seq} does not fit the chain at place {count}: "
            message += _misfit(event, count, previous)
            raise StorageError("storage.corrupt", message, remedy=_REMEDY)
        previous = event.digest
        if event.digest == noted:
            found = count
    if noted and found is None:
        message = f"The chain of {count} events fits in itself, but the noted head {noted[:16]}… is not in it: "
        message += "its end was cut off, or it was made anew."
        raise StorageError("storage.corrupt", message, remedy=_REMEDY)
    return Chain(count, previous, count - (found or 0) if noted else 0)


def lines(session: Session, after: int = 0) -> Iterator[str]:
    """Events as JSON, one a line, with the digests that let `read_line` and `check` judge a copy."""
    query = select(AuditEvent).where(AuditEvent.seq > after).order_by(AuditEvent.seq)
    for event in session.scalars(query).yield_per(500):
        yield json.dumps({c.key: getattr(event, c.key) for c in AuditEvent.__table__.columns}, ensure_ascii=False)


def read_line(line: str) -> AuditEvent:
    """An event that `lines` wrote.

    Raises:
        StorageError: storage.corrupt.
    """
    try:
        found = json.loads(line)
        return AuditEvent(**{c.key: found[c.key] for c in AuditEvent.__table__.columns})
    except (ValueError, KeyError, TypeError) as e:
        raise StorageError("storage.corrupt", f"Not a line of an exported audit log: {line[:60]!r}.") from e


def _digest(event: AuditEvent) -> str:
    content = [event.seq, event.at, event.actor, event.verb, event.subject, event.detail, event.previous]
    if event.origin:
        # Events from before there was an origin have none, and keep their digest.
        content.append(event.origin)
    return sha256_hex(canonical_json(content))


def _misfit(event: AuditEvent, place: int, previous: str) -> str:
    if event.seq > place:
        return f"{event.seq - place} before it are missing."
    if event.seq < place:
        return "it is there twice, or its number was changed."
    if event.previous != previous:
        return "it does not follow the one before it; one of them was changed, moved or put in."
    return "its content was changed."
