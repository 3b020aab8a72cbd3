"""Storage: the audit log, append-only and hash-chained.

Rules: every mutating act appends one event in the same transaction; an event's digest covers its content and the
digest before it, so an event that was changed, reordered or removed from the middle is found by `verify`, and one
removed from the end by comparing `head` with what was noted elsewhere.
"""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from lightship_agent.contract.codes import StorageError
from lightship_agent.contract.wire import canonical_json, sha256_hex

from .models import AuditEvent

GENESIS = "0" * 64


def now_ms() -> int:
    """Wall-clock milliseconds since the Unix epoch."""
    return time.time_ns() // 1_000_000


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
    )
    event.digest = _digest(event)
    session.add(event)
    session.flush()
    return event


def head(session: Session) -> str:
    """The digest of the newest event: who notes it elsewhere can tell a log whose end was cut off."""
    return session.scalar(select(AuditEvent.digest).order_by(AuditEvent.seq.desc()).limit(1)) or GENESIS


def verify(session: Session) -> int:
    """The number of events, if the chain is whole.

    Raises:
        StorageError: storage.corrupt, naming the first event that does not fit.
    """
    previous, count = GENESIS, 0
    for event in session.scalars(select(AuditEvent).order_by(AuditEvent.seq)).yield_per(500):
        count += 1
        if event.seq != count or event.previous != previous or event.digest != _digest(event):
            raise StorageError("storage.corrupt", f"Audit event {event.seq} does not fit the chain at place {count}.")
        previous = event.digest
    return count


def _digest(event: AuditEvent) -> str:
    content = [event.seq, event.at, event.actor, event.verb, event.subject, event.detail, event.previous]
    return sha256_hex(canonical_json(content))
