"""Bench update: the memory of a whole agent before, during and after a check and an update.

Rules: PSS, from the kernel; of the agent alone and of it with its children; medians over fresh agents, each of which
serves a model, checks an assignment that brings nothing, and then gets a new model.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from crash_test.device import Device
from crash_test.plane import Plane, open_plane

from . import bundles

_MB: Final = 1024 * 1024
_STEP: Final = 0.02  # seconds between two looks
_CALM: Final = 6.0  # seconds of rest that count as before or after


@dataclass(frozen=True)
class Memory:
    """One agent's PSS in MB."""

    before: float
    check_peak: float  # the agent alone
    check_peak_all: float  # with its children
    after_check: float
    update_peak: float
    update_peak_all: float
    after_update: float

    @property
    def kept(self) -> float:
        """What the check did not give back."""
        return self.after_check - self.before


def measure(folder: Path, models: tuple[bytes, bytes], agents: int) -> list[Memory]:
    """So many agents, one after the other."""
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="bench-") as sockets, open_plane(folder) as plane:
        for version, model in enumerate(models, start=1):
            plane.release(bundles.bundle(model, version), version)
        return [_one(plane, f"m-{n}", folder / f"agent-{n}", Path(sockets)) for n in range(agents)]


def median(found: list[Memory]) -> dict[str, float]:
    """Of each figure, with what the check kept."""
    names = list(vars(found[0]))
    medians = {name: statistics.median(getattr(m, name) for m in found) for name in names}
    return {**medians, "kept": statistics.median(m.kept for m in found)}


def _one(plane: Plane, name: str, folder: Path, sockets: Path) -> Memory:
    device = Device(plane, name, folder, sockets)
    try:
        device.commit(1)
        first = plane.assign(name, 1)
        device.start(POLL_SECONDS="3", SOAK_SECONDS="2")
        device.settles(1)
        _is_asked(plane, device, first)
        with _Watch(device.process.pid) as watch:
            before = watch.calm()
            watch.forget()
            _is_asked(plane, device, plane.assign(name, 1))
            after_check = watch.calm()
            check = watch.peaks
            watch.forget()
            plane.assign(name, 2)
            device.settles(2)
            after = watch.calm()
            found = Memory(before, *check, after_check, *watch.peaks, after)
        device.stop()
        print(f"  {name}: {vars(found)}", flush=True)
        return found
    finally:
        device.close()


def _is_asked(plane: Plane, device: Device, seq: int) -> None:
    """Wait until the device has accepted that assignment."""
    asked = len(plane.asked(device.name, "timestamp"))
    device.waits(lambda: len(plane.asked(device.name, "timestamp")) > asked, f"a check of assignment {seq}")


class _Watch:
    """Looks at an agent's memory again and again."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._over = threading.Event()
        self._alone = self._all = 0.0
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()

    @property
    def peaks(self) -> tuple[float, float]:
        """Of the agent, and of it with its children."""
        return self._alone, self._all

    def forget(self) -> None:
        """Peaks begin anew."""
        self._alone = self._all = 0.0

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
            self._alone = max(self._alone, own)
            self._all = max(self._all, own + sum(pss(child) for child in descendants(self._pid)))


def pss(pid: int) -> float:
    """A process's proportional set size in MB; 0 when it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024 / _MB
    return 0.0


def descendants(pid: int) -> list[int]:
    """The ids of its children, and of theirs."""
    found: list[int] = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(word) for word in tasks.read_text().split()]
    return found + [below for child in found for below in descendants(child)]
