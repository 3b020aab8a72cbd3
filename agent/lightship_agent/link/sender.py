"""Link: which records go next.

Rules:
* events go before reports, and what is new goes before what is old: after an outage the newest batch goes at once, and
  the rest, like everything that goes again, at most so many messages a second;
* each record goes once while the server keeps up; what the server says it misses, what the broker refused, and what was
  not acknowledged for long, goes again. How often is bounded here, because the hints come by a way that is not trusted;
* what was handed over a moment ago is on its way, and is not sent again because somebody already misses it;
* no I/O of its own: the outbox keeps the records, the caller delivers them.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from lightship_agent.contract.codes import WireError
from lightship_agent.contract.messages import AnyRecord, Envelope
from lightship_agent.contract.wire import pack

from .outbox import Outbox
from .ring import Ring

BATCH_RECORDS: Final = 50
#: The least time between two times of sending the same again.
RESEND_SECONDS: Final = 15.0
#: For so long, what was handed over counts as being on its way.
FLIGHT_SECONDS: Final = 2.0
DRAIN_RATE: Final = 20.0  # messages a second
_REMEMBERED: Final = 200
Span = tuple[int, int]  # first and last, both included


class Parcel(NamedTuple):
    """What goes next: over which kind of topic, and the packed envelope."""

    kind: str
    packed: bytes


class _Lane:
    """How far one epoch of one outbox was sent."""

    def __init__(self, ring: Ring, now: float) -> None:
        self.epoch = ring.epoch
        # What an earlier run may have sent is old, and waits for its turn.
        self.cursor = max(ring.acked, ring.next - 1 - BATCH_RECORDS)
        self.again: list[Span] = [(ring.acked + 1, self.cursor)] if self.cursor > ring.acked else []
        self.flying: list[tuple[float, Span]] = []
        self.progress = (ring.acked, now)
        self.heard = now - RESEND_SECONDS


class _Pending(NamedTuple):
    lane: _Lane
    span: Span
    live: bool


class Sender:
    """Cursors over the outboxes.

    Args:
        outboxes: what waits to be stored by the server, and over which kind of topic it goes; first things first.
        boot: the boot counter.
        started: monotonic seconds at the start of the agent.
        patience: seconds without progress after which what was sent counts as lost. It must be longer than the
            interval at which the server's acknowledgement is heard, or all would be sent many times.
        rate: messages a second of what is old or goes again.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        outboxes: Sequence[tuple[str, Outbox]],
        boot: int,
        started: float,
        *,
        patience: float = RESEND_SECONDS,
        rate: float = DRAIN_RATE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._outboxes = tuple(outboxes)
        self._boot = boot
        self._started = started
        self._patience = patience
        self._rate = rate
        self._clock = clock
        self._tokens, self._filled = max(1.0, rate), clock()
        self._missing: dict[str, tuple[Span, ...]] = {}
        self._lanes: dict[str, _Lane] = {}
        self._pending: _Pending | None = None
        self._handles: OrderedDict[int, _Pending] = OrderedDict()
        self._paused_until = 0.0
        #: Times in a row that nothing was acknowledged for as long as our patience lasts, and how many records wait.
        self.stalls = self.stalled = 0
        self._live()

    def next_batch(self) -> Parcel | None:
        """What to send next, or None. Until `sent` is called, it is the same again."""
        self._pending = None
        if self._clock() < self._paused_until:
            return None
        lanes = list(self._live())
        for kind, outbox, ring, lane in lanes:
            self._note_missing(ring, lane)
            self._note_stall(ring, lane)
            if (parcel := self._fresh(kind, outbox, ring, lane)) is not None:
                return parcel
        if not self._may_drain():
            return None
        for kind, outbox, ring, lane in lanes:
            if (parcel := self._old(kind, outbox, ring, lane)) is not None:
                return parcel
        return None

    def sent(self, handle: int = 0) -> None:
        """The last batch was handed over; whether it was stored, the server will say. `handle`: to refuse it by."""
        done = self._pending
        if done is None:
            return
        if done.live:
            done.lane.cursor = done.span[1]
        else:
            done.lane.again = _without(done.lane.again, [done.span])
            self._tokens -= 1
        done.lane.flying.append((self._clock(), done.span))
        if handle:
            self._handles[handle] = done
            while len(self._handles) > _REMEMBERED:
                self._handles.popitem(last=False)

    def refused(self, handle: int) -> None:
        """The broker did not take that batch after all, or nobody listens there: it goes again in a while."""
        done = self._handles.pop(handle, None)
        if done is not None:
            done.lane.again = _with(done.lane.again, [done.span])
            done.lane.flying = [(at, span) for at, span in done.lane.flying if span != done.span]
            self._paused_until = self._clock() + RESEND_SECONDS

    def missing(self, epoch: str, ranges: Iterable[Span]) -> None:
        """The server says what it misses in that epoch. From any thread; a hint."""
        self._missing[epoch] = tuple(ranges)

    def _live(self) -> Iterable[tuple[str, Outbox, Ring, _Lane]]:
        found = [(kind, outbox, ring) for kind, outbox in self._outboxes for ring in outbox.rings()]
        known = {ring.epoch for _, _, ring in found}
        self._lanes = {epoch: lane for epoch, lane in self._lanes.items() if epoch in known}
        for epoch in [epoch for epoch in list(self._missing) if epoch not in known]:
            self._missing.pop(epoch, None)
        now = self._clock()
        return [(*f, self._lanes.setdefault(f[2].epoch, _Lane(f[2], now))) for f in found]

    def _fresh(self, kind: str, outbox: Outbox, ring: Ring, lane: _Lane) -> Parcel | None:
        lane.cursor = max(lane.cursor, ring.acked)
        last = ring.next - 1
        if last - lane.cursor > BATCH_RECORDS:
            lane.again = _with(lane.again, [(lane.cursor + 1, last - BATCH_RECORDS)])
            lane.cursor = last - BATCH_RECORDS
        if last <= lane.cursor:
            return None
        return self._packed(kind, outbox, lane, lane.cursor, last, live=True)

    def _old(self, kind: str, outbox: Outbox, ring: Ring, lane: _Lane) -> Parcel | None:
        lane.again = _without(lane.again, [(1, ring.acked)])
        while lane.again:
            first, last = lane.again[0]
            parcel = self._packed(kind, outbox, lane, first - 1, last, live=False)
            if parcel is not None:
                return parcel
            # None of it is held any more.
            lane.again = lane.again[1:]
        return None

    def _packed(self, kind: str, outbox: Outbox, lane: _Lane, after: int, last: int, *, live: bool) -> Parcel | None:
        oldest, found = outbox.read(lane.epoch, after, BATCH_RECORDS)
        records: tuple[AnyRecord, ...] = tuple(r for r in found if r.s <= last)
        if not records:
            return None
        uptime = int((self._clock() - self._started) * 1_000)
        while True:
            envelope = Envelope(e=lane.epoch, b=self._boot, us=uptime, lo=oldest, r=records)
            try:
                packed = pack(envelope)
            except WireError:
                if len(records) == 1:
                    raise  # the outbox keeps no record that fits no message
                records = records[: len(records) // 2]
                continue
            self._pending = _Pending(lane, (after + 1, records[-1].s), live)
            return Parcel(kind, packed)

    def _may_drain(self) -> bool:
        now = self._clock()
        self._tokens = min(max(1.0, self._rate), self._tokens + (now - self._filled) * self._rate)
        self._filled = now
        return self._tokens >= 1

    def _note_missing(self, ring: Ring, lane: _Lane) -> None:
        said, now = self._missing.get(lane.epoch), self._clock()
        if said is None or now - lane.heard < RESEND_SECONDS:
            return
        self._missing.pop(lane.epoch, None)
        lane.flying = [(at, span) for at, span in lane.flying if now - at < FLIGHT_SECONDS]
        # Only what was sent: the rest goes anyway.
        wanted = [(max(a, ring.acked + 1), min(b, lane.cursor)) for a, b in said]
        wanted = _without([(a, b) for a, b in wanted if a <= b], [span for _, span in lane.flying])
        if wanted:
            lane.again = _with(lane.again, wanted)
            lane.heard = now
            lane.progress = (ring.acked, now)

    def _note_stall(self, ring: Ring, lane: _Lane) -> None:
        acked, since = lane.progress
        now = self._clock()
        if ring.acked != acked:
            self.stalls = self.stalled = 0
        if ring.acked != acked or ring.acked >= lane.cursor or lane.again:
            lane.progress = (ring.acked, now)
        elif now - since > self._patience:
            lane.again = _with(lane.again, [(ring.acked + 1, lane.cursor)])
            lane.progress = (acked, now)
            self.stalls, self.stalled = self.stalls + 1, lane.cursor - ring.acked


def _with(spans: Iterable[Span], more: Iterable[Span]) -> list[Span]:
    """The union, sorted and apart."""
    out: list[Span] = []
    for first, last in sorted([*spans, *more]):
        if out and first <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(out[-1][1], last))
        elif first <= last:
            out.append((first, last))
    return out


def _without(spans: Iterable[Span], less: Iterable[Span]) -> list[Span]:
    """What is in `spans` and not in `less`."""
    left = list(spans)
    for gone_first, gone_last in less:
        cut: list[Span] = []
        for first, last in left:
            cut += [(first, min(last, gone_first - 1)), (max(first, gone_last + 1), last)]
        left = [(first, last) for first, last in cut if first <= last]
    return left
