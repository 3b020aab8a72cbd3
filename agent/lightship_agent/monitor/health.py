"""Monitor: how the device is, from /proc and /sys.

Rules:
* a source that is missing or unreadable is simply absent from the answer; nothing here may stop the agent;
* units are in the names: percent, MB (2²⁰ bytes), degrees Celsius, seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

_MB: Final = 1024 * 1024
_SENSIBLE_C: Final = range(-60, 200)
_MIN_TICKS: Final = 100  # of all CPUs together, 1 s of one: fewer say nothing


class CpuMeter:
    """Remembers the CPU times of an earlier reading, so that a later one tells the share since then.

    Heartbeat, status page and scrapes share one meter; a reading that comes too soon repeats the last answer.
    """

    def __init__(self) -> None:
        self._last: tuple[int, int] | None = None
        self._percent: float | None = None

    def percent(self, stat: Path) -> float:
        """Busy share of all CPUs, 0..100.

        Raises:
            ValueError: while there is nothing to compare with.
        """
        fields = [int(word) for word in stat.read_text().split("\n", 1)[0].split()[1:9]]
        idle, total = fields[3] + fields[4], sum(fields)
        if self._last is None:
            self._last = idle, total
        elif total - self._last[1] >= _MIN_TICKS:
            share = 1.0 - (idle - self._last[0]) / (total - self._last[1])
            self._percent = max(0.0, min(100.0, 100.0 * share))
            self._last = idle, total
        if self._percent is None:
            raise ValueError("no earlier reading")
        return self._percent


_METER: Final = CpuMeter()


def read_health(state_dir: Path, *, root: Path = Path("/"), meter: CpuMeter = _METER) -> dict[str, float]:
    """The device's health now.

    Args:
        state_dir: where the agent keeps its state; free disk space is measured there.
        root: where proc and sys are mounted.
        meter: carries CPU times from one reading to the next.

    Returns:
        Some of cpu_percent, load_1m, memory_self_mb, memory_available_mb, disk_free_mb, temperature_c, uptime_s.
    """
    proc = root / "proc"
    sources: dict[str, Callable[[], float]] = {
        "cpu_percent": lambda: meter.percent(proc / "stat"),
        "load_1m": lambda: float((proc / "loadavg").read_text().split()[0]),
        "memory_self_mb": lambda: _self_mb(proc / "self"),
        "memory_available_mb": lambda: _kb_field(proc / "meminfo", "MemAvailable") / 1024,
        "disk_free_mb": lambda: _free_mb(state_dir),
        "temperature_c": lambda: _hottest(root / "sys/class/thermal"),
        "uptime_s": lambda: float((proc / "uptime").read_text().split()[0]),
    }
    found: dict[str, float] = {}
    for name, read in sources.items():
        try:
            found[name] = round(read(), 3)
        except (OSError, ValueError, IndexError):
            continue
    return found


def _self_mb(own: Path) -> float:
    """PSS where the kernel tells it, else the resident set."""
    try:
        return _kb_field(own / "smaps_rollup", "Pss") / 1024
    except (OSError, ValueError):
        return _kb_field(own / "status", "VmRSS") / 1024


def _kb_field(path: Path, key: str) -> float:
    for line in path.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return float(line.split()[1])
    raise ValueError(key)


def _free_mb(folder: Path) -> float:
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize / _MB


def _hottest(zones: Path) -> float:
    readings = []
    for zone in sorted(zones.glob("thermal_zone*/temp")):
        try:
            celsius = int(zone.read_text()) / 1_000
        except (OSError, ValueError):
            continue
        if int(celsius) in _SENSIBLE_C:
            readings.append(celsius)
    return max(readings)
