"""Monitoring: the shell around the deciders. It reads windows, has them judged, and writes what follows.

Rules:
* every window of a device's present bundle is judged once, in the order of its number, and the round of all
  devices' next windows is decided together, so that the outcome does not depend on when this runs;
* judging reads; what the decider wants is then written in the one short transaction that remembers its state.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import msgspec
import numpy as np
from sqlalchemy import func, null, select
from sqlalchemy.orm import Session

from lightship.storage import audit
from lightship.storage.database import Database
from lightship.storage.models import Alarm, Device, PolicyRow, RetrainProposal, StreamMemory, WindowRow
from lightship_agent.contract.bundle import Bundle
from lightship_agent.contract.codes import LightshipError
from lightship_agent.contract.moments import merge_moments
from lightship_agent.contract.profile import WindowCounts, empty_counts, only_fitting

from . import memory as memories
from . import policy as p
from . import tallies
from .drift import shift_table, watch_stream
from .drift_settings import DriftSettings
from .fleet import judge_fleet
from .ingest import FUTURE_MS
from .joint import Together
from .memory import Memory
from .performance import Labelled
from .season import hours_of
from .segments import SegmentAlarm, SegmentWell, follow, judge_company, judge_segments, with_segments
from .stored import content, late_residuals, products
from .verdict import Verdict
from .window_tallies import tally_window, told_apart

log = logging.getLogger(__name__)
ACTOR = "lightship:monitoring"
#: Of a backlog, so many windows of each device are judged before their verdicts are written.
AT_ONCE: Final = 8
#: Windows in a stretch of products, at most.
_LONGEST: Final = 64
BundleOf = Callable[[str], Bundle]
#: Session, model, digest, reason.
TakeBack = Callable[[Session, str, str, str], None]


@dataclass(frozen=True)
class Watch:
    """What monitoring needs besides the database."""

    bundle_of: BundleOf  # digest -> bundle
    drift: DriftSettings
    policy: p.PolicySettings
    take_back: TakeBack | None = None  # ends the rollout of a bundle, where one is under way


@dataclass(frozen=True)
class Judged:
    """A window of a device, and what was made of it."""

    device: str
    digest: str
    w: int
    verdict: Verdict
    shift: float  # the largest debiased PSI of a feature in this window alone
    memory: Memory  # of the stream, with this window in it
    psi: Mapping[str, float]  # of the features that the counters tell apart


def watch_model(database: Database, watch: Watch, model: str) -> int:
    """Judge what has come for `model` since the last time; the number of windows judged.

    Judging takes time and happens outside any write transaction, so that nobody waits for it. A backlog is judged in
    parts, each written before the next is begun: a machine too slow for its fleet is late, but not silent.
    """
    with database.read() as session:
        waiting = _waiting(session, model)
    done = 0
    while done < waiting:  # what comes meanwhile is for the next look; others wait as well
        with database.read() as session:
            rounds = _judge(session, watch, model)
        if not rounds:
            break
        with database.write() as session:
            _apply(session, watch, model, rounds, audit.now_ms())
        done += sum(len(r) for r in rounds)
    return done


def _waiting(session: Session, model: str) -> int:
    """How many windows have come that are not judged."""
    query = select(func.count()).select_from(WindowRow).join(Device, Device.id == WindowRow.device)
    query = query.where(Device.running_model == model, Device.state == "active", WindowRow.judged.is_(False))
    return session.scalar(query.where(WindowRow.digest == Device.running_digest)) or 0


def _judge(session: Session, watch: Watch, model: str) -> list[list[Judged]]:
    """Verdicts round by round: the first unjudged window of every device, then the second … up to `AT_ONCE`."""
    devices = session.scalars(select(Device).where(Device.running_model == model, Device.state == "active"))
    queues = [_queue(session, watch, d) for d in devices]
    longest = max((len(q) for q in queues), default=0)
    return [[q[i] for q in queues if i < len(q)] for i in range(longest)]


def _queue(session: Session, watch: Watch, device: Device) -> list[Judged]:
    """What is new of a device. One that claims a bundle we never made is left out, and stops nobody else."""
    try:
        return list(islice(_unjudged(session, watch, device), AT_ONCE))
    except LightshipError as e:
        log.warning("monitoring of %s: %s: %s", device.id, e.code, e)
        return []


def _apply(session: Session, watch: Watch, model: str, rounds: list[list[Judged]], now: int) -> None:
    """Write the verdicts and what the policy makes of them."""
    devices = {
        d.id: d for d in session.scalars(select(Device).where(Device.running_model == model, Device.state == "active"))
    }
    row = session.get(PolicyRow, model)
    state = msgspec.msgpack.decode(row.state, type=p.PolicyState) if row else p.PolicyState()
    last = {(j.device, j.digest): j.memory for judged in rounds for j in judged}
    for (device, digest), memory in last.items():
        session.merge(StreamMemory(device=device, digest=digest, w=memory.window, state=memories.pack(memory)))
    for judged in rounds:
        for j in judged:
            _remember(session, devices.get(j.device), j)
        # A verdict about another bundle says nothing about the one that runs.
        latest = {d: _verdict(d) for d in devices.values() if d.verdict.get("digest") == d.running_digest}
        if not latest:
            continue
        # Devices are compared on the bundle that most of them serve: another profile counts other things.
        common = Counter(d.running_digest for d in latest).most_common(1)[0][0]
        comparable = {d.id: v for d, v in latest.items() if d.running_digest == common}
        parts = judge_segments(comparable, {d.id: d.labels for d in latest}, watch.drift)
        fleet = with_segments(judge_fleet(comparable, watch.drift), parts)
        keyed = {p.StreamKey(d.id, d.running_digest): v for d, v in latest.items()}
        state, actions = p.decide(state, keyed, fleet, model=model, now=now / 1_000, settings=watch.policy)
        for action in actions:
            _carry_out(session, watch, action, model, now)
        looked = {d: v.window for d, v in comparable.items()}
        company = judge_company(comparable, parts, fleet, watch.drift)
        segments, found = follow(state.segments, (*parts, *company), looked, fleet, watch.policy.recovery)
        state = msgspec.structs.replace(state, segments=segments)
        for change in found:
            _segment(session, change, model, now)
        if state.fleet is None:
            _close_fleet_alarms(session, model, now)
    if row is None:
        row = PolicyRow(model=model, state=b"")
        session.add(row)
    row.state = msgspec.msgpack.encode(state)
    tallies.add(session, tallies.counted(session), now)


def window_counts(row: WindowRow) -> WindowCounts:
    """The counts of a stored window."""
    return content(row)


def _unjudged(session: Session, watch: Watch, device: Device) -> Iterator[Judged]:
    mine = select(WindowRow).where(WindowRow.device == device.id, WindowRow.digest == device.running_digest)
    first_new = session.scalar(
        select(func.min(WindowRow.w)).where(
            WindowRow.device == device.id, WindowRow.digest == device.running_digest, WindowRow.judged.is_(False)
        )
    )
    if first_new is None:
        return
    begins = first_new + 1 - watch.drift.history
    rows = {r.w: r for r in session.scalars(mine.where(WindowRow.w >= begins).order_by(WindowRow.w))}
    bundle = watch.bundle_of(device.running_digest)
    importances = bundle.manifest.importances
    nothing = empty_counts(bundle.profile)
    counts = {w: fitting(only_fitting(window_counts(r), bundle.profile), nothing) for w, r in rows.items()}
    memory = recall(session, device.id, device.running_digest)
    labels = _labels(session, device, residuals=bundle.profile.residuals is not None)
    key = f"{device.id} {device.running_digest}"
    latest = audit.now_ms() + FUTURE_MS
    for w, row in rows.items():
        if row.judged:
            continue
        # A window that was lost on the way is an empty one, so that the blocks of the ladder stay aligned.
        first = max(min(rows), w + 1 - watch.drift.history)
        recent = [counts.get(n, nothing) for n in range(first, w + 1)]
        told = [label for label in labels if label.window <= w]
        opened = [rows[n].opened_at if n in rows else None for n in range(first, w + 1)]
        when = hours_of(opened, latest)
        stretches = _together(rows, counts, w)
        verdict, memory = watch_stream(
            bundle.profile, recent, first, watch.drift, memory, key, importances, told, when, stretches
        )
        table = shift_table(bundle.profile, counts[w], watch.drift, importances)
        features = {s.name: s.psi for s in table if s.kind == "feature" and np.isfinite(s.psi)}
        largest = float(max(features.values(), default=0.0))
        psi = told_apart(features, importances)
        yield Judged(device.id, device.running_digest, w, verdict, largest, memory, psi)


def _together(rows: Mapping[int, WindowRow], counts: Mapping[int, WindowCounts], w: int) -> list[Together]:
    """The stretches up to window `w` whose products have come, where no window of them was lost."""
    found = []
    for n, row in rows.items():
        told = products(row) if n <= w else None
        if told is None:
            continue
        moments = [counts[i].moments for i in range(max(told.first, n - _LONGEST), n + 1) if i in counts]
        known = [m for m in moments if m is not None]
        if known and len(known) == n + 1 - told.first:
            found.append(Together(told.first, n, told.products, merge_moments(known)))
    return found


def _labels(session: Session, device: Device, *, residuals: bool) -> list[Labelled]:
    """What labels have said of a device's present bundle, window by window; `residuals`: of a regressor's, too."""
    # The rest of a window is a kilobyte, and of a classifier it says nothing of labels.
    more = WindowRow.more if residuals else null()
    query = select(WindowRow.w, WindowRow.labelled, WindowRow.errors, more).where(
        WindowRow.device == device.id, WindowRow.digest == device.running_digest, WindowRow.labelled > 0
    )
    found = session.execute(query.order_by(WindowRow.w))
    return [Labelled(w, n, errors, *late_residuals(rest or b"")) for w, n, errors, rest in found]


def recall(session: Session, device: str, digest: str) -> Memory | None:
    """What is remembered of a device's stream; what can't be read is forgotten, and learnt again."""
    row = session.get(StreamMemory, (device, digest))
    if row is None:
        return None
    try:
        return memories.unpack(row.state)
    except LightshipError as e:
        log.warning("monitoring of %s: %s: %s", device, e.code, e)
        return None


def fitting(counts: WindowCounts, empty: WindowCounts) -> WindowCounts:
    """The counts, or none where their layout is not the profile's: then the device counted something else."""
    layouts = [tuple(map(len, (c.counts, c.predictions, c.scores))) for c in (counts, empty)]
    return counts if layouts[0] == layouts[1] else empty


