"""Link: a ring of segment files on disk, and a smaller one in memory. What they hold are numbered bytes.

    <folder>/<epoch>/<first seq>.seg     record = length u32 | crc32 u32 (of seq and payload) | seq u64 | payload
    <folder>/<epoch>/spare               a segment that is not needed now, to be written over
    <folder>/<epoch>/acked               seq u64 | crc32 u32: a hint, so that a restart sends little again

Rules:
* a segment is made at its full size, and used again when it is done with: a sync then writes the records and no
  metadata, a quarter of the flash. Sixteen zero bytes follow the last record; what lies behind them is older;
* within a segment numbers grow, and none is below that of its name: whatever else is found is the end;
* only the newest segment is read at opening. Its torn tail is cut off; a torn segment ends where it breaks;
* the newest segment is never removed: its name carries the numbers on;
* what was written and not synced is known to be so: nobody is given it before it is.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import struct
import zlib
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

from lightship_agent.fail_points import fail_point

SEGMENT_BYTES: Final = 256 * 1024
LAST_SEQ: Final = 2**53
_HEAD: Final = struct.Struct("<IIQ")
_END: Final = bytes(_HEAD.size)
_ACKED: Final = struct.Struct("<QI")
_EPOCH: Final = re.compile(r"[0-9a-f]{16}")
Numbered = tuple[int, bytes]


class Ring(Protocol):
    """Numbered bytes that wait for an acknowledgement."""

    epoch: str
    acked: int
    next: int
    dropped: int

    def append(self, fresh: Sequence[Numbered]) -> None:
        """Keep them.

        Raises:
            OSError: the disk refuses; nothing was kept.
        """

    def read(self, after: int, limit: int) -> list[Numbered]:
        """Up to `limit` of what is above `after`, in order."""

    def acknowledge(self, seq: int) -> None:
        """Forget everything up to `seq`."""

    @property
    def depth(self) -> int:
        """How many wait."""


class MemoryRing:
    """The newest of what a disk would not take, under a name of its own: its numbers die with the process."""

    def __init__(self, limit: int) -> None:
        self.epoch = secrets.token_hex(8)
        self.acked = 0
        self.next = 1
        self.dropped = 0
        self._limit = limit
        self._held: deque[Numbered] = deque()

    def append(self, fresh: Sequence[Numbered]) -> None:
        """Keep them, and let the oldest go where they are too many."""
        self._held.extend(fresh)
        self.next = fresh[-1][0] + 1
        while len(self._held) > self._limit:
            self._held.popleft()
            self.dropped += 1

    def read(self, after: int, limit: int) -> list[Numbered]:
        """Up to `limit` of what is above `after`, in order."""
        return [one for one in self._held if one[0] > after][:limit]

    def acknowledge(self, seq: int) -> None:
        """Forget everything up to `seq`."""
        self.acked = seq
        self.next = max(self.next, seq + 1)
        while self._held and self._held[0][0] <= seq:
            self._held.popleft()

    @property
    def depth(self) -> int:
        """How many wait."""
        return len(self._held)


class _Segment:
    """A file of records, and where each begins once it was looked through."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.first = int(path.stem)
        self.seqs = array("Q")
        self.offsets = array("Q")
        self.end = 0
        self.scanned = False
        self.torn = False  # something else follows the last record

    def scan(self) -> None:
        """Find its records; raises OSError."""
        if self.scanned:
            return
        data = self.path.read_bytes()
        self.seqs, self.offsets, self.end = array("Q"), array("Q"), 0
        least = self.first
        for seq, at, after in _records(data):
            if seq < least:
                break
            self.note(seq, at, after)
            least = seq + 1
        self.scanned = True
        if data[self.end : self.end + _HEAD.size] not in (b"", _END):
            self.torn = True

    @property
    def size(self) -> int:
        """Bytes it takes on the disk, about."""
        return max(SEGMENT_BYTES, self.end)

    def note(self, seq: int, at: int, after: int) -> None:
        """A record is there."""
        self.seqs.append(seq)
        self.offsets.append(at)
        self.end = after

    def read(self, after: int, limit: int) -> Iterator[Numbered]:
        """Records above `after`; raises OSError."""
        self.scan()
        begin = bisect_right(self.seqs, after)
        if begin == len(self.seqs):
            return
        until = min(begin + limit, len(self.seqs))
        start, stop = self.offsets[begin], self.offsets[until] if until < len(self.offsets) else self.end
        with self.path.open("rb") as f:
            f.seek(start)
            data = f.read(stop - start)
        for seq, at, end in _records(data):
            yield seq, data[at + _HEAD.size : end]


