"""Link: the outbox, which keeps reports until the server has stored them. There are two: of events, and of the rest.

Rules:
* a broker's PUBACK is not storage: records go only when the server acknowledges their sequence number, or,
  oldest first, when the ring is full, and then they are counted as dropped;
* what happens once (an event) is on the disk when `append` returns; reports are synced together, within ten seconds or
  64 records, and always before they are given out to be sent: a number that the server has seen is never lost;
* a full or read-only disk is answered with memory and an alarm flag: serving goes on. What is on the disk stays there.
  Numbers given out in memory would be given out again after a restart, so memory has its own epoch. The disk is tried
  again every minute;
* a record that no message could carry is not kept: it would block all that come after it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Literal

import msgspec

from lightship_agent.contract.codes import WireError
from lightship_agent.contract.messages import AnyRecord
from lightship_agent.contract.wire import MAX_PACKED, decode, encode, pack

from .ring import LAST_SEQ, DiskRing, MemoryRing, Ring

log = logging.getLogger(__name__)

SYNC_SECONDS: Final = 10.0
SYNC_RECORDS: Final = 64
RETRY_DISK_SECONDS: Final = 60.0
MEMORY_RECORDS: Final = 2_000
#: What an envelope adds to a record of its own.
_ENVELOPE_BYTES: Final = 256


class Outbox:
    """Append, read, acknowledge. Safe to use from several threads.

    Args:
        folder: where the ring is.
        limit_bytes: how large it may get.
        at_once: sync every record before `append` returns.
        clock: monotonic seconds.
        quality: what the times in records are worth now, as `Record.q` says; None: as the records say.
    """

    def __init__(
        self,
        folder: Path,
        *,
        limit_bytes: int,
        at_once: bool = False,
        clock: Callable[[], float] = time.monotonic,
        quality: Callable[[], Literal[0, 1, 2]] | None = None,
    ) -> None:
        """Open the ring under `folder`, or begin one in memory where the disk refuses."""
        self._quality = quality
        self._folder = folder
        self._limit = limit_bytes
        self._at_once = at_once
        self._clock = clock
        self._lock = threading.RLock()
        self._disk: DiskRing | None = None
        self._memory: MemoryRing | None = None
        self._unfit = 0  # records that were not kept
        self._forgotten = 0  # that earlier rings in memory have dropped
        self._written = 0.0  # when the oldest record that is not synced was
        self._refused = 0.0  # when the disk last refused
        self.in_memory = False
        try:
            self._disk = DiskRing(folder, limit_bytes)
        except OSError as e:
            self._go_to_memory(e)

    def append(self, records: Iterable[AnyRecord]) -> None:
        """Number and keep `records`."""
        with self._lock:
            fit = [record for record in records if self._fits(record)]
            if not fit:
                return
            if self._quality is not None:
                worth = self._quality()
                fit = [msgspec.structs.replace(record, q=worth) for record in fit]
            if self.in_memory and self._clock() - self._refused >= RETRY_DISK_SECONDS:
                self._try_the_disk()
            if not self.in_memory:
                assert self._disk is not None  # it is in use
                try:
                    self._write(self._disk, fit)
                except OSError as e:
                    self._go_to_memory(e)
                else:
                    return
            assert self._memory is not None  # it is in use
            self._memory.append(_numbered(fit, self._memory.next))

    def rings(self) -> tuple[Ring, ...]:
        """What is to be sent from: memory first, since it does not last."""
        with self._lock:
            memory = self._memory if self._memory is not None and (self.in_memory or self._memory.depth) else None
            return tuple(ring for ring in (memory, self._disk) if ring is not None)

    def read(self, epoch: str, after: int, limit: int) -> tuple[int, tuple[AnyRecord, ...]]:
        """Up to `limit` records of an epoch with seq > `after`, all of them durable; the oldest seq still held."""
        with self._lock:
            ring = self._of(epoch)
            if ring is None:
                return 1, ()
            if isinstance(ring, DiskRing) and not self._sync():
                return ring.acked + 1, ()
            oldest = self._oldest(ring)
            return oldest, tuple(r for _, raw in ring.read(after, limit) if (r := _record(raw)) is not None)

    def acknowledge(self, epoch: str, seq: int) -> None:
        """Forget what the server has stored: everything up to `seq` of this epoch."""
        with self._lock:
            ring = self._of(epoch)
            # The server may know more than we do, where the disk lost what it had promised to keep. Numbers it has
            # seen must not be used again.
            if ring is not None and ring.acked < seq <= LAST_SEQ:
                ring.acknowledge(seq)

    def tick(self) -> None:
        """Sync what has waited for long enough."""
        with self._lock:
            if self._disk is not None and self._disk.unsynced and self._clock() - self._written >= SYNC_SECONDS:
                self._sync()

    def close(self) -> None:
        """Sync, and let go of the files; the outbox may still be used."""
        with self._lock:
            self._sync()
            if self._disk is not None:
                self._disk.close()

    @property
    def epoch(self) -> str:
        """Under which new records are numbered."""
        ring = self._memory if self.in_memory else self._disk
        return ring.epoch if ring is not None else ""

    @property
    def acked(self) -> int:
        """The highest acknowledged sequence number of that epoch."""
        ring = self._of(self.epoch)
        return ring.acked if ring is not None else 0

    @property
    def last(self) -> int:
        """The highest sequence number given out in that epoch."""
        ring = self._of(self.epoch)
        return ring.next - 1 if ring is not None else 0

    @property
    def depth(self) -> int:
        """Records that wait for the server's acknowledgement."""
        return sum(ring.depth for ring in (self._disk, self._memory) if ring is not None)

    @property
    def dropped(self) -> int:
        """Records that were given up since the start: the oldest of a full ring, and what fits no message."""
        return self._unfit + self._forgotten + sum(r.dropped for r in (self._disk, self._memory) if r is not None)

    def _of(self, epoch: str) -> Ring | None:
        return next((r for r in (self._disk, self._memory) if r is not None and r.epoch == epoch), None)

    def _oldest(self, ring: Ring) -> int:
        """The lowest number that can be sent. What a later agent wrote, of a kind we do not know, is given up."""
        while first := ring.read(ring.acked, 1):
            seq, raw = first[0]
            if _record(raw) is not None:
                return seq
            log.error("outbox: record %d is of a kind that this agent does not know; it is given up", seq)
            self._unfit += 1
            ring.acknowledge(seq)
        return ring.next

    def _fits(self, record: AnyRecord) -> bool:
        raw = encode(record)
        if _sendable(raw):
            return True
        log.error("outbox: a %s of %d bytes fits no message", type(record).__name__, len(raw))
        self._unfit += 1
        return False

    def _write(self, disk: DiskRing, records: list[AnyRecord]) -> None:
        if not disk.unsynced:
            self._written = self._clock()
        disk.append(_numbered(records, disk.next))
        waited = self._clock() - self._written >= SYNC_SECONDS
        if self._at_once or waited or disk.unsynced >= SYNC_RECORDS:
            disk.sync()

    def _sync(self) -> bool:
        """Whether all that the disk holds is durable."""
        if self._disk is None:
            return False
        try:
            self._disk.sync()
        except OSError as e:
            self._go_to_memory(e)
            return False
        return True

    def _try_the_disk(self) -> None:
        self._refused = self._clock()
        try:
            if self._disk is None:
                self._disk = DiskRing(self._folder, self._limit)
        except OSError:
            return
        # What waits in memory is sent from there; what comes now is numbered by the disk again.
        self.in_memory = False

    def _go_to_memory(self, e: OSError) -> None:
        """Go on without the disk, under another epoch; what it holds stays there, and is sent from there."""
        if self.in_memory:
            return
        log.error("outbox: the disk refuses: %s; going on in memory", e)
        self.in_memory = True
        self._refused = self._clock()
        if self._memory is None or not self._memory.depth:
            self._forgotten += self._memory.dropped if self._memory is not None else 0
            self._memory = MemoryRing(MEMORY_RECORDS)


def _numbered(records: list[AnyRecord], first: int) -> list[tuple[int, bytes]]:
    return [(n, encode(msgspec.structs.replace(record, s=n))) for n, record in enumerate(records, start=first)]


def _record(raw: bytes) -> AnyRecord | None:
    try:
        record: AnyRecord = decode(raw, AnyRecord)  # type: ignore[arg-type]
    except WireError:
        return None
    return record


def _sendable(raw: bytes) -> bool:
    if len(raw) <= MAX_PACKED // 2:
        return True
    try:
        return len(pack(msgspec.Raw(raw))) <= MAX_PACKED - _ENVELOPE_BYTES
    except WireError:
        return False
