"""Monitoring: the shell around the deciders. It reads windows, has them judged, and writes what follows.

Rules:
* every window of a device's present bundle is judged once, in the order of its number, and the round of all
  devices' next windows is decided together, so that the outcome does not depend on when this runs;
* what the decider wants is carried out in the same transaction that remembers its state.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from lightship.storage import audit
from lightship.storage.models import Alarm, Device, PolicyRow, RetrainProposal, WindowRow
from lightship_agent.contract.bundle import Bundle
from lightship_agent.contract.messages import Counts
from lightship_agent.contract.profile import WindowCounts
from lightship_agent.contract.wire import decode

from . import policy as p
from .drift import DriftSettings, Verdict, judge_stream, shift_table
from .fleet import judge_fleet

ACTOR = "lightship:monitoring"
BundleOf = Callable[[str], Bundle]


@dataclass(frozen=True)
class Watch:
    """What monitoring needs besides the database."""

    bundle_of: BundleOf  # digest -> bundle
    drift: DriftSettings
    policy: p.PolicySettings


def watch_model(session: Session, watch: Watch, model: str, now: int) -> int:
    """Judge what has come for `model` since the last time; the number of windows judged.

    Args:
        session: a write session.
        watch: settings, and where bundles are found.
        model: the registered model's name.
        now: wall-clock milliseconds.
    """
    devices = list(session.scalars(select(Device).where(Device.running_model == model, Device.state == "active")))
    row = session.get(PolicyRow, model)
    state = msgspec.msgpack.decode(row.state, type=p.PolicyState) if row else p.PolicyState()
    judged = 0
    for verdicts in _rounds(session, watch, devices):
        judged += len(verdicts)
        for device in devices:
            if device.id in verdicts:
                _remember(device, verdicts[device.id])
        latest = {d: _verdict(d) for d in devices if d.verdict}
        fleet = judge_fleet({d.id: v for d, v in latest.items()}, watch.drift)
        keyed = {p.StreamKey(d.id, d.running_digest): v for d, v in latest.items()}
        state, actions = p.decide(state, keyed, fleet, model=model, now=now / 1_000, settings=watch.policy)
        for action in actions:
            _carry_out(session, action, model, now)
    if judged:
        if row is None:
            row = PolicyRow(model=model, state=b"")
            session.add(row)
        row.state = msgspec.msgpack.encode(state)
    return judged


def window_counts(row: WindowRow) -> WindowCounts:
    """The counts of a stored window."""
    return WindowCounts(
        rows=row.rows,
        counts=decode(row.counts, Counts),
        predictions=tuple(row.predictions),
        scores=decode(row.scores, Counts),
        labelled=row.labelled,
        errors=row.errors,
    )


def _rounds(session: Session, watch: Watch, devices: list[Device]) -> Iterator[dict[str, Verdict]]:
    """Verdicts of each device's next unjudged window, round by round until none is left."""
    queues = {d.id: list(_unjudged(session, watch, d)) for d in devices}
    for device in devices:
        # A verdict about another bundle says nothing about this one.
        if device.verdict and device.verdict.get("digest") != device.running_digest:
            device.verdict, device.drift_level = {}, ""
    while any(queues.values()):
        yield {device: queue.pop(0) for device, queue in queues.items() if queue}


def _unjudged(session: Session, watch: Watch, device: Device) -> Iterator[Verdict]:
    query = select(WindowRow).where(WindowRow.device == device.id, WindowRow.digest == device.running_digest)
    rows = list(session.scalars(query.order_by(WindowRow.w)))
    if all(r.judged for r in rows):
        return
    bundle = watch.bundle_of(device.running_digest)
    importances = bundle.manifest.importances
    for i, row in enumerate(rows):
        if row.judged:
            continue
        first = max(0, i + 1 - watch.drift.history)
        counts = [window_counts(r) for r in rows[first : i + 1]]
        verdict = judge_stream(bundle.profile, counts, first, watch.drift, importances)
        table = shift_table(bundle.profile, counts[-1], watch.drift, importances)
        features = [s.psi for s in table if s.kind == "feature" and np.isfinite(s.psi)]
        row.judged, row.level, row.shift = True, verdict.level, float(max(features, default=0.0))
        yield verdict


def _remember(device: Device, verdict: Verdict) -> None:
    device.verdict = {"digest": device.running_digest, "verdict": msgspec.to_builtins(verdict)}
    device.drift_level = verdict.level