class DiskRing:
    """The ring of one folder."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Open it, or make it.

        Raises:
            OSError: the disk refuses.
        """
        self._limit = limit
        self.dropped = 0
        self.unsynced = 0  # records
        self._descriptor = -1
        self._home = _newest(folder)
        self.epoch = self._home.name
        found = sorted(p for p in self._home.glob("*.seg") if p.stem.isdecimal())
        self._segments = deque(_Segment(p) for p in found)
        self.next = 1
        if self._segments:
            newest = self._segments[-1]
            newest.scan()
            if newest.torn:
                os.truncate(newest.path, newest.end)
            self.next = newest.seqs[-1] + 1 if newest.seqs else newest.first
        # Numbers of segments that were acknowledged and removed, or of records that were lost, must not be used again.
        hint = self._hint()
        self.next = max(self.next, hint + 1)
        self.acked = max(self._segments[0].first - 1 if self._segments else self.next - 1, hint)

    def append(self, fresh: Sequence[Numbered]) -> None:
        """Write them; durable after `sync`.

        Raises:
            OSError: the disk refuses; nothing was kept.
        """
        data = b"".join(_frame(seq, raw) for seq, raw in fresh)
        newest = self._segments[-1] if self._segments else None
        if newest is None or (newest.end and newest.end + len(data) + len(_END) > SEGMENT_BYTES):
            newest = self._begin(fresh[0][0])
        if self._descriptor < 0:
            self._descriptor = os.open(newest.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fail_point("outbox-opened")
        _write_at(self._descriptor, data + _END, newest.end)
        fail_point("outbox-written")
        at = newest.end
        for seq, raw in fresh:
            newest.note(seq, at, at + _HEAD.size + len(raw))
            at = newest.end
        self.next = fresh[-1][0] + 1
        self.unsynced += len(fresh)

    def sync(self) -> None:
        """Make durable what was written; the oldest goes where the ring is full.

        Raises:
            OSError: the disk refuses.
        """
        if self.unsynced:
            os.fdatasync(self._descriptor)
            self.unsynced = 0
            self._trim()

    def read(self, after: int, limit: int) -> list[Numbered]:
        """Up to `limit` of what is above `after`, in order. A segment that can't be read is as if it were empty."""
        out: list[Numbered] = []
        after = max(after, self.acked)
        segments = list(self._segments)
        for n, segment in enumerate(segments):
            if n + 1 < len(segments) and segments[n + 1].first <= after + 1:
                continue
            with contextlib.suppress(OSError):
                out.extend(segment.read(after, limit - len(out)))
            if len(out) >= limit:
                break
        return out

    def acknowledge(self, seq: int) -> None:
        """Forget everything up to `seq`."""
        self.acked = seq
        self.next = max(self.next, seq + 1)
        with contextlib.suppress(OSError):  # a hint that is missing costs what is sent again
            self._keep_hint()
            while len(self._segments) > 1 and self._segments[1].first <= seq + 1:
                self._retire(self._segments.popleft())

    @property
    def depth(self) -> int:
        """How many wait."""
        return self.next - 1 - self.acked

    def close(self) -> None:
        """Let go of the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _begin(self, first: int) -> _Segment:
        """A new segment, of full size."""
        if self.unsynced:
            os.fdatasync(self._descriptor)
            self.unsynced = 0
        self.close()
        path, spare = self._home / f"{first:020d}.seg", self._home / "spare"
        if not spare.exists():
            descriptor = os.open(spare, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                _write_at(descriptor, bytes(SEGMENT_BYTES), 0)
            except OSError:
                with contextlib.suppress(OSError):
                    spare.unlink()
                raise
            finally:
                os.close(descriptor)
        spare.rename(path)
        _sync_folder(self._home)
        segment = _Segment(path)
        segment.scanned = True
        self._segments.append(segment)
        return segment

    def _retire(self, segment: _Segment) -> None:
        spare = self._home / "spare"
        if spare.exists() or segment.path.stat().st_size < SEGMENT_BYTES:
            segment.path.unlink(missing_ok=True)
        else:
            segment.path.rename(spare)

    def _trim(self) -> None:
        while len(self._segments) > 1 and sum(g.size for g in self._segments) > self._limit:
            gone = self._segments.popleft()
            kept = self._segments[0].first
            self.dropped += max(0, kept - max(gone.first, self.acked + 1))
            self.acked = max(self.acked, kept - 1)
            self._retire(gone)

    def _hint(self) -> int:
        try:
            seq, crc = _ACKED.unpack((self._home / "acked").read_bytes())
        except (OSError, struct.error):
            return 0
        return int(seq) if zlib.crc32(seq.to_bytes(8, "little")) == crc else 0

    def _keep_hint(self) -> None:
        said = _ACKED.pack(self.acked, zlib.crc32(self.acked.to_bytes(8, "little")))
        descriptor = os.open(self._home / "acked", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _write_at(descriptor, said, 0)
        finally:
            os.close(descriptor)


def _newest(folder: Path) -> Path:
    """The folder of the epoch in use; older ones are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    known = [p for p in folder.iterdir() if p.is_dir() and _EPOCH.fullmatch(p.name)]
    epochs = sorted(known, key=lambda p: p.stat().st_mtime_ns)
    for stale in epochs[:-1]:
        shutil.rmtree(stale)
    home = epochs[-1] if epochs else folder / secrets.token_hex(8)
    home.mkdir(exist_ok=True)
    return home


def _frame(seq: int, raw: bytes) -> bytes:
    crc = zlib.crc32(raw, zlib.crc32(seq.to_bytes(8, "little")))
    return _HEAD.pack(len(raw), crc, seq) + raw


def _records(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Number, beginning and end of each whole record, up to the first that is none."""
    at = 0
    while at + _HEAD.size <= len(data):
        length, crc, seq = _HEAD.unpack_from(data, at)
        end = at + _HEAD.size + length
        if end > len(data) or not 0 < seq <= LAST_SEQ:
            return
        if zlib.crc32(memoryview(data)[at + _HEAD.size : end], zlib.crc32(seq.to_bytes(8, "little"))) != crc:
            return
        yield seq, at, end
        at = end


def _write_at(descriptor: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, at)
        view, at = view[written:], at + written


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
