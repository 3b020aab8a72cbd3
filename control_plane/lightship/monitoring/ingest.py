"""Monitoring: ingest, from an envelope to rows.

Rules:
* idempotent: a record is known by (device, epoch, seq); what was stored is skipped, what is ahead of a gap is left
  for the device to send again, and only what is stored is acknowledged;
* the device is the one the transport authenticated; nothing inside the message can change that;
* what can't be understood becomes a dead letter with a code; nothing else is lost because of it;
* a heartbeat's digest is the only truth about what runs.
"""

from __future__ import annotations

import math
import secrets
from typing import NamedTuple

import msgspec
import numpy as np
from sqlalchemy import select
from sqlalchemy.exc import DataError as DbDataError
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from lightship.storage.models import (
    DeadLetter,
    Device,
    DeviceEpoch,
    Exposure,
    FeedbackRow,
    PendingLabels,
    UpdateStep,
    WindowRow,
)
from lightship_agent.contract.codes import WireError
from lightship_agent.contract.messages import (
    AnyRecord,
    Envelope,
    Heartbeat,
    LabelledRows,
    Labels,
    Running,
    State,
    Update,
    Window,
)
from lightship_agent.contract.wire import decode, encode, unpack

MAX_DEAD_PAYLOAD = 4_096


class Gap(NamedTuple):
    """Reports that came before those they follow: what is wanted is `first` of `epoch`, and all after it."""

    epoch: str
    first: int


class Receipt(NamedTuple):
    """What became of a message: the code of its dead letter, or ""; and the gap it showed, if any."""

    code: str = ""
    gap: Gap | None = None


def receive(session: Session, device_id: str, kind: str, payload: bytes, now: int) -> Receipt:
    """Store one message of an authenticated device.

    Args:
        session: a write session.
        device_id: whom the transport authenticated.
        kind: "state", "tele" or "event".
        payload: the message body.
        now: wall-clock milliseconds of the server.
    """
    device = session.get(Device, device_id)
    if device is not None and device.state == "pending":
        return Receipt("enrol.pending")  # it keeps what it reports, and says it again once it is let in
    if device is None or device.state != "active":
        return _bury(session, f"{device_id}/{kind}", payload, now, WireError("wire.malformed", "Not an active device."))
    gap = None
    try:
        # All of a message or nothing, and never the end of the batch it came with.
        with session.begin_nested():
            if kind == "state":
                _store_state(device, decode(payload, State, max_bytes=1_024))
            else:
                gap = store_envelope(session, device, unpack(payload, Envelope), now)
    except WireError as e:
        return _bury(session, f"{device_id}/{kind}", payload, now, e)
    except (ArithmeticError, ValueError, IntegrityError, DbDataError) as e:
        # Well-formed, and yet more than a column can hold.
        error = WireError("wire.malformed", f"The message can't be stored: {type(e).__name__}: {str(e)[:300]}")
        return _bury(session, f"{device_id}/{kind}", payload, now, error)
    return Receipt(gap=gap)


def store_envelope(session: Session, device: Device, envelope: Envelope, now: int) -> Gap | None:
    """Store an envelope's records in order, each once; the gap before those that could not be stored yet."""
    cursor = session.get(DeviceEpoch, (device.id, envelope.e))
    if cursor is None:
        cursor = DeviceEpoch(device=device.id, epoch=envelope.e, next_seq=1, lost=0, updated_at=now)
        session.add(cursor)
    if envelope.lo > cursor.next_seq:
        # The device's ring was full and dropped these: nobody can bring them back.
        cursor.lost += envelope.lo - cursor.next_seq
        cursor.next_seq = envelope.lo
    device.last_seen = max(device.last_seen, now)
    gap = None
    for record in envelope.r:
        if record.s > cursor.next_seq:
            gap = Gap(envelope.e, cursor.next_seq)
            break
        if record.s == cursor.next_seq:
            _store_record(session, device, envelope.e, record, now)
            cursor.next_seq += 1
    cursor.updated_at = now
    session.flush()
    return gap


def acknowledged(session: Session, device_id: str) -> str:
    """`<epoch>:<seq>`: how far the newest epoch of a device is stored; "" if nothing is."""
    newest = session.scalars(
        select(DeviceEpoch).where(DeviceEpoch.device == device_id).order_by(DeviceEpoch.updated_at.desc()).limit(1)
    ).first()
    return f"{newest.epoch}:{newest.next_seq - 1}" if newest else ""


