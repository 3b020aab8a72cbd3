"""Fleet: the lease under which one replica does the reconciler's work.

Rules: a row with holder, fencing epoch and expiry; taking over raises the epoch, and work that finds another epoch
in the row stops.
"""

from __future__ import annotations

from sqlalchemy.orm import Session

from lightship.storage.models import Lease

TTL_MS = 10_000


def acquire(session: Session, name: str, holder: str, now: int) -> int | None:
    """Take or renew the lease; its fencing epoch, or None while another holds it.

    Args:
        session: a write session.
        name: of the lease.
        holder: who asks.
        now: milliseconds, of one clock for all replicas.
    """
    row = session.get(Lease, name)
    if row is None:
        session.add(Lease(name=name, holder=holder, epoch=1, expires_at=now + TTL_MS))
        return 1
    if row.holder != holder:
        if row.expires_at > now:
            return None
        row.holder, row.epoch = holder, row.epoch + 1
    row.expires_at = now + TTL_MS
    return row.epoch


def release(session: Session, name: str, holder: str) -> None:
    """Let another replica take over at once."""
    row = session.get(Lease, name)
    if row is not None and row.holder == holder:
        row.expires_at = 0
