"""Monitoring: ingest, from envelopes to rows.

Rules:
* idempotent: a record is known by (device, epoch, seq), and stored once, whatever comes twice or out of order;
* what a device is (its heartbeats) is believed as soon as it is newer; everything else is taken into account in the
  order in which the device wrote it: what came ahead of a gap is held until the gap is filled or given up;
* only what is stored is acknowledged, and only as far as nothing is missing;
* the device is the one the transport authenticated; nothing inside the message can change that;
* what can't be understood becomes a dead letter with a code; nothing else is lost because of it;
* a heartbeat's digest is the only truth about what runs.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from sqlalchemy import select
from sqlalchemy.exc import DataError as DbDataError
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session

from lightship.storage import audit
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
from lightship_agent.contract.codes import StorageError, WireError
from lightship_agent.contract.messages import (
    BESIDE_STEPS,
    Agreement,
    AnyRecord,
    Application,
    Envelope,
    Fault,
    Heartbeat,
    LabelledRows,
    Labels,
    Reply,
    Running,
    State,
    Together,
    Update,
    Window,
)
from lightship_agent.contract.wire import decode, unpack

from . import tallies
from .agreement import store_agreement
from .cursors import Span
from .dead_letters import make_room
from .faults import note_fault
from .stored import add_labels, add_products, window_row

log = logging.getLogger(__name__)

MAX_DEAD_PAYLOAD = 4_096
#: How far ahead of ours a device's clock may be.
FUTURE_MS = 5 * 60_000
#: What a column of the database holds.
_LARGEST = 2**63 - 1
_DAY_MS = 86_400_000
#: What a message may do to the database that is the message's own fault.
_ITS_FAULT = (ArithmeticError, ValueError, IntegrityError, DbDataError)


class Incoming(NamedTuple):
    """A message of an authenticated device: "state", "tele", "event" or "rsp"; the tenant as its topic says, if any."""

    device: str
    kind: str
    payload: bytes
    tenant: str = ""


class Gap(NamedTuple):
    """Reports of an epoch that are missing between those that are stored, the oldest first."""

    epoch: str
    ranges: tuple[Span, ...]


class Receipt(NamedTuple):
    """What became of a message: the code of its dead letter, or ""; and what its epoch misses, if anything."""

    code: str = ""
    gap: Gap | None = None


class Acks(NamedTuple):
    """How far a device's reports are stored, as `<epoch>:<seq>`: of the epoch heard last, and of its others."""

    newest: str
    others: str


def receive(session: Session, device_id: str, kind: str, payload: bytes, now: int) -> Receipt:
    """Store one message of an authenticated device.

    Args:
        session: a write session.
        device_id: whom the transport authenticated.
        kind: "state", "tele" or "event".
        payload: the message body.
        now: wall-clock milliseconds of the server.
    """
    return receive_all(session, [Incoming(device_id, kind, payload)], now)[0]


def receive_all(session: Session, incoming: Sequence[Incoming], now: int) -> list[Receipt]:
    """Store messages in the order in which they came; what became of each."""
    return store_all(session, [(message, understand(message)) for message in incoming], now)


def understand(message: Incoming) -> State | Envelope | Reply | WireError:
    """What a message says, or why it can't be understood."""
    try:
        if message.kind == "state":
            return decode(message.payload, State, max_bytes=1_024)
        if message.kind == "rsp":
            return unpack(message.payload, Reply)
        envelope = unpack(message.payload, Envelope)
    except WireError as e:
        return e
    for record in envelope.r:
        if not _fits(record):
            return WireError("wire.malformed", "The message can't be stored: a number is larger than a column holds.")
    return envelope


Understood = tuple[Incoming, State | Envelope | Reply | WireError]


def store_all(session: Session, messages: Sequence[Understood], now: int) -> list[Receipt]:
    """Store what was understood, in its order, and bury the rest. All of a message is stored, or nothing of it."""
    receipts = _store_all(session, messages, now)
    if any(receipt.code for receipt in receipts):
        make_room(session)
    return receipts


def _store_all(session: Session, messages: Sequence[Understood], now: int) -> list[Receipt]:
    from .batch import Batch

    counted = dict(tallies.counted(session))
    try:
        with session.begin_nested():
            return Batch(session, now).store(messages)
    except Exception as e:
        if not _is_its_fault(e):
            raise
        session.info[tallies.KEY] = counted  # what was taken back was not done
        # Well-formed, and yet more than a column can hold: which message it was, is found by taking them one by one.
        if len(messages) > 1:
            return [_store_all(session, [one], now)[0] for one in messages]
        message, _ = messages[0]
        if not isinstance(e, _ITS_FAULT):
            log.exception("a message of %s could not be stored", message.device)
        error = WireError("wire.malformed", f"The message can't be stored: {type(e).__name__}: {str(e)[:300]}")
        return [bury(session, message, now, error)]


def _is_its_fault(e: Exception) -> bool:
    """Whether a message is to blame, and not the database. What nobody foresaw is: it would come again for ever."""
    return isinstance(e, _ITS_FAULT) or not isinstance(e, SQLAlchemyError | StorageError | OSError | MemoryError)


def acknowledged(session: Session, device_id: str) -> str:
    """`<epoch>:<seq>`: how far the newest epoch of a device is stored; "" if nothing is."""
    return acknowledgements(session, device_id).newest