def _store_record(session: Session, device: Device, epoch: str, record: AnyRecord, now: int) -> None:
    match record:
        case Heartbeat():
            _store_heartbeat(session, device, record)
        case Window():
            _store_window(session, device, record)
        case Labels():
            _store_labels(session, device, record)
        case Update():
            _store_update(session, device, epoch, record)
        case LabelledRows():
            _store_rows(session, device, record, now)


def _store_state(device: Device, state: State) -> None:
    # A will that was written before the present boot says nothing about it.
    if state.n >= device.boot:
        device.boot, device.online = state.n, state.on


def _store_heartbeat(session: Session, device: Device, beat: Heartbeat) -> None:
    # Not a number is not JSON: a device whose reading failed must not break the pages of all.
    latencies = [r.latency_ms if math.isfinite(r.latency_ms) else 0.0 for r in beat.running]
    device.running = [
        {**msgspec.to_builtins(r), "latency_ms": ms} for r, ms in zip(beat.running, latencies, strict=True)
    ]
    first = beat.running[0] if beat.running else None
    device.running_model = first.model if first else ""
    device.running_version = first.version if first else 0
    device.running_digest = first.digest if first else ""
    device.phase, device.assignment_seq = beat.update_state, beat.assignment_seq
    device.agent, device.onnxruntime, device.machine = beat.agent, beat.onnxruntime, beat.machine
    device.health, device.degraded = {k: v for k, v in beat.health.items() if math.isfinite(v)}, list(beat.degraded)
    _store_exposures(session, device.id, beat.running, beat.t)


def _store_exposures(session: Session, device: str, running: tuple[Running, ...], at: int) -> None:
    spans = session.scalars(select(Exposure).where(Exposure.device == device, Exposure.ended_at.is_(None)))
    open_spans = {(e.digest, e.began_at): e for e in spans}
    for r in running:
        span = open_spans.pop((r.digest, r.since), None)
        if span is None:
            key = (device, r.digest, r.since)
            span = session.get(Exposure, key)
            if span is None:
                span = Exposure(device=device, digest=r.digest, began_at=r.since, model=r.model, version=r.version)
                session.add(span)
            span.ended_at = None
        span.requests, span.failures = r.requests, r.failures
    for (_, began), span in open_spans.items():
        successor = min((r.since for r in running if r.model == span.model), default=at)
        span.ended_at = max(began, successor)


def _store_window(session: Session, device: Device, window: Window) -> None:
    key = (device.id, window.digest, window.w)
    if session.get(WindowRow, key) is not None:
        return
    pending = session.get(PendingLabels, key)
    session.add(
        WindowRow(
            device=device.id,
            digest=window.digest,
            w=window.w,
            model=window.model,
            version=window.version,
            opened_at=window.opened,
            closed_at=window.t,
            rows=window.rows,
            invalid=window.invalid,
            counts=encode(window.counts),
            predictions=list(window.predictions),
            scores=encode(window.scores),
            labelled=pending.labelled if pending else 0,
            errors=pending.errors if pending else 0,
        )
    )
    if pending is not None:
        session.delete(pending)


def _store_labels(session: Session, device: Device, labels: Labels) -> None:
    key = (device.id, labels.digest, labels.w)
    row = session.get(WindowRow, key) or session.get(PendingLabels, key)
    if row is None:
        row = PendingLabels(device=device.id, digest=labels.digest, w=labels.w, labelled=0, errors=0)
        session.add(row)
    row.labelled += labels.labelled
    row.errors += min(labels.errors, labels.labelled)


def _store_update(session: Session, device: Device, epoch: str, update: Update) -> None:
    device.update_state, device.update_code, device.update_detail = update.state, update.code, update.detail
    session.add(
        UpdateStep(
            device=device.id,
            epoch=epoch,
            s=update.s,
            at=update.t,
            rollout=update.rollout,
            seq=update.seq,
            digest=update.digest,
            state=update.state,
            code=update.code,
            detail=update.detail,
        )
    )


def _store_rows(session: Session, device: Device, shared: LabelledRows, now: int) -> None:
    for x, y in zip(shared.x, shared.y, strict=False):
        values = np.array([np.nan if v is None else v for v in x], dtype="<f4")
        row = FeedbackRow(device=device.id, model=shared.model, digest=shared.digest, at=now, x=values.tobytes(), y=y)
        session.add(row)


def _bury(session: Session, topic: str, payload: bytes, now: int, e: WireError) -> Receipt:
    session.add(
        DeadLetter(
            id=secrets.token_hex(8), at=now, topic=topic, code=e.code, detail=str(e), payload=payload[:MAX_DEAD_PAYLOAD]
        )
    )
    return Receipt(e.code)
