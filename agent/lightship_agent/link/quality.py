"""Link: how good the way to the broker is, from what is sent over it anyway.

Rules: pure; times come in; what is never answered is forgotten with the connection.
"""

from __future__ import annotations

from typing import Final

#: As TCP smooths its own: one part new in eight.
_NEW: Final = 1 / 8
_MOST: Final = 100


class LinkQuality:
    """Sessions that were begun, and the time from a publish to its answer. One thread publishes, one is answered."""

    def __init__(self) -> None:
        self.connections = 0
        self.rtt: float | None = None  # seconds, smoothed
        self._under_way: dict[int, float] = {}

    def connected(self) -> None:
        """A session has begun: numbers of the one before mean nothing any more."""
        self.connections += 1
        self._under_way = {}

    def sent(self, number: int, now: float) -> None:
        """A message went out; `now`: monotonic seconds."""
        if len(self._under_way) < _MOST:
            self._under_way[number] = now

    def answered(self, number: int, now: float) -> None:
        """The broker has answered it."""
        at = self._under_way.pop(number, None)
        if at is not None:
            took = max(0.0, now - at)
            self.rtt = took if self.rtt is None else self.rtt + _NEW * (took - self.rtt)

    def numbers(self) -> dict[str, float]:
        """For a report: link_connections, and link_rtt_ms once something was answered."""
        rtt = {} if self.rtt is None else {"link_rtt_ms": round(self.rtt * 1_000, 3)}
        return {"link_connections": self.connections, **rtt}