def _remember(session: Session, device: Device | None, judged: Judged) -> None:
    row = session.get(WindowRow, (judged.device, judged.digest, judged.w))
    if row is not None:
        row.judged, row.level, row.shift = True, judged.verdict.level, judged.shift
        tally_window(session, row, device.group if device is not None else "", judged.psi)
    if device is not None:
        device.verdict = {"digest": judged.digest, "verdict": msgspec.to_builtins(judged.verdict)}
        device.drift_level = judged.verdict.level


def _verdict(device: Device) -> Verdict:
    return msgspec.convert(device.verdict["verdict"], Verdict)


def _carry_out(session: Session, watch: Watch, action: p.Action, model: str, now: int) -> None:
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
            insert_alarm(
                session,
                kind="fleet",
                model=model,
                level="critical",
                now=now,
                sentence=action.sentence,
                evidence=evidence,
            )
        case p.ProposeRetrain():
            propose(session, action, model, now)
        case p.RollBack():
            if watch.take_back is not None:
                watch.take_back(session, model, action.digest, action.reason)


def _open(session: Session, key: p.StreamKey, model: str, now: int, *, level: str, names: tuple[str, ...]) -> None:
    device = session.get(Device, key.device)
    evidence = dict(device.verdict.get("verdict", {})) if device is not None else {}
    sentence = _sentence(key.device, names, evidence)
    insert_alarm(
        session, kind="local", model=model, level=level, now=now, sentence=sentence, evidence=evidence, key=key
    )


