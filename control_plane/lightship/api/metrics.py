"""API: the control plane's Prometheus metrics: aggregates over the fleet, never a series per device.

Rules: every metric has one row in METRICS, from which docs/reference/metrics.md is generated.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from sqlalchemy import Float, cast, func, select

from lightship.home import Home
from lightship.storage.audit import now_ms
from lightship.storage.models import Alarm, AuditEvent, Cut, DeadLetter, Device, DeviceEpoch, RolloutRow, WindowRow


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()


METRICS: Final[tuple[Metric, ...]] = (
    Metric("lightship_devices", "gauge", "Enrolled devices.", ("group", "state")),
    Metric("lightship_devices_online", "gauge", "Devices heard of in the last three minutes.", ("group",)),
    Metric("lightship_devices_running", "gauge", "Devices that report running a version.", ("model", "version")),
    Metric("lightship_devices_drift", "gauge", "Devices by the level of their last drift verdict.", ("model", "level")),
    Metric("lightship_devices_quarantined", "gauge", "Devices whose sensor is quarantined."),
    Metric("lightship_devices_cloned", "gauge", "Devices whose identity is in use twice."),
    Metric("lightship_devices_certificate_expired", "gauge", "Active devices whose certificate has run out."),
    Metric("lightship_sessions_to_cut", "gauge", "Revoked devices whose MQTT session has not been cut yet."),
    Metric("lightship_rollouts", "gauge", "Rollouts by status.", ("status",)),
    Metric("lightship_alarms_open", "gauge", "Open alarms.", ("kind", "level")),
    Metric("lightship_rows_served", "gauge", "Rows in stored windows.", ("model", "version")),
    Metric("lightship_labelled_rows", "gauge", "Rows for which a label came.", ("model", "version")),
    Metric("lightship_label_errors", "gauge", "Labelled rows that were predicted wrong.", ("model", "version")),
    Metric("lightship_ingest_dead_letters", "gauge", "Messages that could not be understood."),
    Metric("lightship_reports_lost", "gauge", "Reports that devices dropped before we stored them."),
    Metric("lightship_audit_events", "gauge", "Events in the audit log."),
    Metric("lightship_tuf_metadata_expiry_seconds", "gauge", "Seconds until release metadata expires.", ("role",)),
)


def render(home: Home) -> bytes:
    """The exposition text."""
    registry = CollectorRegistry()
    gauges = {m.name: Gauge(m.name, m.help, m.labels, registry=registry) for m in METRICS}
    _fleet(home, gauges)
    _telemetry(home, gauges)
    now = datetime.now(UTC)
    for role, expires in home.releases.expiries().items():
        gauges["lightship_tuf_metadata_expiry_seconds"].labels(role).set((expires - now).total_seconds())
    return generate_latest(registry)


def _fleet(home: Home, gauges: dict[str, Gauge]) -> None:
    with home.database.read() as session:
        devices = list(session.scalars(select(Device)))
        cuts = session.scalar(select(func.count()).select_from(Cut)) or 0
        statuses = Counter(session.scalars(select(RolloutRow.status)))
        alarms = session.execute(
            select(Alarm.kind, Alarm.level, func.count())
            .where(Alarm.closed_at.is_(None))
            .group_by(Alarm.kind, Alarm.level)
        ).all()
    recent = now_ms() - 180_000
    for (group, state), n in Counter((d.group, d.state) for d in devices).items():
        gauges["lightship_devices"].labels(group, state).set(n)
    for group, n in Counter(d.group for d in devices if d.last_seen > recent).items():
        gauges["lightship_devices_online"].labels(group).set(n)
    active = [d for d in devices if d.state == "active" and d.running_model]
    for (model, version), n in Counter((d.running_model, d.running_version) for d in active).items():
        gauges["lightship_devices_running"].labels(model, str(version)).set(n)
    for (model, level), n in Counter((d.running_model, d.drift_level or "unknown") for d in active).items():
        gauges["lightship_devices_drift"].labels(model, level).set(n)
    gauges["lightship_devices_quarantined"].set(sum(d.quarantined for d in devices))
    gauges["lightship_devices_cloned"].set(sum(d.cloned_at > 0 for d in devices if d.state == "active"))
    expired = sum(d.cert_not_after < now_ms() for d in devices if d.state == "active")
    gauges["lightship_devices_certificate_expired"].set(expired)
    gauges["lightship_sessions_to_cut"].set(cuts)
    for status, n in statuses.items():
        gauges["lightship_rollouts"].labels(status).set(n)
    for kind, level, n in alarms:
        gauges["lightship_alarms_open"].labels(kind, level).set(n)


def _telemetry(home: Home, gauges: dict[str, Gauge]) -> None:
    with home.database.read() as session:
        sums = session.execute(
            select(
                WindowRow.model,
                WindowRow.version,
                # As floats: the sum of what devices claim may be more than an integer column holds.
                *(func.sum(cast(c, Float)) for c in (WindowRow.rows, WindowRow.labelled, WindowRow.errors)),
            ).group_by(WindowRow.model, WindowRow.version)
        ).all()
        dead = session.scalar(select(func.count()).select_from(DeadLetter)) or 0
        lost = session.scalar(select(func.coalesce(func.sum(cast(DeviceEpoch.lost, Float)), 0))) or 0
        events = session.scalar(select(func.count()).select_from(AuditEvent)) or 0
    for model, version, rows, labelled, errors in sums:
        gauges["lightship_rows_served"].labels(model, str(version)).set(rows)
        gauges["lightship_labelled_rows"].labels(model, str(version)).set(labelled)
        gauges["lightship_label_errors"].labels(model, str(version)).set(errors)
    gauges["lightship_ingest_dead_letters"].set(dead)
    gauges["lightship_reports_lost"].set(lost)
    gauges["lightship_audit_events"].set(events)
