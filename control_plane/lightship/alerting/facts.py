"""Alerting: what is wrong now, read from the database, the release repository and the certificates.

Rules: it only reads, but for the counters, whose growth has to be remembered; what costs a look at files is looked at
once a minute.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from cryptography import x509
from sqlalchemy import Select, String, and_, cast, exists, func, or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from lightship.home import Home
from lightship.storage.models import Alarm, AlertCounter, DeadLetter, Device, DeviceEpoch, IngestBeat, RolloutRow

from . import findings as f
from . import store
from .decide import Finding
from .limits import Limits

FILES_EVERY: Final = 60_000
#: A rollout that went back is told of for so long, unless another one of its model comes.
WENT_BACK: Final = 86_400_000
_EARLY: Final = {"ca": 90 * f.DAY, "server": 30 * f.DAY}
_MARK: Final = "*"  # counters were looked at before


class Facts:
    """Looks at everything."""

    def __init__(self, home: Home, limits: Limits, listening_since: int, channels: Sequence[str]) -> None:
        """Nothing was looked at yet; `listening_since` is when we began to hear devices."""
        self._home = home
        self._limits = limits
        self._since = listening_since
        self._channels = channels
        self._looked_at = 0
        self._from_files: list[Finding] = []

    def look(self, session: Session, now: int) -> tuple[list[Finding], list[AlertCounter]]:
        """What is wrong, and the counters that are to be remembered."""
        counted, changed = _counters(session, now)
        lost = {name: c for name, c in counted.items() if c.grew_at}
        found = [
            *f.silent(self._quiet(session, now), now, self._since, self._limits.interval),
            *f.drifting(_alarms(session)),
            *f.dropping(lost, _groups(session) if lost else {}, now),
            *f.ending(self._certificates(session, now), now),
            *f.degraded(_degraded(session)),
            *f.cloned((d, g) for d, g in session.execute(_active(Device.id, Device.group).where(Device.cloned_at > 0))),
            *f.halted(_halted(session, now)),
            *f.dead(_dead(session, now), self._limits.dead_letters),
            *f.missing(_beats(session), now, self._since),
            *f.stuck(store.oldest_queued(session, self._channels), now),
            *self._files(now),
        ]
        return found, changed

    def _quiet(self, session: Session, now: int) -> list[f.Heard]:
        before = now - f.INTERVALS * self._limits.interval
        query = _active(Device.id, Device.group, Device.last_seen, Device.enrolled_at)
        rows = session.execute(query.where(Device.last_seen < before, Device.enrolled_at < before))
        return [f.Heard(d, g, max(seen, enrolled)) for d, g, seen, enrolled in rows]

    def _certificates(self, session: Session, now: int) -> list[f.Ending]:
        early = self._limits.certificate
        query = _active(Device.id, Device.group, Device.cert_not_after).where(Device.cert_not_after < now + early)
        return [f.Ending(d, g, until, early) for d, g, until in session.execute(query)]

    def _files(self, now: int) -> list[Finding]:
        """The release list's health, and our own certificates."""
        if not self._looked_at or now - self._looked_at >= FILES_EVERY:
            moment = datetime.fromtimestamp(now / 1_000, UTC)
            health = [(r.role, r.state, r.sentence) for r in self._home.releases.health(moment)]
            self._from_files = [*f.expiring(health), *f.ending(self._own(), now)]
            self._looked_at = now
        return self._from_files

    def _own(self) -> list[f.Ending]:
        ca = self._home.ca.certificate_path
        found = []
        for name, path in (("ca", ca), ("server", ca.with_name("server.pem"))):
            if path.exists():
                until = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
                found.append(f.Ending(name, "", int(until.timestamp() * 1_000), _EARLY[name]))
        return found


def _active(*columns: InstrumentedAttribute[Any]) -> Select[Any]:
    return select(*columns).where(Device.state == "active")


def _alarms(session: Session) -> list[f.Standing]:
    query = select(Alarm, Device.group).outerjoin(Device, Device.id == Alarm.device).where(Alarm.closed_at.is_(None))
    found = []
    for alarm, group in session.execute(query):
        parts = (str(alarm.evidence.get(name, "")) for name in ("kind", "feature")) if alarm.kind == "data" else ()
        what = ":".join(parts) or str(alarm.evidence.get("segment", ""))
        found.append(f.Standing(alarm.kind, alarm.model, alarm.device, group or "", alarm.level, alarm.sentence, what))
    return found


def _counters(session: Session, now: int) -> tuple[dict[str, f.Counted], list[AlertCounter]]:
    """Reports dropped per device, with when that grew, and what of it is new."""
    rows = session.scalars(select(AlertCounter))
    before = {r.name: f.Counted(r.value, r.grew_at) for r in rows}
    total = select(DeviceEpoch.device, func.sum(DeviceEpoch.lost)).where(DeviceEpoch.lost > 0)
    counters = {d: int(n) for d, n in session.execute(total.group_by(DeviceEpoch.device))}
    first = _MARK not in before
    new = f.grown(before, counters, now, first=first)
    changed = [AlertCounter(name=name, value=c.value, grew_at=c.grew_at) for name, c in new.items()]
    if first:
        changed.append(AlertCounter(name=_MARK, value=0, grew_at=0))
    return {**before, **new}, changed


def _groups(session: Session) -> dict[str, str]:
    """The groups of devices that ever dropped reports."""
    dropped = select(DeviceEpoch.device).where(DeviceEpoch.lost > 0)
    rows = session.execute(select(Device.id, Device.group).where(Device.id.in_(dropped)))
    return {row[0]: row[1] for row in rows}


def _degraded(session: Session) -> list[tuple[str, str, list[str]]]:
    query = _active(Device.id, Device.group, Device.degraded).where(cast(Device.degraded, String) != "[]")
    return [(d, g, [str(c) for c in codes]) for d, g, codes in session.execute(query)]


def _halted(session: Session, now: int) -> list[f.Halted]:
    later = aliased(RolloutRow)
    superseded = exists().where(later.model == RolloutRow.model, later.created_at > RolloutRow.created_at)
    back = and_(
        RolloutRow.status.in_(("rolling-back", "rolled-back")),
        RolloutRow.updated_at > now - WENT_BACK,
        ~superseded,
    )
    rows = session.scalars(select(RolloutRow).where(or_(RolloutRow.status == "paused", back)))
    return [f.Halted(r.id, r.model, r.version, r.status, r.reason) for r in rows]


def _beats(session: Session) -> list[tuple[str, int]]:
    return [(worker, at) for worker, at in session.execute(select(IngestBeat.worker, IngestBeat.at))]


def _dead(session: Session, now: int) -> int:
    return session.scalar(select(func.count()).select_from(DeadLetter).where(DeadLetter.at > now - f.RECENT)) or 0
