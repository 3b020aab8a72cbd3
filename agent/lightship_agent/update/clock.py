"""Update: what time it is on a device whose clock may know nothing.

    <state>/latest-time    the latest authenticated time, in Unix seconds

A board without a battery wakes in 1970, where nothing has expired yet: a list from last year, replayed, would look
fresh. So time never falls below the day this agent was made, nor below the latest time that somebody we trust stated.

Rules:
* `now` is the system's clock, or the floor plus the time this process has run since, whichever is later;
* only authenticated statements raise the floor: a verified assignment's `issued`, the Date header of a server whose
  certificate was checked. The system's clock itself raises nothing: NTP is not authenticated, and a clock that jumped
  to 2099 must be forgotten once it is set right;
* a statement that is ahead of every clock we have moves the floor by at most a day, and such a step is taken at most
  once an hour: a control plane whose own clock ran away for an hour costs a day, which fresh metadata outlives, and not
  the device. A board that slept for a month catches up in a day and a half, and meanwhile is no worse off than before;
* the file is written when it gains ten minutes, so that the flash sees a write now and then and not at every poll;
* a floor that can't be read or written is no reason not to serve.
"""

from __future__ import annotations

import ctypes
import logging
import math
import threading
import time
from collections.abc import Callable
from datetime import UTC
from pathlib import Path
from typing import Final, Literal

from lightship_agent.contract.codes import StorageError
from lightship_agent.files import write_durably

log = logging.getLogger(__name__)

#: This code is not older than that (2026-11-01T00:00:00Z). Moved forward with a release, never back.
BUILT: Final = 1_793_491_200.0
FILE: Final = "latest-time"
STEP: Final = 86_400.0  # seconds that one statement ahead of every clock may move the floor
STEP_EVERY: Final = 3_600.0  # seconds between such steps
_TOLERATED: Final = 300.0  # seconds
_WORTH_WRITING: Final = 600.0  # seconds
_TIME_ERROR: Final = 5  # adjtimex: the clock is not synchronised
_LAST: Final = 253_402_300_799.0  # the end of the year 9999: what is above is no time


def synchronised() -> bool:
    """Whether the kernel says that something keeps its clock in step (adjtimex(2); any NTP service tells it).

    False where it can't be asked.
    """
    # All zero asks without changing anything; `struct timex` has 208 bytes on 64-bit machines, fewer on others.
    asked = ctypes.create_string_buffer(512)
    try:
        state = ctypes.CDLL(None).adjtimex(asked)
    except (OSError, AttributeError):
        return False
    return 0 <= int(state) < _TIME_ERROR


def raised(floor: float, at: float, *, system: float, may_step: bool) -> float:
    """The floor after an authenticated statement.

    Args:
        floor: what it is never below now, Unix seconds.
        at: the time that was stated, Unix seconds.
        system: the system's clock, Unix seconds.
        may_step: whether the last step ahead of every clock is long enough ago.
    """
    if not math.isfinite(at):
        return floor
    reach = max(floor, system) + (STEP if may_step else 0.0)
    return max(floor, min(at, reach, _LAST))


def date_of(header: str) -> float:
    """Unix seconds of an HTTP Date header (RFC 9110 §5.6.7); not a number where it is none, which nobody believes."""
    from email.utils import parsedate_to_datetime  # not before there is an answer: it takes a while to load

    try:
        at = parsedate_to_datetime(header)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError):
        return math.nan


class DeviceClock:
    """This device's notion of now. Safe to use from several threads."""

    def __init__(
        self,
        state_dir: Path,
        *,
        built: float = BUILT,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        kept: Callable[[], bool] = synchronised,
    ) -> None:
        """Read the stored floor; what can't be read counts as none."""
        self._synchronised = kept
        self._path = state_dir / FILE
        self._wall = wall
        self._monotonic = monotonic
        self._stored = _read(self._path)
        self._floor = max(built, self._stored)
        self._floor_at = monotonic()
        self._stepped_at = -math.inf
        self._lock = threading.Lock()

    def now(self) -> float:
        """Unix seconds, never before the build of this agent nor the latest authenticated time."""
        with self._lock:
            return max(self._wall(), self._running_floor())

    @property
    def is_behind(self) -> bool:
        """Whether the system's clock is behind what was authenticated, by more than clocks differ."""
        with self._lock:
            return self._wall() < self._running_floor() - _TOLERATED

    @property
    def quality(self) -> Literal[0, 1, 2]:
        """What a time of the system's clock is worth: 0 nothing, 1 what its hardware says, 2 a time server's."""
        if self.is_behind:
            return 0
        return 2 if self._synchronised() else 1

    def authenticated(self, at: float) -> None:
        """Somebody whose signature or certificate was verified says that it is `at`, in Unix seconds, or later."""
        with self._lock:
            floor, system, monotonic = self._running_floor(), self._wall(), self._monotonic()
            new = raised(floor, at, system=system, may_step=monotonic - self._stepped_at >= STEP_EVERY)
            if new > max(floor, system):
                self._stepped_at = monotonic
            if new > floor:
                self._floor, self._floor_at = new, monotonic
            # What was stated, and not what the floor has run on to by itself.
            stated = min(at, new) if math.isfinite(at) else 0.0
            if stated - self._stored >= _WORTH_WRITING:
                self._write(stated)

    def _running_floor(self) -> float:
        return self._floor + max(0.0, self._monotonic() - self._floor_at)

    def _write(self, floor: float) -> None:
        try:
            write_durably(self._path, b"%d\n" % floor)
        except StorageError as e:
            log.warning("update: the latest time can't be kept: %s", e)
            return
        self._stored = floor


def _read(path: Path) -> float:
    try:
        with path.open("rb") as f:
            stored = float(f.read(32))
    except FileNotFoundError:
        return 0.0
    except (OSError, ValueError) as e:
        log.warning("update: %s can't be read and starts anew: %s", path, e)
        return 0.0
    return stored if 0.0 <= stored <= _LAST else 0.0