def _sentence(device: str, names: tuple[str, ...], evidence: Mapping[str, Any]) -> str:
    """Who drifts in what; the streams to look at first come first."""
    ranked = [s["name"] for s in evidence.get("evidence", []) if s["name"] in names]
    ordered = [*ranked, *(n for n in names if n not in ranked)]
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return f"{device} drifts in {', '.join(ordered[:3])}{more}."


def insert_alarm(
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
    """Open an alarm, and write it into the audit log."""
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
            alarm.sentence = _sentence(alarm.device, action.names, alarm.evidence)
        detail = {"device": alarm.device, "at": now}
        audit.append(session, actor=ACTOR, verb="alarm.confirm", subject=alarm.id, detail=detail)


def _close(session: Session, key: p.StreamKey, now: int, reason: str) -> None:
    for alarm in _open_alarms(session, key):
        alarm.closed_at = now
        audit.append(session, actor=ACTOR, verb="alarm.close", subject=alarm.id, detail={"reason": reason})


def _close_fleet_alarms(session: Session, model: str, now: int) -> None:
    query = select(Alarm).where(Alarm.kind == "fleet", Alarm.model == model, Alarm.closed_at.is_(None))
    for alarm in session.scalars(query):
        alarm.closed_at = now
        audit.append(session, actor=ACTOR, verb="alarm.close", subject=alarm.id, detail={"reason": "the fleet is well"})


def _segment(session: Session, change: SegmentAlarm | SegmentWell, model: str, now: int) -> None:
    """Open or close the alarm of a segment."""
    if isinstance(change, SegmentAlarm):
        f = change.found
        evidence = {"segment": f.name, "devices": list(f.devices), "names": list(f.shared), "p_value": f.p_value}
        insert_alarm(
            session, kind="segment", model=model, level="critical", now=now, sentence=f.sentence, evidence=evidence
        )
        return
    query = select(Alarm).where(Alarm.kind == "segment", Alarm.model == model, Alarm.closed_at.is_(None))
    for alarm in session.scalars(query):
        if alarm.evidence.get("segment") == change.name:
            alarm.closed_at = now
            detail = {"reason": f"{change.name} is well again"}
            audit.append(session, actor=ACTOR, verb="alarm.close", subject=alarm.id, detail=detail)


def _open_alarms(session: Session, key: p.StreamKey) -> list[Alarm]:
    query = select(Alarm).where(
        Alarm.device == key.device, Alarm.digest == key.digest, Alarm.kind == "local", Alarm.closed_at.is_(None)
    )
    return list(session.scalars(query))


def _set_quarantine(session: Session, device_id: str, *, quarantined: bool, reason: str) -> None:
    device = session.get(Device, device_id)
    if device is None or device.quarantined == quarantined:
        return
    device.quarantined = quarantined
    verb = "device.quarantine" if quarantined else "device.release-quarantine"
    audit.append(session, actor=ACTOR, verb=verb, subject=device_id, detail={"reason": reason})


def propose(session: Session, action: p.ProposeRetrain, model: str, now: int) -> None:
    """Propose a retrain, where none is proposed or under way."""
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
