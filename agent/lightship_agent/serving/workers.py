"""Serving: requests that take long, in threads: as many at once as are admitted, and none whose time is over.

Rules:
* a place inside is given back when the work has ended, and not when somebody stopped waiting for it: a client that
  leaves does not make room for another while the model still computes for it;
* work whose time is over, or whose client has left, before its turn comes is not begun;
* whoever waits hears that the time is over when it is, whatever the thread still does.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from lightship_agent.contract.codes import ServingError

from .slot import Admission

T = TypeVar("T")

HEADER: Final = b"request-timeout"
_MOST: Final = 86_400.0  # s


def time_allowed(headers: Mapping[bytes, bytes], default: float) -> float:
    """Seconds that a request may take in all.

    Args:
        headers: with or without Request-Timeout, in seconds.
        default: without it.

    Raises:
        ServingError: serving.malformed.
    """
    said = headers.get(HEADER)
    if said is None:
        return default
    try:
        seconds = float(said)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= _MOST:
        message = f"Request-Timeout: expected seconds from 0 to {_MOST:.0f}, found {said[:20].decode('latin-1')!r}."
        raise ServingError("serving.malformed", message)
    return seconds


def is_in_time(said: bytes, begun: float) -> bool:
    """Whether that Request-Timeout is one, and not over."""
    try:
        return time.monotonic() < begun + time_allowed({HEADER: said}, 0.0)
    except ServingError:
        return False


def check_in_time(ends: float) -> None:
    """Go on only before that moment, in monotonic seconds.

    Raises:
        ServingError: serving.deadline.
    """
    if time.monotonic() >= ends:
        raise ServingError("serving.deadline", "The time for this request is over; it was not answered in it.")


class _Place:
    """A place inside, given back once: by the thread after its work, or by whoever left before that began."""

    def __init__(self, admission: Admission) -> None:
        """Take it.

        Raises:
            ServingError: serving.overloaded.
        """
        admission.__enter__()
        self._admission = admission
        self._lock = threading.Lock()
        self._is_taken = False

    def take(self) -> bool:
        """Whether this is the first to take it: the thread to work, or the waiting one to give it back."""
        with self._lock:
            first, self._is_taken = not self._is_taken, True
        return first

    def give_back(self) -> None:
        self._admission.__exit__(None, None, None)


async def in_thread(admission: Admission, ends: float, work: Callable[[], T]) -> T:
    """What `work` gives, from one of the loop's threads.

    Args:
        admission: where it needs a place.
        ends: monotonic seconds; not begun, and not waited for, beyond it.
        work: raises ServingError.

    Raises:
        ServingError: serving.overloaded, serving.deadline, and what `work` raises.
    """
    place = _Place(admission)

    def run() -> T | None:
        if not place.take():
            return None  # nobody waits
        try:
            check_in_time(ends)
            return work()
        finally:
            place.give_back()

    try:
        async with asyncio.timeout_at(ends if math.isfinite(ends) else None):
            outcome = await asyncio.get_running_loop().run_in_executor(None, run)
    except TimeoutError:
        raise ServingError("serving.deadline", "The time for this request is over before it was answered.") from None
    finally:
        if place.take():
            place.give_back()
    assert outcome is not None
    return outcome
