"""Bench update: a whole agent, before, during and after a check and an update: its memory, its CPU, its bytes.

Rules: PSS, from the kernel; of the agent alone and of it with its children. CPU is that of the agent and of all its
children, bytes are those on the wire, each from the assignment on until the device has settled. Medians over fresh
agents, each of which serves a model, checks an assignment that brings nothing, and then gets a new model.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from crash_test.device import Device
from crash_test.plane import Plane, open_plane

from . import bundles
from .listing import Listing
from .wire import Meter, metered

COUNTS: Final = (100, 10_000)
_MB: Final = 1024 * 1024
_STEP: Final = 0.02  # seconds between two looks
_CALM: Final = 6.0  # seconds of rest that count as before or after
_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Act:
    """What a check or an update took: MB of PSS at its peak and afterwards, seconds of CPU, bytes."""

    peak: float  # of the agent alone
    peak_all: float  # with its children
    after: float
    cpu: float
    wire: int


@dataclass(frozen=True)
class Agent:
    """One agent, and how many bundles were released."""

    bundles: int
    before: float  # MB of PSS
    check: Act
    update: Act

    @property
    def kept(self) -> float:
        """MB that the check did not give back."""
        return self.check.after - self.before


def measure(folder: Path, models: tuple[bytes, bytes], agents: int) -> list[Agent]:
    """So many agents for each length of the list, one after the other."""
    found = []
    for count in COUNTS:
        with (
            tempfile.TemporaryDirectory(prefix="bench-") as sockets,
            open_plane(folder) as plane,
            metered(plane.url) as link,
        ):
            plane.url = link.url
            plane.release(bundles.bundle(models[0], 1), 1)
            Listing(plane.home).pad(count - 1 - agents)
            scene = _Scene(plane, link, folder, Path(sockets), count)
            found += [scene.plays(number, bundles.bundle(models[1], number)) for number in range(2, 2 + agents)]
        shutil.rmtree(folder)
    return found


def median(found: list[Agent], count: int) -> Agent:
    """Of each figure, of the agents with a list of that length."""
    chosen = [a for a in found if a.bundles == count]
    acts = {
        name: Act(**{f: statistics.median(getattr(getattr(a, name), f) for a in chosen) for f in Act.__annotations__})
        for name in ("check", "update")
    }
    return Agent(count, statistics.median(a.before for a in chosen), acts["check"], acts["update"])


class _Scene:
    """A control plane, and the agents that come to it one after the other."""

    def __init__(self, plane: Plane, link: Meter, folder: Path, sockets: Path, count: int) -> None:
        self._plane = plane
        self._link = link
        self._folder = folder
        self._sockets = sockets
        self._count = count

    def plays(self, number: int, successor: bytes) -> Agent:
        """An agent that serves version 1, and is brought to a version that is released while it serves."""
        name = f"agent-{number}"
        device = Device(self._plane, name, self._folder / name, self._sockets)
        try:
            device.commit(1)
            self._plane.assign(name, 1)
            device.start(POLL_SECONDS="3", SOAK_SECONDS="2", REPORT_SECONDS="3600")
            device.settles(1)
            self._is_looked_at(device)
            with _Watch(device.process.pid, self._link) as watch:
                before = watch.calm()
                watch.begin()
                self._plane.assign(name, 1)
                self._is_looked_at(device)
                check = watch.end()
                self._plane.release(successor, number)
                watch.begin()
                self._plane.assign(name, number)
                device.settles(number)
                update = watch.end()
            device.stop()
        finally:
            device.close()
        found = Agent(self._count, before, check, update)
        print(f"  {self._count:,} bundles: {asdict(found)}", flush=True)
        return found

    def _is_looked_at(self, device: Device) -> None:
        """Wait until the device has looked at its latest assignment."""
        asked = len(self._plane.asked(device.name, "timestamp"))
        device.waits(lambda: len(self._plane.asked(device.name, "timestamp")) > asked, "a look at the release list")


class _Watch:
    """Looks at an agent again and again."""

    def __init__(self, pid: int, link: Meter) -> None:
        self._pid = pid
        self._link = link
        self._over = threading.Event()
        self._peak = self._peak_all = self._cpu = 0.0
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()

    def begin(self) -> None:
        """Something is going to happen."""
        self._peak = self._peak_all = 0.0
        self._cpu = cpu(self._pid)
        self._link.reset()

    def end(self) -> Act:
        """It has happened, or is about to end; what it took."""
        time.sleep(_CALM / 2)
        spent, wire = cpu(self._pid) - self._cpu, self._link.total
        peaks = self._peak, self._peak_all
        return Act(*peaks, self.calm(), spent, wire)

    def calm(self) -> float:
        """The median of a time without events."""
        time.sleep(_CALM / 2)
        seen = []
        end = time.monotonic() + _CALM / 2
        while time.monotonic() < end:
            seen.append(pss(self._pid))
            time.sleep(0.1)
        return statistics.median(seen)

    def _look(self) -> None:
        while not self._over.wait(_STEP):
            own = pss(self._pid)
            self._peak = max(self._peak, own)
            self._peak_all = max(self._peak_all, own + sum(pss(child) for child in descendants(self._pid)))


def cpu(pid: int) -> float:
    """Seconds of CPU of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / _TICKS


def pss(pid: int) -> float:
    """A process's proportional set size in MB; 0 when it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024 / _MB
    return 0.0


def descendants(pid: int) -> list[int]:
    """The ids of its children, and of theirs; not of one that has not become a program of its own yet."""
    found: list[int] = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(word) for word in tasks.read_text().split()]
    # Until it does, it shows the memory of its parent as its own.
    own = [child for child in found if _words(child) != _words(pid)]
    return own + [below for child in own for below in descendants(child)]


def _words(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
