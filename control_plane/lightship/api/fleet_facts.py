"""API: what the control plane's metrics say of the fleet, added up by the database.

Rules:
* the devices are read once, by one statement that counts them by all that is told of them;
* a sample is known by its labels in their order; a histogram's is its cells, and the sum.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import ColumnElement, Float, Select, case, cast, func, literal, select
from sqlalchemy.orm import Session

from lightship.fleet import rollouts
from lightship.fleet.rollout import TERMINAL_STATUSES
from lightship.home import Home
from lightship.storage.audit import now_ms
from lightship.storage.models import (
    AgreementRow,
    Alarm,
    AlertMessage,
    AlertRow,
    AuditEvent,
    Cut,
    DeadLetter,
    Device,
    DeviceEpoch,
    ExperimentRow,
    HeldRecord,
    IngestBeat,
    RetrainProposal,
    RolloutRow,
    Tally,
    UpdateStep,
)

Labels = tuple[str, ...]
Samples = dict[Labels, tuple[float, ...]]

ONLINE_SECONDS: Final = 900
#: Upper edges, in seconds, of how long ago a device was heard.
AGES: Final = (60.0, 300.0, 600.0, 900.0, 1_800.0, 3_600.0, 21_600.0, 86_400.0, 604_800.0)
#: And of how long a certificate is still good.
EXPIRIES: Final = (0.0, 3_600.0, 86_400.0, 259_200.0, 604_800.0, 1_209_600.0, 2_592_000.0, 7_776_000.0)
#: So long a rollout that is over is told of.
_OVER_MS: Final = 15 * 60_000
_MOST_ROLLOUTS: Final = 20


class _Alike(NamedTuple):
    """Devices of which the same is told."""

    group: str
    state: str
    model: str
    version: int
    level: str
    phase: str
    quarantined: bool
    cloned: bool
    age: int  # place among AGES
    expiry: int  # place among EXPIRIES
    devices: int
    age_sum: float
    expiry_sum: float


def gather(session: Session) -> dict[str, Samples]:
    """All gauges, by name."""
    now = now_ms()
    return {**_devices(session, now), **_rollouts(session, now), **_experiments(session), **_telemetry(session)}


def tallies(session: Session) -> dict[str, Samples]:
    """All counters, by name; those that were counted first come first."""
    found: dict[str, Samples] = {}
    rows = session.execute(select(Tally.name, Tally.labels, Tally.value).order_by(Tally.first_at, Tally.labels))
    for name, labels, value in rows:
        found.setdefault(name, {})[tuple(json.loads(labels).values())] = (value,)
    return found


def metadata_expiries(home: Home) -> Samples:
    """Seconds until each role's metadata expires."""
    now = datetime.now(UTC)
    return {(role,): ((expires - now).total_seconds(),) for role, expires in home.releases.expiries().items()}


def _devices(session: Session, now: int) -> dict[str, Samples]:
    alike = [_Alike(*row) for row in session.execute(_alike(now))]
    active = [a for a in alike if a.state == "active"]
    running = [a for a in active if a.model]
    return {
        "lightship_devices": _counted(alike, lambda a: (a.group, a.state, a.model, str(a.version) if a.model else "")),
        "lightship_devices_online": _counted(
            (a for a in alike if a.age <= AGES.index(ONLINE_SECONDS)), lambda a: (a.group,)
        ),
        "lightship_devices_running": _counted(running, lambda a: (a.model, str(a.version))),
        "lightship_devices_drift": _counted(running, lambda a: (a.group, a.model, a.level or "unknown")),
        "lightship_devices_phase": _counted(active, lambda a: (a.phase or "unknown",)),
        "lightship_devices_quarantined": _one(sum(a.devices for a in alike if a.quarantined)),
        "lightship_devices_cloned": _one(sum(a.devices for a in active if a.cloned)),
        "lightship_devices_certificate_expired": _one(sum(a.devices for a in active if a.expiry == 0)),
        "lightship_certificate_expiry_seconds": _spread(
            active, lambda _: (), len(EXPIRIES), lambda a: a.expiry, lambda a: a.expiry_sum
        ),
        "lightship_report_age_seconds": _spread(
            active, lambda a: (a.group,), len(AGES), lambda a: a.age, lambda a: a.age_sum
        ),
    }


def _alike(now: int) -> Select[Any]:
    d = Device
    age: ColumnElement[Any] = (literal(now) - d.last_seen) / 1_000.0
    good: ColumnElement[Any] = (d.cert_not_after - literal(now)) / 1_000.0
    told = (
        d.group.label("of_group"),
        d.state,
        d.running_model,
        d.running_version,
        d.drift_level,
        d.phase,
        d.quarantined,
        case((d.cloned_at > 0, 1), else_=0).label("cloned"),
        _place(age, AGES).label("age"),
        _place(good, EXPIRIES).label("expiry"),
    )
    return select(*told, func.count(), func.sum(age), func.sum(good)).group_by(*told)


def _place(value: ColumnElement[Any], edges: tuple[float, ...]) -> ColumnElement[int]:
    return case(*((value <= edge, i) for i, edge in enumerate(edges)), else_=len(edges))


def _counted(alike: Iterable[_Alike], labels: Callable[[_Alike], Labels]) -> Samples:
    counts: Counter[Labels] = Counter()
    for a in alike:
        counts[labels(a)] += a.devices
    return {k: (float(n),) for k, n in counts.items()}


