"""Web: what each page shows, read in one transaction.

Rules:
* reads only; the values come from `lightship.api.views` where it has them, so that page, API and CLI agree;
* lists are bounded, and what needs attention comes first: a cut list must never hide a failure;
* JSON columns are other programs' words: any key may be missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from lightship.api import views
from lightship.fleet import rollout as r
from lightship.fleet import rollouts
from lightship.monitoring.explain import told_by_labels
from lightship.monitoring.verdict import Performance, ResidualShift
from lightship.storage.models import (
    DatasetVersion,
    DeadLetter,
    Device,
    Exposure,
    ModelVersion,
    RolloutRow,
    Run,
    UpdateStep,
    WindowRow,
)

from . import figures, plots, words

Json = dict[str, Any]
#: Devices in the table of the overview; those that need attention come first.
MAX_DEVICES: Final = 200
MAX_WINDOWS: Final = 4_000
MAX_EXPOSURES: Final = 400
#: Devices in a timeline, and spans in a table of one version; the count above a table is always of all.
MAX_LANES: Final = 60
MAX_SPANS: Final = 100
MAX_ATTENTION: Final = 40
ENDED_ROLLOUTS: Final = 3
#: Certificates that end within so many days are spoken of; they renew themselves long before.
CERTIFICATE_DAYS: Final = 2
_FAILED: Final = ("failed", "refused")
_URGENCY: Final = {"bad": 0, "hold": 1, "busy": 1, "warn": 2, "wait": 3}


@dataclass(frozen=True)
class Stat:
    """A number of the header."""

    value: int
    label: str
    tone: str = "none"
    href: str = ""


@dataclass(frozen=True)
class Attention:
    """Something a person should know, and the command that acts on it."""

    word: str
    sentence: str
    href: str = ""
    command: str = ""
    ident: str = ""


def overview(session: Session, now: int) -> Json:
    """Everything of the first page."""
    devices = sorted(views.devices(session), key=lambda d: (-severity(d, now), figures.natural(d["id"])))
    alarms = views.alarms(session, only_open=True)
    proposals = views.proposals(session, 10)
    under_way = [rollout(session, row) for row in reversed(rollouts.active(session))]
    dead = session.scalar(select(func.count()).select_from(DeadLetter)) or 0
    failed_runs = list(
        session.scalars(select(Run).where(Run.status == "failed").order_by(Run.started_at.desc()).limit(3))
    )
    attention = [
        *_of_rollouts(under_way),
        *_of_alarms(alarms),
        *_of_devices(devices, now),
        *_of_proposals(proposals),
        *_of_runs(session, failed_runs),
    ]
    if dead:
        sentence = (
            f"{dead} message{'s' if dead > 1 else ''} could not be understood and {'were' if dead > 1 else 'was'} kept."
        )
        attention.append(Attention("dead letters", sentence))
    attention.sort(key=lambda a: _URGENCY.get(words.tone(a.word), 2))  # stable: kinds stay together
    shown = devices[:MAX_DEVICES]
    return {
        "stats": stats(devices, alarms, dead),
        "attention": attention[:MAX_ATTENTION],
        "attention_total": len(attention),
        "rollouts": under_way,
        "ended": _ended(session),
        "devices": shown,
        "devices_total": len(devices),
        "windows": recent_windows(session, devices=[d["id"] for d in shown]),
        "versions": list(reversed(views.models(session))),
        "alarms": alarms,
        "proposals": proposals,
    }


def severity(device: Json, now: int) -> int:
    """How much a device needs attention: 0 not at all."""
    if device["state"] != "active":
        return -1
    points = 4 if device["update"]["state"] in _FAILED or device["cloned_at"] else 0
    points += {"critical": 4, "warning": 2}.get(device["drift"], 0)
    points += 1 if device["quarantined"] else 0
    points += 2 if not device["online"] else 0
    return points + (1 if words.soon(device["certificate_expires"], now, CERTIFICATE_DAYS) else 0)


def stats(devices: list[Json], alarms: list[Json], dead: int) -> list[Stat]:
    """The numbers of the header, of devices that are not revoked."""
    active = [d for d in devices if d["state"] == "active"]
    drift = Counter(d["drift"] for d in active)
    online = sum(d["online"] for d in active)
    return [
        Stat(len(active), "devices"),
        Stat(online, "online", "ok" if online else "none"),
        Stat(len(active) - online, "silent", "warn"),
        Stat(sum(d["update"]["state"] in _FAILED for d in active), "update failed", "bad"),
        Stat(drift["critical"], "drift critical", "bad"),
        Stat(drift["warning"], "drift warning", "warn"),
        Stat(sum(d["quarantined"] for d in active), "quarantined", "warn"),
        Stat(len(alarms), "open alarms", "bad", "/alarms"),
        Stat(dead, "dead letters", "warn"),
    ]


def device(session: Session, row: Device) -> Json:
    """Everything of a device's page."""
    detail = views.device_detail(session, row)
    return {
        "device": detail,
        "verdict": detail["verdict"] or {},
        "findings": findings((detail["verdict"] or {}).get("alarms") or []),
        "labels": labels(detail["verdict"] or {}),
        "windows": recent_windows(session, devices=[row.id]).get(row.id, []),
        "exposures": detail["exposures"][-MAX_EXPOSURES:],
        "alarms": [a for a in views.alarms(session) if a["device"] == row.id][:20],
        "rolled_back": rolled_back(session),
    }


