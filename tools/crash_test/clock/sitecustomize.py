"""Crash test: what a process needs that runs under libfaketime, put on its path.

libfaketime 0.9.10 moves a wait for a moment of the monotonic clock by its offset, even where it is told to leave that
clock alone: Python's `time.sleep` then fails, or does not wait. A wait for some time is left alone.
"""

from __future__ import annotations

import select
import time


def _sleep(seconds: float) -> None:
    select.select([], [], [], seconds)


time.sleep = _sleep  # type: ignore[assignment]