def _verdict(device: Device) -> Verdict:
    return msgspec.convert(device.verdict["verdict"], Verdict)


def _carry_out(session: Session, action: p.Action, model: str, now: int) -> None:
    match action:
        case p.OpenAlarm():
            _open(session, action.key, model, now, level=action.severity, names=action.names)
        case p.ConfirmAlarm():
            _confirm(session, action, now)
        case p.CloseAlarm():
            _close(session, action.key, now, action.reason)
        case p.Quarantine():
            _set_quarantine(session, action.key.device, quarantined=True, reason=action.reason)
        case p.ReleaseQuarantine():
            _set_quarantine(session, action.key.device, quarantined=False, reason=action.reason)
        case p.FleetAlarm():
            evidence = {"devices": list(action.devices), "names": list(action.names)}
            _insert(
                session,
                kind="fleet",
                model=model,
                level="critical",
                now=now,
                sentence=action.sentence,
                evidence=evidence,
            )
        case p.ProposeRetrain():
            _propose(session, action, model, now)


def _open(session: Session, key: p.StreamKey, model: str, now: int, *, level: str, names: tuple[str, ...]) -> None:
    device = session.get(Device, key.device)
    evidence = dict(device.verdict.get("verdict", {})) if device is not None else {}
    sentence = f"{key.device} drifts in {', '.join(names[:5])}{' …' if len(names) > 5 else ''}."
    _insert(session, kind="local", model=model, level=level, now=now, sentence=sentence, evidence=evidence, key=key)


def _insert(
    session: Session,
    *,
    kind: str,
    model: str,
    level: str,
    now: int,
    sentence: str,
    evidence: Mapping[str, object],
    key: p.StreamKey | None = None,
) -> None:
    alarm = Alarm(
        id=secrets.token_hex(6),
        kind=kind,
        model=model,
        digest=key.digest if key else "",
        device=key.device if key else "",
        level=level,
        sentence=sentence,
        evidence=dict(evidence),
        opened_at=now,
    )
    session.add(alarm)
    detail = {"kind": kind, "model": model, "device": alarm.device, "level": level, "sentence": sentence}
    audit.append(session, actor=ACTOR, verb="alarm.open", subject=alarm.id, detail=detail)


def _confirm(session: Session, action: p.ConfirmAlarm, now: int) -> None:
    for alarm in _open_alarms(session, action.key):
        alarm.level = "critical"
        device = session.get(Device, action.key.device)
        if device is not None:
            alarm.evidence = dict(device.verdict.get("verdict", {}))
        detail = {"device": alarm.device, "at": now}
        audit.append(session, actor=ACTOR, verb="alarm.confirm", subject=alarm.id, detail=detail)


def _close(session: Session, key: p.StreamKey, now: int, reason: str) -> None:
    for alarm in _open_alarms(session, key):
        alarm.closed_at = now
        audit.append(session, actor=ACTOR, verb="alarm.close", subject=alarm.id, detail={"reason": reason})


def _open_alarms(session: Session, key: p.StreamKey) -> list[Alarm]:
    query = select(Alarm).where(Alarm.device == key.device, Alarm.digest == key.digest, Alarm.closed_at.is_(None))
    return list(session.scalars(query))


def _set_quarantine(session: Session, device_id: str, *, quarantined: bool, reason: str) -> None:
    device = session.get(Device, device_id)
    if device is None or device.quarantined == quarantined:
        return
    device.quarantined = quarantined
    verb = "device.quarantine" if quarantined else "device.release-quarantine"
    audit.append(session, actor=ACTOR, verb=verb, subject=device_id, detail={"reason": reason})


def _propose(session: Session, action: p.ProposeRetrain, model: str, now: int) -> None:
    busy = select(RetrainProposal).where(
        RetrainProposal.model == model, RetrainProposal.status.in_(["proposed", "running"])
    )
    if session.scalars(busy).first() is not None:
        return
    proposal = RetrainProposal(
        id=secrets.token_hex(6),
        model=model,
        status="proposed",
        reason=action.reason,
        excluded=list(action.excluded),
        since=now,
        created_at=now,
        updated_at=now,
    )
    session.add(proposal)
    detail = {"reason": action.reason, "excluded": list(action.excluded)}
    audit.append(session, actor=ACTOR, verb="retrain.propose", subject=proposal.id, detail=detail)