def labels(verdict: Json) -> list[str]:
    """What labels say of a device's errors and residuals, in the words of `drift explain`."""
    try:
        errors = msgspec.convert(verdict.get("performance"), Performance | None)
        residuals = msgspec.convert(verdict.get("residuals") or (), tuple[ResidualShift, ...])
    except msgspec.ValidationError:  # of another release
        return []
    return told_by_labels(errors, residuals)


def findings(alarms: list[Json]) -> list[Json]:
    """A verdict's alarms with the lengths of window in which a feature shows the same joined; the confirmed first."""
    joined: dict[tuple[str, str, bool], Json] = {}
    for a in alarms:
        key = (str(a.get("name", "")), str(a.get("kind", "")), bool(a.get("confirmed")))
        found = joined.setdefault(key, {"name": key[0], "kind": key[1], "confirmed": key[2], "spans": [], "first": []})
        found["spans"].append(int(a.get("level_windows", 0)))
        found["first"].append(int(a.get("first_window", 0)))
    for found in joined.values():
        spans = sorted(set(found["spans"]))
        found["over"] = ", ".join(map(str, spans[:-1])) + (" and " if spans[1:] else "") + str(spans[-1])
        found["plural"] = spans != [1]
        found["first"] = min(found["first"])
    return sorted(joined.values(), key=lambda f: not f["confirmed"])


def rollout(session: Session, row: RolloutRow) -> Json:
    """A rollout with its waves laid out: names, gates, and the status of every device."""
    view = rollouts.view(session, row)
    specs = row.plan.get("wave_specs") or []
    over = row.status in r.TERMINAL_STATUSES
    done = rollouts.state_of(row).done
    waves = []
    for i, members in enumerate(view["waves"]):
        spec = specs[i] if i < len(specs) else {}
        states = {d: device_state(row.status, view["devices"].get(d, ""), done=d in done) for d in members}
        counted = Counter(states.values())
        last = i == len(view["waves"]) - 1
        waves.append(
            {
                "number": i + 1,
                "name": spec.get("name") or f"wave {i + 1}",
                "gated": bool(spec.get("gate", True)) and not last,
                "devices": states,
                "done": counted["done"],
                "total": len(members),
                "current": i + 1 == view["wave"] and not over,
            }
        )
    said = gate_sentence(view["gate"])
    return {
        **view,
        "waves": waves,
        # The decider's reason often is the gate's sentence: once is enough.
        "gate_sentence": "" if said and said in view["reason"] else said,
        "checks": gate_checks(view["gate"]),
    }


