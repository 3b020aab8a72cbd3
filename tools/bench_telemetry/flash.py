"""Bench telemetry: the device's queue: what survives kills, what it writes, what it costs.

Rules: the writers are processes that are killed; after most kills a torn tail is left as a cut write leaves it; every
fifth writer meets a disk that takes half of a write and is then full.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lightship.storage.audit import now_ms
from lightship_agent.link import outbox as module
from lightship_agent.link.outbox import Outbox
from lightship_agent.link.ring import SEGMENT_BYTES

from .reports import beat

LIMIT: Final = 64_000_000  # bytes, the agent's own default
_RECORDS: Final = 3  # of one append

# One interpreter forks a writer for each line that it is given: after how many writes its disk is full, or 0.
_WRITERS: Final = """
import errno, os, sys
from pathlib import Path
from lightship_agent.contract.messages import Heartbeat
from lightship_agent.link.outbox import Outbox
write = os.pwrite
def full(left):
    def pwrite(descriptor, data, at):
        left[0] -= 1
        if left[0] < 0:
            if left[0] == -1:
                write(descriptor, data[: len(data) // 2], at)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data, at)
    return pwrite
for line in sys.stdin:
    after, pid = int(line), os.fork()
    if pid == 0:
        if after:
            os.pwrite = full([after])
        outbox = Outbox(Path(sys.argv[1]), limit_bytes=int(sys.argv[2]), at_once=True)
        while True:
            outbox.append([Heartbeat(s=1, t=1, agent="x" * 60, health={f"m{n}": 1.5 for n in range(20)})] * 3)
            said = "memory" if outbox.in_memory else f"{outbox.epoch} {outbox.last}"
            os.write(1, f"{said}\\n".encode())
    os.write(1, f"pid {pid}\\n".encode())
    os.waitpid(pid, 0)
    os.write(1, b"end\\n")
"""
# Appends so many reports, so many at a time, and says how many blocks of 4 KiB its writes touched between two syncs.
# What the kernel says that it was given to write is no measure: it counts by its own pieces of memory, up to 256 KiB.
_METER: Final = """
import os, sys
from pathlib import Path
from lightship_agent.link.outbox import Outbox
from bench_telemetry.reports import beat
write, sync, dirty, written = os.pwrite, os.fdatasync, set(), [0]
def pwrite(descriptor, data, at):
    count = write(descriptor, data, at)
    dirty.update((descriptor, block) for block in range(at // 4096, (at + count - 1) // 4096 + 1))
    return count
def settle(*_):
    written[0] += len(dirty) * 4096
    dirty.clear()
def fdatasync(descriptor):
    sync(descriptor)
    settle()
os.pwrite, os.fdatasync = pwrite, fdatasync
folder, count, group = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
outbox = Outbox(folder, limit_bytes=64_000_000, at_once=True)
for n in range(0, count, group):
    outbox.append([beat(1, 1_780_000_000_000 + n)] * group)
    if n % 100 == 0:
        outbox.acknowledge(outbox.epoch, outbox.last)
        settle()
print(written[0])
"""


@dataclass(frozen=True)
class Flash:
    """What was found."""

    kills: int
    refused: int  # writers that found their disk full
    promised: int  # records that `append` had returned for
    lost: int  # of those
    each_bytes: float  # in blocks written per record, synced one by one; without the file system's own
    grouped_bytes: float  # the same, ten at a time
    open_ms: float  # CPU, with a full ring
    open_wall_ms: float
    append_micros: float  # CPU
    over_bytes: int  # by which the ring exceeds its limit and one segment


def measure(folder: Path, kills: int, full: int = LIMIT) -> Flash:
    """All of it; `full`: the size of the ring that is opened."""
    folder.mkdir(parents=True)
    refused, promised, lost = _killed(folder / "killed", kills)
    each, grouped = (_written(folder / f"by-{group}", 1_000, group) for group in (1, 10))
    append = _append(folder / "ring", full)
    cpu, wall = _opening(folder / "ring", full)
    size = sum(p.stat().st_size for p in (folder / "ring").rglob("*.seg"))
    shutil.rmtree(folder)
    over = max(0, size - full - SEGMENT_BYTES)
    return Flash(kills, refused, promised, lost, each, grouped, cpu * 1e3, wall * 1e3, append * 1e6, over)


def _killed(folder: Path, kills: int) -> tuple[int, int, int]:
    chance = random.Random(200)
    home = str(Path(module.__file__).parents[2])
    writers = subprocess.Popen(
        [sys.executable, "-c", _WRITERS, str(folder), str(LIMIT)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"PYTHONPATH": home}, text=True, bufsize=1,
    )  # fmt: skip
    assert writers.stdin is not None
    assert writers.stdout is not None
    promised = refused = lost = 0
    for n in range(kills):
        writers.stdin.write(f"{chance.randrange(2, 6) if n % 5 == 4 else 0}\n")
        said: list[str] = []
        pid = 0
        while not pid or not said:
            line = writers.stdout.readline().strip()
            if line.startswith("pid "):
                pid = int(line[4:])
            else:
                said.append(line)
        time.sleep(chance.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        while (line := writers.stdout.readline().strip()) != "end":
            said.append(line)
        refused += "memory" in said
        promised = max([promised, *(int(line.split()[1]) for line in said if line.count(" ") == 1)])
        if n % 3:
            _tear(folder, chance)
        found = Outbox(folder, limit_bytes=LIMIT)
        seqs = {r.s for r in found.read(found.epoch, max(0, promised - 500), 10_000)[1]}
        lost += sum(seq not in seqs for seq in range(max(1, promised - 499), promised + 1))
        promised = max(promised, found.last)
        found.close()
    writers.stdin.close()
    writers.stdout.close()
    writers.wait(10)
    everything = Outbox(folder, limit_bytes=LIMIT)
    held = {r.s for r in everything.read(everything.epoch, 0, 10**9)[1]}
    everything.close()
    return refused, promised, max(lost, promised - len(held))


def _tear(folder: Path, chance: random.Random) -> None:
    """What a write leaves that was cut off, behind the last whole record."""
    newest = max(folder.rglob("*.seg"))
    with newest.open("r+b") as f:
        f.seek(len(newest.read_bytes().rstrip(b"\0")))
        f.write(bytes(chance.randrange(1, 256) for _ in range(chance.randrange(1, 400))))


def _written(folder: Path, count: int, group: int) -> float:
    words = [sys.executable, "-c", _METER, str(folder), str(count), str(group)]
    done = subprocess.run(
        words, capture_output=True, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    return int(done.stdout) / count


def _append(folder: Path, full: int) -> float:
    """Fill a ring; CPU seconds per record, which include its syncs, as the agent does them."""
    outbox, now, count = Outbox(folder, limit_bytes=full), now_ms(), 0
    size, began = 0, time.process_time()
    record = beat(1, now)
    while size < full * 1.05:
        outbox.append([record])
        count += 1
        size += 500
    took = time.process_time() - began
    outbox.close()
    return took / count


def _opening(folder: Path, full: int) -> tuple[float, float]:
    """The median of some openings: CPU and wall, in seconds."""
    found = []
    for _ in range(9):
        cpu, wall = time.process_time(), time.perf_counter()
        opened = Outbox(folder, limit_bytes=full)
        found.append((time.process_time() - cpu, time.perf_counter() - wall))
        opened.close()
    return sorted(found)[4]
