"""Monitor: whether the device is at its limits: heat, power, memory; from /proc and /sys.

    hot       a thermal zone at a trip point that slows the processor, a cooling device that holds it back, a
              throttling counter that has grown, or a board's own word for it
    memory    little is left for programs, or all of them stood still for want of it

Rules:
* a source that is missing or unreadable says nothing; nothing here may stop the agent;
* a counter says something only once it has been read twice, and for a minute after it has grown.

Sources: the kernel's thermal sysfs API, x86 thermal_throttle, PSI, the Raspberry Pi firmware's get_throttled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

HOT: Final = "device.throttled"
MEMORY: Final = "device.memory"
_SLOWING: Final = {"passive", "hot", "critical"}
_HOLDING: Final = ("cpufreq", "processor")
_REMEMBERED: Final = 60.0  # s
_SCARCE: Final = 0.05  # of all memory
_STALLED: Final = 10.0  # percent of ten seconds in which every program waited for memory
_NOW: Final = 0xF  # under-voltage, frequency capped, throttled, soft temperature limit


class Strain:
    """Looks when asked, and remembers counters from one look to the next.

    Args:
        root: where proc and sys are mounted.
        clock: monotonic seconds.
    """

    def __init__(self, root: Path = Path("/"), *, clock: Callable[[], float] = time.monotonic) -> None:
        self._sys, self._proc = root / "sys", root / "proc"
        self._clock = clock
        self._throttled: int | None = None  # events as counted at the last look
        self._grew_at = -_REMEMBERED

    def codes(self) -> list[str]:
        """What the device is strained by now."""
        found = [HOT] if self._is_held_back() or self._is_at_trip_point() or self._has_throttled() else []
        return [*found, MEMORY] if self._is_short_of_memory() else found

    def _is_held_back(self) -> bool:
        for device in self._sys.glob("class/thermal/cooling_device*"):
            if _word(device / "type").startswith(_HOLDING) and _number(device / "cur_state") > 0:
                return True
        board = _word(self._sys / "devices/platform/soc/soc:firmware/get_throttled")
        with suppress(ValueError):
            return bool(int(board, 16) & _NOW)
        return False

    def _is_at_trip_point(self) -> bool:
        for zone in self._sys.glob("class/thermal/thermal_zone*"):
            heat = _number(zone / "temp")
            for kind in zone.glob("trip_point_*_type"):
                at = _number(kind.with_name(kind.name.removesuffix("type") + "temp"))
                if _word(kind) in _SLOWING and 0 < at <= heat:
                    return True
        return False

    def _has_throttled(self) -> bool:
        counts = list(self._counts())
        if counts:
            before, self._throttled = self._throttled, sum(counts)
            if before is not None and self._throttled > before:
                self._grew_at = self._clock()
        return self._clock() - self._grew_at < _REMEMBERED

    def _counts(self) -> Iterator[int]:
        for path in self._sys.glob("devices/system/cpu/cpu*/thermal_throttle/*_throttle_count"):
            yield max(0, _number(path))

    def _is_short_of_memory(self) -> bool:
        fields = dict(line.split(":", 1) for line in _text(self._proc / "meminfo").splitlines() if ":" in line)
        with suppress(KeyError, ValueError, IndexError):
            whole, left = (int(fields[key].split()[0]) for key in ("MemTotal", "MemAvailable"))
            if left < _SCARCE * whole:
                return True
        for line in _text(self._proc / "pressure/memory").splitlines():
            with suppress(ValueError, IndexError):
                if line.startswith("full") and float(line.split()[1].removeprefix("avg10=")) >= _STALLED:
                    return True
        return False


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _word(path: Path) -> str:
    return _text(path).strip().lower()


def _number(path: Path) -> int:
    try:
        return int(_text(path))
    except ValueError:
        return -1