def device_state(rollout_status: str, status: str, *, done: bool) -> str:
    """What a device is to a rollout. Of one that is over, only what it was: devices have gone on since.

    Args:
        rollout_status: of the rollout.
        status: of the device as the decider sees it now; "" when it was never told.
        done: whether it was ever seen serving the version.
    """
    if rollout_status not in r.TERMINAL_STATUSES:
        return status or "waiting"
    if not status:
        return "never told"
    if rollout_status == "rolled-back":
        return "still serving" if status == "done" else "taken back"
    if done or status == "done":
        return "done"
    return status if status in ("failed", "timed-out", "offline") else "not done"


def rollout_page(session: Session, row: RolloutRow, now: int) -> Json:
    """Everything of a rollout's page."""
    members = [d for wave in row.plan["waves"] for d in wave]
    times = (row.created_at - _before(row), row.updated_at if row.status in r.TERMINAL_STATUSES else now)
    lanes = {d: f"{i + 1} · {d}" for i, wave in enumerate(row.plan["waves"]) for d in wave}
    lanes = dict(list(lanes.items())[:MAX_LANES])
    since = select(Exposure).where(Exposure.model == row.model)
    since = since.where((Exposure.ended_at.is_(None)) | (Exposure.ended_at >= times[0]))
    since = since.order_by(Exposure.began_at.desc())
    shown = since.where(Exposure.device.in_(list(lanes)), Exposure.began_at <= times[1]).limit(MAX_EXPOSURES)
    # Without an end: a device that was offline takes the version after the rollout is over.
    mine = since.where(Exposure.device.in_(members), Exposure.version == row.version)
    served = [views.exposure(e) for e in session.scalars(mine)]
    steps = select(UpdateStep).where(UpdateStep.rollout.in_([row.id, f"{row.id}-revert"]))
    return {
        "rollout": rollout(session, row),
        "windows": recent_windows(session, devices=members, model=row.model, between=times),
        "lanes": lanes,
        "exposures": [views.exposure(e) for e in session.scalars(shown)],
        "served": served[:MAX_SPANS],
        "spans": len(served),
        "devices_ever": len({e["device"] for e in served}),
        "times": times,
        "marks": _wave_marks(row),
        "steps": [_step(s) for s in session.scalars(steps.order_by(UpdateStep.at.desc()).limit(60))],
        "events": list(reversed(views.audit_events(session, 40, row.id))),
        "rolled_back": rolled_back(session),
    }


def model(session: Session, name: str) -> Json:
    """Everything of a model's page; `versions` is empty for a model nobody knows."""
    rows = list(
        session.scalars(select(ModelVersion).where(ModelVersion.model == name).order_by(ModelVersion.version.desc()))
    )
    runs = {x.id: views.run(x) for x in session.scalars(select(Run).where(Run.id.in_([v.run_id for v in rows])))}
    datasets = {d.digest: f"{d.name}@{d.version}" for d in session.scalars(select(DatasetVersion))}
    spans = select(Exposure).where(Exposure.model == name).order_by(Exposure.began_at.desc())
    exposures = [views.exposure(e) for e in session.scalars(spans.limit(MAX_EXPOSURES))]
    lanes = sorted({e["device"] for e in exposures}, key=figures.natural)[:MAX_LANES]
    ever = select(Exposure.version, func.count(), func.count(Exposure.device.distinct()))
    ever = ever.where(Exposure.model == name).group_by(Exposure.version)
    served = {version: (count, devices) for version, count, devices in session.execute(ever)}
    alone = select(Run).where(Run.model == name, Run.status != "finished").order_by(Run.started_at.desc()).limit(10)
    versions = []
    for row in rows:
        found = runs.get(row.run_id)
        versions.append(
            {
                **views.model_version(session, row),
                "run_detail": found,
                "dataset": datasets.get(found["dataset_digest"], "") if found else "",
                "numbers": metric_values(row.metrics) or metric_values(found["metrics"] if found else {}),
                "per_class": per_class(row.metrics) or per_class(found["metrics"] if found else {}),
                "exposures": [
                    views.exposure(e)
                    for e in session.scalars(spans.where(Exposure.version == row.version).limit(MAX_SPANS))
                ],
                "spans": served.get(row.version, (0, 0))[0],
                "devices_ever": served.get(row.version, (0, 0))[1],
            }
        )
    return {
        "model": name,
        "versions": versions,
        "exposures": [e for e in exposures if e["device"] in lanes],
        "unfinished": [views.run(x) for x in session.scalars(alone)],
        "rolled_back": rolled_back(session),
        "windows": recent_windows(session, model=name),
    }


