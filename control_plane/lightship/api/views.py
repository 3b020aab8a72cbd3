"""API: what people and their programs look at, as plain JSON values, for CLI, API and dashboard.

Rules: read-only; times are milliseconds since the Unix epoch; lists are bounded.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Float, cast, func, select
from sqlalchemy.orm import Session

from lightship.access import tokens
from lightship.fleet import rollouts
from lightship.registry import versions
from lightship.storage.audit import now_ms
from lightship.storage.models import (
    Alarm,
    AuditEvent,
    DatasetVersion,
    DeadLetter,
    Device,
    DeviceEpoch,
    DeviceInstance,
    Exposure,
    ModelVersion,
    Preauthorisation,
    RetrainProposal,
    RolloutRow,
    Run,
    UpdateStep,
    WindowRow,
)

Json = dict[str, Any]
SILENT_MS = 900_000  # three reports of the default cadence


def device(row: Device) -> Json:
    """One device, without its evidence."""
    age = now_ms() - row.last_seen if row.last_seen else None
    return {
        "id": row.id,
        "group": row.group,
        "labels": row.labels,
        "state": row.state,
        "online": age is not None and age < SILENT_MS,
        "last_seen": row.last_seen,
        "model": row.running_model,
        "version": row.running_version,
        "digest": row.running_digest,
        "running": row.running,
        "phase": row.phase,
        "update": {"state": row.update_state, "code": row.update_code, "detail": row.update_detail},
        "drift": row.drift_level or "unknown",
        "quarantined": row.quarantined,
        "health": row.health,
        "degraded": row.degraded,
        "errors": row.errors,
        "app": row.app,
        "agent": row.agent,
        "onnxruntime": row.onnxruntime,
        "machine": row.machine,
        "certificate_expires": row.cert_not_after,
        "serial": row.serial,
        "cloned_at": row.cloned_at,
        "clone": row.clone if row.cloned_at else {},
    }


def devices(session: Session, group: str = "") -> list[Json]:
    """All devices, or those of a group."""
    query = select(Device).order_by(Device.id)
    return [device(d) for d in session.scalars(query.where(Device.group == group) if group else query)]


def device_detail(session: Session, row: Device, steps: int = 20) -> Json:
    """One device with its verdict, its last update steps, its exposures and its accuracy by window."""
    recent = session.scalars(
        select(UpdateStep).where(UpdateStep.device == row.id).order_by(UpdateStep.at.desc()).limit(steps)
    )
    spans = session.scalars(select(Exposure).where(Exposure.device == row.id).order_by(Exposure.began_at))
    lost = session.scalar(
        select(func.coalesce(func.sum(cast(DeviceEpoch.lost, Float)), 0)).where(DeviceEpoch.device == row.id)
    )
    return {
        **device(row),
        "verdict": row.verdict.get("verdict"),
        "updates": [
            {"at": s.at, "rollout": s.rollout, "state": s.state, "code": s.code, "detail": s.detail} for s in recent
        ],
        "exposures": [exposure(e) for e in spans],
        "windows": window_series(session, row.running_model, row.id).get(row.id, []),
        "reports_lost": int(lost or 0),
        "instances": instances(session, row.id),
    }


def instances(session: Session, device_id: str) -> list[Json]:
    """The last runs of a device's agent, by what it says itself; `returns`: heard again after the next one was."""
    query = select(DeviceInstance).where(DeviceInstance.device == device_id).order_by(DeviceInstance.first_seen.desc())
    return [
        {
            "instance": r.instance,
            "boot": r.boot,
            "address": r.address,
            "first_seen": r.first_seen,
            "last_seen": r.last_seen,
            "returns": r.returns,
        }
        for r in session.scalars(query.limit(20))
    ]


def preauthorisations(session: Session) -> list[Json]:
    """Devices that are expected, and those that came."""
    query = select(Preauthorisation).order_by(Preauthorisation.used_at, Preauthorisation.created_at)
    return [
        {
            "id": r.id,
            "device": r.device or "",
            "serial": r.serial or "",
            "key": r.spki or "",
            "group": r.group,
            "created_at": r.created_at,
            "created_by": r.created_by,
            "used_by": r.used_by,
            "used_at": r.used_at,
        }
        for r in session.scalars(query.limit(10_000))
    ]


def exposure(row: Exposure) -> Json:
    """A span in which a device served a bundle."""
    end = row.ended_at if row.ended_at is not None else now_ms()
    return {
        "device": row.device,
        "model": row.model,
        "version": row.version,
        "digest": row.digest,
        "began_at": row.began_at,
        "ended_at": row.ended_at,
        "seconds": round(max(0, end - row.began_at) / 1_000, 1),
        "requests": row.requests,
        "failures": row.failures,
    }


def exposures(session: Session, model: str, version: int) -> list[Json]:
    """Who was ever served by a version, and for how long."""
    query = select(Exposure).where(Exposure.model == model, Exposure.version == version)
    return [exposure(e) for e in session.scalars(query.order_by(Exposure.began_at, Exposure.device))]


def model_version(session: Session, row: ModelVersion) -> Json:
    """One version of a registered model."""
    return {
        "model": row.model,
        "version": row.version,
        "state": row.state,
        "aliases": versions.aliases(session, row.model).get(row.version, []),
        "digest": row.digest,
        "length": row.length,
        "metrics": row.metrics,
        "forced_reason": row.forced_reason,
        "run": row.run_id,
        "created_at": row.created_at,
        "released_at": row.released_at,
    }


