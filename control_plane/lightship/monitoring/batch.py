"""Monitoring: a batch of understood messages, stored with few statements.

Rules:
* what all messages of a batch need is read at once, and what they change is written at once: a heartbeat costs no
  statement of its own;
* the order of the messages is kept for each device, and the records of an epoch are taken into account in their order;
* a heartbeat is believed where it is newer than the last one of its epoch, even ahead of a gap: it says what is now;
* the caller's savepoint makes it all or nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from operator import itemgetter

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from lightship.fleet import asks
from lightship.storage.models import DeadLetter, Device, HeldRecord
from lightship_agent.contract.codes import WireError
from lightship_agent.contract.messages import AnyRecord, Envelope, Heartbeat, Reply, State
from lightship_agent.contract.wire import decode, encode

from . import direct
from .batch_tallies import BatchTally, Served
from .cursors import Cursor
from .faults import end_faults, says_of_data
from .ingest import FUTURE_MS, Gap, Incoming, Receipt, Understood, bury, device_facts, store_exposures, store_record

log = logging.getLogger(__name__)

_Key = tuple[str, str]  # device and epoch
_Span = tuple[str, int]  # digest and when it began

_DAY_MS = 86_400_000
_JSON_FACTS = itemgetter(*direct.JSON_FACTS)
_PLAIN_FACTS = itemgetter(*direct.PLAIN_FACTS)


class _Epoch:
    """A cursor, and what the database knows of it."""

    def __init__(self, cursor: Cursor, beat: int, *, stored: bool) -> None:
        self.cursor = cursor
        self.beat = beat
        self.stored = stored


class _Known:
    """What is needed of a device."""

    def __init__(self, tenant: str, group: str, state: str, boot: int, last_seen: int) -> None:
        self.tenant = tenant
        self.group = group
        self.state = state
        self.boot = boot
        self.last_seen = last_seen


class Batch:
    """One transaction's messages."""

    def __init__(self, session: Session, now: int) -> None:
        """Nothing is read yet."""
        self._session = session
        self._now = now
        self._devices: dict[str, _Known] = {}
        self._epochs: dict[_Key, _Epoch] = {}
        self._touched: set[_Key] = set()
        self._seen: set[str] = set()
        self._beats: dict[str, Heartbeat] = {}  # the newest
        self._states: dict[str, State] = {}
        self._open: dict[str, dict[_Span, Served]] = {}  # by device, what each open span has served
        self._tally = BatchTally()
        self._grown: set[tuple[str, _Span]] = set()

    def store(self, messages: Sequence[Understood]) -> list[Receipt]:
        """Store them in their order; what became of each."""
        self._load({message.device for message, _ in messages})
        said = [self._one(*understood) for understood in messages]
        self._write()
        # A gap that a later message of this batch has filled is none.
        return [r if r.gap is None else Receipt(r.code, self._gap(m.device, r.gap.epoch))
                for (m, _), r in zip(messages, said, strict=True)]  # fmt: skip

    def _load(self, names: set[str]) -> None:
        for name, *known in direct.of(self._session, direct.DEVICES, names):
            self._devices[name] = _Known(*known)
        for device, epoch, next_seq, lost, ahead, beat in direct.of(self._session, direct.EPOCHS, self._devices):
            spans = [(first, last) for first, last in direct.from_json(ahead)] if ahead != "[]" else []
            self._epochs[device, epoch] = _Epoch(Cursor(next_seq, lost, spans), beat, stored=True)
        for device, digest, began, *served in direct.of(self._session, direct.OPEN_SPANS, self._devices):
            rows, failures, busy_us, cells = served
            latencies = tuple(direct.from_json(cells)) if cells != "[]" else ()
            self._open.setdefault(device, {})[digest, began] = Served(rows, failures, busy_us, latencies)

    def _one(self, message: Incoming, said: State | Envelope | Reply | WireError) -> Receipt:
        device = self._devices.get(message.device)
        if device is not None and device.state == "pending":
            return Receipt("enrol.pending")  # it keeps what it reports, and says it again once it is let in
        if device is None or device.state != "active":
            return bury(self._session, message, self._now, WireError("wire.malformed", "Not an active device."))
        if message.tenant and message.tenant != device.tenant:
            error = WireError("wire.tenant", f"Expected the tenant {device.tenant}, found {message.tenant[:64]!r}.")
            return bury(self._session, message, self._now, error)
        if isinstance(said, WireError):
            return bury(self._session, message, self._now, said)
        self._tally.messages[message.kind] += 1
        if isinstance(said, Reply):
            if not asks.answered(self._session, message.device, said, self._now):
                log.info("%s answers what it was not asked: %s %s", message.device, said.verb, said.id)
            return Receipt()
        if isinstance(said, State):
            # A will that was written before the present boot says nothing about it.
            if said.n >= device.boot:
                device.boot = said.n
                self._states[message.device] = said
            return Receipt()
        if any(record.t > self._now + FUTURE_MS for record in said.r):
            self._note_future(message)
        return Receipt(gap=self._take(message.device, said))

    def _note_future(self, message: Incoming) -> None:
        """Once a day for a device: its reports are kept all the same, and a clock may stay wrong for long."""
        d = DeadLetter
        mine = select(d.id).where(d.topic == f"{message.device}/{message.kind}", d.code == "wire.future")
        if self._session.scalar(mine.where(d.at > self._now - _DAY_MS).limit(1)) is None:
            bury(self._session, message, self._now, WireError("wire.future", "A report is dated in the future."))
            self._session.flush()

    def _take(self, device: str, envelope: Envelope) -> Gap | None:
        key = (device, envelope.e)
        epoch = self._epochs.get(key)
        if epoch is None:
            epoch = self._epochs[key] = _Epoch(Cursor(), 0, stored=False)
        self._touched.add(key)
        self._seen.add(device)
        cursor = epoch.cursor
        if envelope.lo > cursor.next_seq:
            # The device's ring was full and dropped these: nobody can bring them back.
            cursor.drop_below(envelope.lo)
            self._release(key, cursor.next_seq)
        for record in envelope.r:
            if not cursor.take(record.s):
                self._tally.duplicates += 1
                continue
            self._tally.records[type(record)] += 1
            if isinstance(record, Heartbeat):
                if record.s > epoch.beat:
                    epoch.beat = record.s
                    self._beat(device, record)
            elif record.s < cursor.next_seq:
                self._account(key, record)
            else:
                self._hold(key, record)
            if cursor.next_seq > record.s + 1:
                self._release(key, cursor.next_seq)
        gap = self._gap(device, envelope.e)
        self._tally.gaps += gap is not None
        return gap

    def _gap(self, device: str, epoch: str) -> Gap | None:
        missing = self._epochs[device, epoch].cursor.missing()
        return Gap(epoch, tuple(missing)) if missing else None

    def _account(self, key: _Key, record: AnyRecord) -> None:
        entity = self._session.get_one(Device, key[0])
        store_record(self._session, entity, key[1], record, self._now)

    def _hold(self, key: _Key, record: AnyRecord) -> None:
        self._session.add(HeldRecord(device=key[0], epoch=key[1], s=record.s, body=encode(record)))

    def _release(self, key: _Key, below: int) -> None:
        """Take into account what was held and is no longer ahead of a gap."""
        mine = (HeldRecord.device == key[0], HeldRecord.epoch == key[1], HeldRecord.s < below)
        held = self._session.scalars(select(HeldRecord.body).where(*mine).order_by(HeldRecord.s)).all()
        for body in held:
            record: AnyRecord = decode(body, AnyRecord)  # type: ignore[arg-type]
            self._account(key, record)
        if held:
            self._session.execute(delete(HeldRecord).where(*mine))

    def _beat(self, device: str, beat: Heartbeat) -> None:
        self._beats[device] = beat
        spans = self._open.setdefault(device, {})
        if {(r.digest, r.since) for r in beat.running} == spans.keys():
            for r in beat.running:
                before, now = spans[r.digest, r.since], Served.of(r)
                if before != now:
                    self._tally.served(self._devices[device].group, r, before)
                    spans[r.digest, r.since] = now
                    self._grown.add((device, (r.digest, r.since)))
            return
        # A model has begun or ended to serve, which is seldom.
        for r in beat.running:
            self._tally.served(self._devices[device].group, r, spans.get((r.digest, r.since), Served()))
        self._write_grown()
        store_exposures(self._session, device, beat.running, beat.t)
        self._session.flush()
        self._open[device] = {(r.digest, r.since): Served.of(r) for r in beat.running}

    def _write(self) -> None:
        end_faults(self._session, [d for d, b in self._beats.items() if not says_of_data(b.degraded)], self._now)
        self._session.flush()
        self._write_grown()
        seen = {d: max(self._devices[d].last_seen, self._now) for d in self._seen}
        beats = [(*_columns(beat), seen[d], d) for d, beat in self._beats.items()]
        others = [(at, d) for d, at in seen.items() if d not in self._beats]
        states = [(said.n, said.on, d) for d, said in self._states.items()]
        direct.run(self._session, direct.BEAT, beats)
        direct.run(self._session, direct.SEEN, others)
        direct.run(self._session, direct.STATE, states)
        self._write_epochs()
        self._tally.write(self._session)
        # Rows that were read as objects before are no longer what the database holds.
        self._session.expire_all()

    def _write_epochs(self) -> None:
        fresh: list[tuple[object, ...]] = []
        moved: list[tuple[object, ...]] = []
        for key in self._touched:
            epoch = self._epochs[key]
            cursor = epoch.cursor
            ahead = direct.as_json(cursor.ahead) if cursor.ahead else "[]"
            row = (cursor.next_seq, cursor.lost, ahead, epoch.beat, self._now, *key)
            (moved if epoch.stored else fresh).append(row)
        direct.run(self._session, direct.FRESH, fresh)
        direct.run(self._session, direct.MOVED, moved)

    def _write_grown(self) -> None:
        rows = [
            (rows, failures, busy_us, direct.as_json(latencies), device, *span)
            for device, span in self._grown
            for rows, failures, busy_us, latencies in (self._open[device][span],)
        ]
        self._grown.clear()
        direct.run(self._session, direct.GROWN, rows)


def _columns(beat: Heartbeat) -> tuple[object, ...]:
    facts = device_facts(beat)
    return (*map(direct.as_json, _JSON_FACTS(facts)), *_PLAIN_FACTS(facts))