def model_names(session: Session) -> list[str]:
    """Every registered model."""
    return list(session.scalars(select(ModelVersion.model).distinct().order_by(ModelVersion.model)))


def recent_windows(
    session: Session,
    *,
    devices: Iterable[str] | None = None,
    model: str = "",
    between: tuple[int, int] | None = None,
    limit: int = MAX_WINDOWS,
) -> dict[str, list[Json]]:
    """Per device its newest windows in order of time, in the shape of `views.window_series`; counts are not read."""
    columns = (
        WindowRow.device,
        WindowRow.closed_at,
        WindowRow.version,
        WindowRow.rows,
        WindowRow.shift,
        WindowRow.judged,
        WindowRow.level,
        WindowRow.labelled,
        WindowRow.errors,
    )
    query = select(*columns).order_by(WindowRow.closed_at.desc(), WindowRow.w.desc()).limit(limit)
    if devices is not None:
        query = query.where(WindowRow.device.in_(list(devices)))
    if model:
        query = query.where(WindowRow.model == model)
    if between is not None:
        query = query.where(WindowRow.closed_at.between(*between))
    out: dict[str, list[Json]] = {}
    for w in reversed(session.execute(query).all()):
        out.setdefault(w.device, []).append(
            {
                "at": w.closed_at,
                "version": w.version,
                "rows": w.rows,
                "psi": w.shift if w.judged else None,  # not "no drift": not looked at yet
                "level": w.level,
                "labelled": w.labelled,
                "errors": w.errors,
                "accuracy": 1 - w.errors / w.labelled if w.labelled else None,
            }
        )
    return out


def rolled_back(session: Session) -> set[tuple[str, int]]:
    """(model, version) pairs that a rollout took back."""
    query = select(RolloutRow.model, RolloutRow.version).where(RolloutRow.status.in_(["rolled-back", "rolling-back"]))
    return {(m, v) for m, v in session.execute(query)}


def gate_sentence(gate: Mapping[str, Any] | None) -> str:
    """The sentences of the checks that decided."""
    checks = gate_checks(gate)
    outcome = (gate or {}).get("outcome")
    return " ".join(c["sentence"] for c in checks if c["outcome"] == outcome) or (
        checks[0]["sentence"] if checks else ""
    )


def gate_checks(gate: Mapping[str, Any] | None) -> list[Json]:
    """The checks of a canary's verdict."""
    found = (gate or {}).get("checks") or []
    return [{"name": "", "outcome": "", "sentence": "", "numbers": {}, **c} for c in found if isinstance(c, Mapping)]


def metric_values(metrics: Mapping[str, Any]) -> Json:
    """The overall metrics, nested under "values" or flat."""
    values = metrics.get("values", metrics)
    if not isinstance(values, Mapping):
        return {}
    return {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool) and ":" not in k}


def per_class(metrics: Mapping[str, Any]) -> list[Json]:
    """Precision and recall by class."""
    found = metrics.get("per_class") or []
    empty = {"label": "", "precision": None, "recall": None, "f1": None, "support": None}
    return [{**empty, **c} for c in found if isinstance(c, Mapping)]


def primary(metrics: Mapping[str, Any]) -> tuple[str, float] | None:
    """The one metric a table shows."""
    values = metric_values(metrics)
    name = next((n for n in ("accuracy", "r2", *values) if n in values), None)
    return (name, float(values[name])) if name else None