def models(session: Session, model: str = "") -> list[Json]:
    """All versions."""
    return [model_version(session, v) for v in versions.listed(session, model)]


def run(row: Run) -> Json:
    """One run, with all that is needed to repeat it."""
    return {
        "id": row.id,
        "kind": row.kind,
        "model": row.model,
        "status": row.status,
        "dataset_digest": row.dataset_digest,
        "recipe": row.recipe,
        "recipe_digest": row.recipe_digest,
        "environment": row.environment,
        "code_revision": row.code_revision,
        "seeds": row.seeds,
        "metrics": row.metrics,
        "gate": row.gate,
        "parity": row.parity,
        "error_code": row.error_code,
        "error": row.error,
        "started_at": row.started_at,
        "ended_at": row.ended_at,
    }


def dataset(row: DatasetVersion) -> Json:
    """One dataset version."""
    return {
        "name": row.name,
        "version": row.version,
        "digest": row.digest,
        "rows": row.rows,
        "features": row.features,
        "target": row.target,
        "task": row.task,
        "source": row.source,
        "parent": row.parent,
        "created_at": row.created_at,
    }


def rollout_list(session: Session, limit: int = 50) -> list[Json]:
    """The newest rollouts first."""
    query = select(RolloutRow).order_by(RolloutRow.created_at.desc()).limit(limit)
    return [rollouts.view(session, r) for r in session.scalars(query)]


def alarm(row: Alarm) -> Json:
    """One alarm with its evidence."""
    return {
        "id": row.id,
        "kind": row.kind,
        "model": row.model,
        "device": row.device,
        "digest": row.digest,
        "level": row.level,
        "sentence": row.sentence,
        "evidence": row.evidence,
        "opened_at": row.opened_at,
        "closed_at": row.closed_at,
    }


def alarms(session: Session, *, only_open: bool = False, limit: int = 100) -> list[Json]:
    """The newest alarms first."""
    query = select(Alarm).order_by(Alarm.opened_at.desc()).limit(limit)
    return [alarm(a) for a in session.scalars(query.where(Alarm.closed_at.is_(None)) if only_open else query)]


def proposals(session: Session, limit: int = 50) -> list[Json]:
    """Retrain proposals, the newest first."""
    query = select(RetrainProposal).order_by(RetrainProposal.created_at.desc()).limit(limit)
    return [
        {
            "id": r.id,
            "model": r.model,
            "status": r.status,
            "reason": r.reason,
            "excluded": r.excluded,
            "run": r.run_id,
            "version": r.version,
            "rollout": r.rollout,
            "detail": r.detail,
            "created_at": r.created_at,
            "updated_at": r.updated_at,
        }
        for r in session.scalars(query)
    ]


def window_series(session: Session, model: str, device_id: str = "", limit: int = 20_000) -> dict[str, list[Json]]:
    """Per device: its newest windows in order of time, with drift and, where labels came, accuracy."""
    wanted = (
        WindowRow.device,
        WindowRow.closed_at,
        WindowRow.version,
        WindowRow.rows,
        WindowRow.shift,
        WindowRow.level,
        WindowRow.labelled,
        WindowRow.errors,
    )
    query = select(*wanted).where(WindowRow.model == model)
    if device_id:
        query = query.where(WindowRow.device == device_id)
    newest = session.execute(query.order_by(WindowRow.closed_at.desc(), WindowRow.w.desc()).limit(limit)).all()
    out: dict[str, list[Json]] = {}
    for device_name, at, version, rows, shift, level, labelled, errors in reversed(newest):
        out.setdefault(device_name, []).append(
            {
                "at": at,
                "version": version,
                "rows": rows,
                "psi": shift,
                "level": level,
                "labelled": labelled,
                "errors": errors,
                "accuracy": 1 - errors / labelled if labelled else None,
            }
        )
    return out


def audit_events(session: Session, limit: int = 200, subject: str = "") -> list[Json]:
    """The newest audit events first."""
    query = select(AuditEvent).order_by(AuditEvent.seq.desc()).limit(limit)
    rows = session.scalars(query.where(AuditEvent.subject == subject) if subject else query)
    return [
        {
            "seq": e.seq,
            "at": e.at,
            "actor": e.actor,
            "origin": e.origin,
            "verb": e.verb,
            "subject": e.subject,
            "detail": e.detail,
        }
        for e in rows
    ]


def api_tokens(session: Session) -> list[Json]:
    """API tokens by name, without their secrets."""
    now = now_ms()
    return [
        {
            "name": t.name,
            "role": t.role,
            "environment": t.environment,
            "state": tokens.state(t, now),
            "created_at": t.created_at,
            "created_by": t.created_by,
            "expires_at": t.expires_at,
            "revoked_at": t.revoked_at,
            "last_used_at": t.last_used_at,
            "last_used_from": t.last_used_from,
        }
        for t in tokens.listed(session)
    ]


def overview(session: Session) -> Json:
    """Everything the first dashboard page shows."""
    fleet = devices(session)
    return {
        "at": now_ms(),
        "devices": fleet,
        "rollouts": rollout_list(session, 10),
        "models": models(session),
        "alarms": alarms(session, limit=20),
        "proposals": proposals(session, 10),
        "dead_letters": session.scalar(select(func.count()).select_from(DeadLetter)) or 0,
    }
