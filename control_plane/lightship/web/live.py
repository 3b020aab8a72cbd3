"""Web: tells open pages that something changed, over server-sent events.

Rules:
* one fingerprint a second for all streams together, and none while nobody looks;
* a stream is told that something changed and nothing more; the page is fetched again, so there is one rendering;
* streams are bounded in number and in age, and end when the server stops.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

from sqlalchemy import case, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from lightship.api.views import SILENT_MS
from lightship.fleet import rollout as r
from lightship.storage.models import (
    Alarm,
    AlertMessage,
    AlertRow,
    AuditEvent,
    DeadLetter,
    Device,
    DeviceEpoch,
    ModelVersion,
    RetrainProposal,
    RolloutRow,
    Run,
)

log = logging.getLogger(__name__)
MAX_STREAMS: Final = 50


class Live:
    """The streams that are open."""

    def __init__(
        self,
        fingerprint: Callable[[], str],
        *,
        tick: float = 1.0,
        heartbeat: float = 15.0,
        lifetime: float = 3_600.0,
        limit: int = MAX_STREAMS,
    ) -> None:
        """Nothing is asked until a stream opens.

        Args:
            fingerprint: differs when something the pages show differs; called in a thread.
            tick: seconds between looks.
            heartbeat: seconds of silence after which a comment is sent, so that proxies keep the connection.
            lifetime: seconds after which a stream ends; browsers come back by themselves.
            limit: most streams at once.
        """
        self._fingerprint = fingerprint
        self._tick, self._heartbeat, self._lifetime, self._limit = tick, heartbeat, lifetime, limit
        self._streams = 0
        self._stopped = False
        self._lock = threading.Lock()
        self._last = ""
        self._looked_at = float("-inf")

    @property
    def full(self) -> bool:
        """Whether another stream would be one too many."""
        return self._streams >= self._limit

    def stop(self) -> None:
        """End every stream within a tick, so that a server can stop; safe from any thread."""
        self._stopped = True

    async def stream(self) -> AsyncIterator[str]:
        """Events for one page: `changed`, at most once a tick, and heartbeats."""
        self._streams += 1
        try:
            yield "retry: 2000\n\n"
            seen = await self._current()
            began = quiet_since = time.monotonic()
            while not self._stopped and time.monotonic() - began < self._lifetime:
                await asyncio.sleep(self._tick)
                current = await self._current()
                if current != seen:
                    seen, quiet_since = current, time.monotonic()
                    yield "event: changed\ndata: {}\n\n"
                elif time.monotonic() - quiet_since >= self._heartbeat:
                    quiet_since = time.monotonic()
                    yield ": still here\n\n"
        finally:
            self._streams -= 1

    async def _current(self) -> str:
        if self._fresh():
            return self._last
        return await asyncio.to_thread(self._look)

    def _fresh(self) -> bool:
        # A little less than a tick, so that a stream's own rhythm never reads a fingerprint two ticks old.
        return time.monotonic() - self._looked_at < self._tick * 0.8

    def _look(self) -> str:
        with self._lock:
            if not self._fresh():
                try:
                    self._last = self._fingerprint()
                except SQLAlchemyError as e:
                    log.warning("The dashboard can't see what changed: %s", e)
                self._looked_at = time.monotonic()
            return self._last


def fingerprint(session: Session, now: int) -> str:
    """A digest that differs when something the pages show differs; cheap, and no table is read whole but small ones.

    Every record a device sends moves its epoch's `next_seq`; every act of people and programs appends to the audit
    log. The rest are changes without either: verdicts, gates, runs, and devices that fell silent.

    Args:
        session: a read session.
        now: wall-clock milliseconds.
    """
    online = func.sum(case((Device.last_seen > now - SILENT_MS, 1), else_=0))
    judged = func.sum(Device.verdict["verdict"]["window"].as_integer())
    over = tuple(r.TERMINAL_STATUSES)
    noted = func.sum(case((Device.quarantined, 1), else_=0))
    questions = (
        select(func.count(), func.sum(Device.last_seen), online, noted, judged).select_from(Device),
        select(func.count(), func.sum(DeviceEpoch.next_seq), func.sum(DeviceEpoch.lost)).select_from(DeviceEpoch),
        select(func.max(AuditEvent.seq)),
        select(func.count(), func.max(RolloutRow.updated_at)).select_from(RolloutRow),
        select(func.count(), func.max(Run.started_at), func.count(Run.ended_at)).select_from(Run),
        select(func.count(), func.count(ModelVersion.released_at)).select_from(ModelVersion),
        select(func.count(), func.count(Alarm.closed_at)).select_from(Alarm),
        select(func.count(), func.max(RetrainProposal.updated_at)).select_from(RetrainProposal),
        select(func.count()).select_from(DeadLetter),
        select(func.count(), func.sum(AlertRow.resolved_at), func.sum(AlertRow.count)).where(
            AlertRow.status != "pending"
        ),
        select(func.count()).where(AlertMessage.state == "queued", AlertMessage.code != ""),
    )
    answers = [[None if v is None else int(v) for v in session.execute(q).one()] for q in questions]
    gates = [
        list(row)
        for row in session.execute(select(RolloutRow.id, RolloutRow.gate).where(RolloutRow.status.not_in(over)))
    ]
    return hashlib.sha256(json.dumps([answers, gates], sort_keys=True, default=str).encode()).hexdigest()