def _before(row: RolloutRow) -> int:
    """How much of the time before a rollout its page shows: a fifth of its length, a minute to a day."""
    return int(min(86_400_000, max(60_000, (row.updated_at - row.created_at) // 5)))


def _wave_marks(row: RolloutRow) -> list[plots.Mark]:
    """When each wave was told, and when it ended."""
    state, marks = rollouts.state_of(row), []
    specs = row.plan.get("wave_specs") or []
    for i, members in enumerate(row.plan["waves"]):
        told = [state.assigned_at[d] for d in members if d in state.assigned_at]
        name = (specs[i].get("name") if i < len(specs) else "") or f"wave {i + 1}"
        if told:
            were = "device was" if len(told) == 1 else "devices were"
            marks.append(plots.Mark(int(min(told) * 1_000), f"{name}: {len(told)} {were} told"))
    if row.status in (*r.TERMINAL_STATUSES, "paused"):
        marks.append(plots.Mark(row.updated_at, f"{row.status}: {row.reason}" if row.reason else row.status))
    return sorted(marks, key=lambda m: m.at)


def _step(s: UpdateStep) -> Json:
    return {"at": s.at, "device": s.device, "rollout": s.rollout, "state": s.state, "code": s.code, "detail": s.detail}


def _ended(session: Session) -> list[Json]:
    query = select(RolloutRow).where(RolloutRow.status.in_(list(r.TERMINAL_STATUSES)))
    return [
        rollout(session, x) for x in session.scalars(query.order_by(RolloutRow.updated_at.desc()).limit(ENDED_ROLLOUTS))
    ]


def _of_rollouts(found: list[Json]) -> list[Attention]:
    out = []
    for x in found:
        if x["status"] == "paused":
            sentence = f"The rollout of {x['model']}@{x['version']} is paused. {x['reason']}"
            out.append(Attention("paused", sentence, f"/rollouts/{x['id']}", "resume", x["id"]))
        elif x["status"] == "rolling-back":
            sentence = f"{x['model']}@{x['version']} is being taken back. {x['reason']}"
            out.append(Attention("rolling-back", sentence, f"/rollouts/{x['id']}", "rollout", x["id"]))
    return out


def _of_alarms(found: list[Json]) -> list[Attention]:
    ordered = sorted(found, key=lambda a: (a["level"] != "critical", a["kind"] != "fleet", -a["opened_at"]))
    return [
        Attention(
            a["level"],
            a["sentence"],
            f"/devices/{a['device']}" if a["device"] else f"/models/{a['model']}",
            "device" if a["device"] else "",
            a["device"],
        )
        for a in ordered
    ]


def _of_devices(found: list[Json], now: int) -> list[Attention]:
    out = []
    for d in found:
        if d["state"] != "active":
            continue
        href = f"/devices/{d['id']}"
        if d["update"]["state"] in _FAILED:
            sentence = f"{d['id']} did not take its update: {d['update']['code']} {d['update']['detail']}".strip()
            out.append(Attention(d["update"]["state"], sentence, href, "device", d["id"]))
        if d["cloned_at"]:
            sentence = f"The identity of {d['id']} is in use twice: {d['clone']['why']}."
            out.append(Attention("cloned", sentence, href, "device", d["id"]))
        if not d["online"]:
            sentence = f"{d['id']} was last heard {words.ago(d['last_seen'], now)}."
            out.append(Attention("silent", sentence, href, "device", d["id"]))
        if words.soon(d["certificate_expires"], now, CERTIFICATE_DAYS):
            sentence = f"The certificate of {d['id']} ends {words.ago(d['certificate_expires'], now)}."
            out.append(Attention("warning", sentence, href, "device", d["id"]))
    return out


def _of_proposals(found: list[Json]) -> list[Attention]:
    return [
        Attention("proposed", f"Retrain {p['model']}? {p['reason']}", f"/models/{p['model']}", "retrain", p["id"])
        for p in found
        if p["status"] == "proposed"
    ]


def _of_runs(session: Session, found: list[Run]) -> list[Attention]:
    """Failed runs after which none of the same model succeeded."""
    out = []
    for run in found:
        later = select(func.count()).select_from(Run)
        later = later.where(Run.model == run.model, Run.status == "finished", Run.started_at > run.started_at)
        if not session.scalar(later):
            sentence = f"A run for {run.model} failed: {run.error_code} {run.error}"[:400]
            out.append(Attention("failed", sentence, f"/models/{run.model}"))
    return out
