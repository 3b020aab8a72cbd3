"""Monitoring: dead letters within bounds: whoever sends what can't be understood must not fill the disk.

Rules:
* so many are kept, and so many bytes of them; the oldest go, and are counted;
* some more than needed go at a time, so that a flood is not a search for the oldest at every message.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from lightship.storage.models import DeadLetter

from . import tallies

MAX_LETTERS: Final = 10_000
MAX_BYTES: Final = 16 * 1024 * 1024
#: What is left after room was made, of each bound.
_LEFT: Final = 0.9
DROPPED: Final = "lightship_ingest_dead_dropped_total"


def make_room(session: Session, *, letters: int = MAX_LETTERS, most_bytes: int = MAX_BYTES) -> int:
    """Drop the oldest where there are too many; how many were dropped."""
    d, size = DeadLetter, func.length(DeadLetter.payload) + func.length(DeadLetter.detail)
    session.flush()
    count, held = session.execute(select(func.count(), func.coalesce(func.sum(size), 0))).one()
    if count <= letters and held <= most_bytes:
        return 0
    gone, left = [], (int(letters * _LEFT), int(most_bytes * _LEFT))
    for which, takes in session.execute(select(d.id, size).order_by(d.at, d.id)):
        if count <= left[0] and held <= left[1]:
            break
        gone.append(which)
        count, held = count - 1, held - takes
    for first in range(0, len(gone), 1_000):
        session.execute(delete(d).where(d.id.in_(gone[first : first + 1_000])))
    tallies.count(session, len(gone), DROPPED)
    return len(gone)