def acknowledgements(session: Session, device_id: str) -> Acks:
    """How far each of a device's newest epochs is stored."""
    latest = select(DeviceEpoch.epoch, DeviceEpoch.next_seq).where(DeviceEpoch.device == device_id)
    said = [f"{e}:{n - 1}" for e, n in session.execute(latest.order_by(DeviceEpoch.updated_at.desc()).limit(4))]
    return Acks(said[0] if said else "", ",".join(said[1:]))


def _fits(record: AnyRecord) -> bool:
    if isinstance(record, Heartbeat):
        for running in record.running:
            if not -_LARGEST <= running.version <= _LARGEST:
                return False
    return not isinstance(record, Window) or -_LARGEST <= record.version <= _LARGEST


def store_record(session: Session, device: Device, epoch: str, record: AnyRecord, now: int) -> None:
    """Take a record into account that is not a heartbeat; the ones before it have been."""
    match record:
        case Window():
            _store_window(session, device, record)
        case Together():
            row = session.get(WindowRow, (device.id, record.digest, record.w))
            if row is not None:  # else that window was lost, and its products say nothing alone
                add_products(row, record)
        case Labels():
            _store_labels(session, device, record)
        case Fault():
            note_fault(session, device, record)
        case Update():
            _store_update(session, device, epoch, record)
        case Agreement():
            store_agreement(session, device.id, record)
        case Application():
            device.app = {"since": record.since, "at": record.t, **msgspec.to_builtins(record.numbers)}
        case LabelledRows():
            _store_rows(session, device, record, now)


def device_facts(beat: Heartbeat) -> dict[str, object]:
    """The columns of a device that a heartbeat sets; what is JSON there, as anything that msgspec encodes."""
    # Not a number is not JSON: a device whose reading failed must not break the pages of all.
    health = beat.health
    if not all(map(math.isfinite, health.values())):
        health = {k: v for k, v in health.items() if math.isfinite(v)}
    replace = msgspec.structs.replace
    first = beat.running[0] if beat.running else None
    return {
        "running": [r if math.isfinite(r.latency_ms) else replace(r, latency_ms=0.0) for r in beat.running],
        "running_model": first.model if first else "",
        "running_version": first.version if first else 0,
        "running_digest": first.digest if first else "",
        "phase": beat.update_state,
        "assignment_seq": beat.assignment_seq,
        "agent": beat.agent,
        "onnxruntime": beat.onnxruntime,
        "machine": beat.machine,
        "health": health,
        "degraded": beat.degraded,
        "errors": beat.errors,
    }


def store_exposures(session: Session, device: str, running: tuple[Running, ...], at: int) -> None:
    """Open, extend and close the spans in which a device served a bundle."""
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
        span.busy_us, span.latencies = r.busy_us, list(r.latencies)
    for (_, began), span in open_spans.items():
        successor = min((r.since for r in running if r.model == span.model), default=at)
        span.ended_at = max(began, successor)


def _store_window(session: Session, device: Device, window: Window) -> None:
    key = (device.id, window.digest, window.w)
    if session.get(WindowRow, key) is not None:
        return
    pending = session.get(PendingLabels, key)
    session.add(window_row(device.id, window, pending))
    if pending is not None:
        session.delete(pending)


def _store_labels(session: Session, device: Device, labels: Labels) -> None:
    key = (device.id, labels.digest, labels.w)
    row = session.get(WindowRow, key) or session.get(PendingLabels, key)
    if row is None:
        row = PendingLabels(device=device.id, digest=labels.digest, w=labels.w, labelled=0, errors=0, more=b"")
        session.add(row)
    add_labels(row, labels)
    version = getattr(row, "version", None) or device.running_version
    of = {"model": labels.model, "version": version}
    tallies.count(session, labels.labelled, "lightship_labelled_rows_total", **of)
    tallies.count(session, min(labels.errors, labels.labelled), "lightship_label_errors_total", **of)


def _store_update(session: Session, device: Device, epoch: str, update: Update) -> None:
    if not update.state.startswith(BESIDE_STEPS):  # what runs beside is not what the device is at
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
    day = now - now % _DAY_MS
    mine = (FeedbackRow.device == device.id, FeedbackRow.model == shared.model, FeedbackRow.at >= day)
    if session.scalar(select(FeedbackRow.id).where(*mine).limit(1)) is None:
        # Once a day: that rows leave a device at all is the act; each is kept under its device and time.
        detail = {"model": shared.model, "rows": len(shared.x)}
        audit.append(session, actor=f"device:{device.id}", verb="device.share", subject=device.id, detail=detail)
    for x, y in zip(shared.x, shared.y, strict=False):
        values = np.array([np.nan if v is None else v for v in x], dtype="<f4")
        row = FeedbackRow(device=device.id, model=shared.model, digest=shared.digest, at=now, x=values.tobytes(), y=y)
        session.add(row)


def bury(session: Session, message: Incoming, now: int, e: WireError) -> Receipt:
    """Keep what can't be understood, for inspection."""
    tallies.count(session, 1, "lightship_ingest_dead_total", code=e.code)
    session.add(
        DeadLetter(
            id=secrets.token_hex(8),
            at=now,
            topic=f"{message.device}/{message.kind}",
            code=e.code,
            detail=str(e),
            payload=message.payload[:MAX_DEAD_PAYLOAD],
        )
    )
    return Receipt(e.code)