def _spread(
    alike: Iterable[_Alike],
    labels: Callable[[_Alike], Labels],
    edges: int,
    place: Callable[[_Alike], int],
    total: Callable[[_Alike], float],
) -> Samples:
    found: dict[Labels, list[float]] = {}
    for a in alike:
        cells = found.setdefault(labels(a), [0.0] * (edges + 2))
        cells[place(a)] += a.devices
        cells[-1] += total(a)
    return {k: tuple(cells) for k, cells in found.items()}


def _one(value: float) -> Samples:
    return {(): (float(value),)}


def _rollouts(session: Session, now: int) -> dict[str, Samples]:
    r = RolloutRow
    statuses = session.execute(select(r.status, func.count()).group_by(r.status))
    fresh = r.status.not_in(TERMINAL_STATUSES) | (r.updated_at > now - _OVER_MS)
    devices: Samples = {}
    for row in session.scalars(select(r).where(fresh).order_by(r.updated_at.desc()).limit(_MOST_ROLLOUTS)):
        for phase, n in _phases(session, row).items():
            devices[row.id, row.model, str(row.version), phase] = (float(n),)
    return {
        "lightship_rollouts": {(status,): (float(n),) for status, n in statuses},
        "lightship_rollout_devices": devices,
    }


def _phases(session: Session, row: RolloutRow) -> dict[str, int]:
    """How many devices of a rollout wait for their wave, were told, are done, or reported a failure and are not."""
    state = rollouts.state_of(row)
    step = UpdateStep
    failing = select(step.device).where(step.rollout == row.id, step.state.in_(("failed", "refused"))).distinct()
    done, told = set(state.done), set(state.assigned_at)
    failed = (set(session.scalars(failing)) & told) - done
    planned = sum(len(wave) for wave in row.plan["waves"])
    return {
        "waiting": planned - len(told | done),
        "told": len(told - done - failed),
        "done": len(done),
        "failed": len(failed),
    }


def _experiments(session: Session) -> dict[str, Samples]:
    e, a = ExperimentRow, AgreementRow
    found = session.execute(select(e.mode, e.status, func.count()).group_by(e.mode, e.status))
    sums = session.execute(
        select(e.id, e.model, e.version, _total(a.rows), _total(a.same))
        .join(a, a.experiment == e.id)
        .where(e.status == "running")
        .group_by(e.id, e.model, e.version)
    ).all()
    return {
        "lightship_experiments": {(mode, status): (float(n),) for mode, status, n in found},
        "lightship_experiment_rows": {(i, m, str(v)): (rows,) for i, m, v, rows, _ in sums},
        "lightship_experiment_agreeing_rows": {(i, m, str(v)): (same,) for i, m, v, _, same in sums},
    }


def _telemetry(session: Session) -> dict[str, Samples]:
    a, p = Alarm, RetrainProposal
    still = a.closed_at.is_(None)
    alarms = session.execute(select(a.kind, a.level, func.count()).where(still).group_by(a.kind, a.level))
    subject = (a.evidence["kind"].as_string().label("fault"), a.evidence["feature"].as_string().label("feature"))
    faults = session.execute(
        select(a.model, *subject, func.count(a.device.distinct()))
        .where(still, a.kind == "data")
        .group_by(a.model, *subject)
    )
    proposals = session.execute(select(p.model, p.status, func.count()).group_by(p.model, p.status))
    workers = session.execute(select(IngestBeat.worker, IngestBeat.at))
    w, m = AlertRow, AlertMessage
    alerts = session.execute(
        select(w.kind, w.severity, w.status, func.count())
        .where(w.status != "resolved")
        .group_by(w.kind, w.severity, w.status)
    )
    messages = session.execute(select(m.channel, m.state, func.count()).group_by(m.channel, m.state))
    return {
        "lightship_alarms_open": {(kind, level): (float(n),) for kind, level, n in alarms},
        "lightship_alerts": {(kind, severity, status): (float(n),) for kind, severity, status, n in alerts},
        "lightship_alert_messages": {(channel, state): (float(n),) for channel, state, n in messages},
        "lightship_data_faults_open": {(m, kind or "", f or ""): (float(n),) for m, kind, f, n in faults},
        "lightship_retrain_proposals": {(model, status): (float(n),) for model, status, n in proposals},
        "lightship_ingest_worker_seen_timestamp_seconds": {(name,): (at / 1_000,) for name, at in workers},
        "lightship_sessions_to_cut": _one(_scalar(session, select(func.count()).select_from(Cut))),
        "lightship_ingest_dead_letters": _one(_scalar(session, select(func.count()).select_from(DeadLetter))),
        "lightship_ingest_held_records": _one(_scalar(session, select(func.count()).select_from(HeldRecord))),
        "lightship_reports_lost": _one(_scalar(session, select(_total(DeviceEpoch.lost)))),
        # Its numbers have no holes: the last one is how many there are.
        "lightship_audit_events": _one(_scalar(session, select(func.max(AuditEvent.seq)))),
    }


def _total(column: Any) -> ColumnElement[float]:
    """The sum as a float: that of what devices claim may be more than an integer column holds."""
    return func.coalesce(func.sum(cast(column, Float)), 0.0)


def _scalar(session: Session, query: Select[Any]) -> float:
    return float(session.scalar(query) or 0)
