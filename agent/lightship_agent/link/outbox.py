"""Link: the on-disk outbox, a ring of segment files that keeps reports until the server has stored them.

    <state>/outbox/<epoch>/<first seq>.seg     record = length u32 | crc32 u32 (of seq and payload) | seq u64 | payload

Rules:
* a broker's PUBACK is not storage: records go only when the server acknowledges their sequence number, or,
  oldest first, when the ring is full, and then they are counted as dropped;
* one fdatasync per batch; a torn tail is cut off at opening; a broken segment ends where it breaks;
* a full or read-only disk switches to memory with an alarm flag: serving goes on. Numbers given out in memory would be
  given out again after a restart, and the server would take the new records for old ones, so memory has its own epoch;
* a record that no message could carry is not kept: it would block all that come after it.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import struct
import threading
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from lightship_agent.contract.codes import WireError
from lightship_agent.contract.messages import AnyRecord
from lightship_agent.contract.wire import MAX_PACKED, decode, encode, pack
from lightship_agent.fail_points import fail_point

log = logging.getLogger(__name__)

SEGMENT_BYTES: Final = 256 * 1024
_HEAD: Final = struct.Struct("<IIQ")
_MEMORY_RECORDS: Final = 2_000
#: What an envelope adds to a record of its own.
_ENVELOPE_BYTES: Final = 256
_LAST_SEQ: Final = 2**53
_EPOCH: Final = re.compile(r"[0-9a-f]{16}")


class Outbox:
    """Append, read from a cursor, acknowledge. Safe to use from several threads."""

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        """Open the ring under `folder`, or begin one in memory where the disk refuses."""
        self.epoch = ""
        self.dropped = 0
        self.in_memory = False
        self._limit = limit_bytes
        self._lock = threading.Lock()
        self._records: deque[tuple[int, bytes]] = deque()
        self._segments: deque[Path] = deque()
        self._next = 1
        self._acked = 0
        self._folder: Path | None = None  # none in memory
        try:
            self._folder = self._open(folder)
        except OSError:
            self._go_to_memory()

    def append(self, records: Iterable[AnyRecord]) -> None:
        """Number and keep `records`; durable on return unless `in_memory`."""
        with self._lock:
            fresh: list[tuple[int, bytes]] = []
            for record in records:
                raw = encode(msgspec.structs.replace(record, s=self._next))
                if not _sendable(raw):
                    log.error("outbox: a %s of %d bytes fits no message", type(record).__name__, len(raw))
                    self.dropped += 1
                    continue
                fresh.append((self._next, raw))
                self._next += 1
            if not fresh:
                return
            self._records.extend(fresh)
            if not self.in_memory:
                try:
                    self._write(fresh)
                    self._trim()
                except OSError:
                    self._go_to_memory()
            while self.in_memory and len(self._records) > _MEMORY_RECORDS:
                self._records.popleft()
                self.dropped += 1

    def read(self, after: int, limit: int) -> tuple[int, tuple[AnyRecord, ...]]:
        """Up to `limit` records with seq > `after`, and the oldest seq still held."""
        with self._lock:
            oldest = self._records[0][0] if self._records else self._next
            picked = [raw for seq, raw in self._records if seq > after][:limit]
        return oldest, tuple(_record(raw) for raw in picked)

    def acknowledge(self, epoch: str, seq: int) -> None:
        """Forget what the server has stored: everything up to `seq` of this epoch."""
        with self._lock:
            if epoch != self.epoch or not self._acked < seq <= _LAST_SEQ:
                return
            # The server may know more than we do, where the disk lost what it had promised to keep. Numbers it has
            # seen must not be used again.
            self._next = max(self._next, seq + 1)
            self._acked = seq
            while self._records and self._records[0][0] <= self._acked:
                self._records.popleft()
            self._remove_finished()

    @property
    def acked(self) -> int:
        """The highest acknowledged sequence number."""
        return self._acked

    @property
    def last(self) -> int:
        """The highest sequence number given out."""
        return self._next - 1

    @property
    def depth(self) -> int:
        """Records that wait for the server's acknowledgement."""
        return len(self._records)

    def _open(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        known = [p for p in folder.iterdir() if p.is_dir() and _EPOCH.fullmatch(p.name)]
        epochs = sorted(known, key=lambda p: p.stat().st_mtime_ns)
        for stale in epochs[:-1]:
            shutil.rmtree(stale)
        home = epochs[-1] if epochs else folder / secrets.token_hex(8)
        home.mkdir(exist_ok=True)
        self.epoch = home.name
        self._segments.extend(sorted(p for p in home.glob("*.seg") if p.stem.isdecimal()))
        for path in self._segments:
            for seq, raw in _read_segment(path):
                self._records.append((seq, raw))
                self._next = seq + 1
            self._next = max(self._next, int(path.stem))
        # Sequence numbers of acknowledged, removed segments must not be used again.
        self._acked = (self._records[0][0] if self._records else self._next) - 1
        return home

    def _write(self, fresh: list[tuple[int, bytes]]) -> None:
        newest = self._segments[-1] if self._segments else None
        if newest is None or newest.stat().st_size > SEGMENT_BYTES:
            assert self._folder is not None  # what is on disk has a folder
            newest = self._folder / f"{fresh[0][0]:020d}.seg"
            self._segments.append(newest)
        data = b"".join(_frame(seq, raw) for seq, raw in fresh)
        descriptor = os.open(newest, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fail_point("outbox-opened")
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            fail_point("outbox-written")
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def _trim(self) -> None:
        while len(self._segments) > 1 and sum(p.stat().st_size for p in self._segments) > self._limit:
            self._segments.popleft().unlink()
            first_kept = int(self._segments[0].stem)
            while self._records and self._records[0][0] < first_kept:
                self._records.popleft()
                self.dropped += 1

    def _remove_finished(self) -> None:
        # The newest segment stays: its name carries the sequence numbers forward.
        while len(self._segments) > 1 and int(self._segments[1].stem) <= self._acked + 1:
            try:
                self._segments.popleft().unlink(missing_ok=True)
            except OSError:
                self._go_to_memory()
                return

    def _go_to_memory(self) -> None:
        """Go on without the disk, under a new epoch; what waits is numbered anew, and nothing of it stays on disk."""
        self.in_memory = True
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None
        self._segments.clear()
        self.epoch = secrets.token_hex(8)
        self._acked = 0
        waiting = [_record(raw) for _, raw in self._records]
        self._records = deque(
            (seq, encode(msgspec.structs.replace(record, s=seq))) for seq, record in enumerate(waiting, start=1)
        )
        self._next = len(self._records) + 1


def _record(raw: bytes) -> AnyRecord:
    record: AnyRecord = decode(raw, AnyRecord)  # type: ignore[arg-type]
    return record


def _sendable(raw: bytes) -> bool:
    if len(raw) <= MAX_PACKED // 2:
        return True
    try:
        return len(pack(msgspec.Raw(raw))) <= MAX_PACKED - _ENVELOPE_BYTES
    except WireError:
        return False


def _frame(seq: int, raw: bytes) -> bytes:
    crc = zlib.crc32(raw, zlib.crc32(seq.to_bytes(8, "little")))
    return _HEAD.pack(len(raw), crc, seq) + raw


def _read_segment(path: Path) -> Iterator[tuple[int, bytes]]:
    """Whole records; the file is cut at the first torn or broken one."""
    data = path.read_bytes()
    at = 0
    while at + _HEAD.size <= len(data):
        length, crc, seq = _HEAD.unpack_from(data, at)
        raw = data[at + _HEAD.size : at + _HEAD.size + length]
        if len(raw) < length or zlib.crc32(raw, zlib.crc32(seq.to_bytes(8, "little"))) != crc:
            break
        try:
            _record(raw)
        except WireError:
            break
        yield seq, raw
        at += _HEAD.size + length
    if at < len(data):
        os.truncate(path, at)
