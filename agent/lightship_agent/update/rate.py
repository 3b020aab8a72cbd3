"""Update: a token bucket, how long to wait after so many bytes.

Rules:
* pure: the clock is passed in, the wait is told and not done;
* bytes that have come can't be refused, so they may leave the bucket in debt; the wait pays it back;
* a clock that goes back earns nothing and costs nothing.
"""

from __future__ import annotations

from typing import Final

#: Bytes in a kB of the setting `bandwidth_kbps`.
KILO: Final = 1_000


class TokenBucket:
    """At most `rate` bytes a second in the long run, and `burst` bytes at once."""

    def __init__(self, rate: float, burst: float | None = None) -> None:
        """A full bucket of `burst` bytes (what one second earns, unless told), earning `rate` bytes a second."""
        if not rate > 0:
            bug = f"a rate must be above 0, not {rate}"
            raise ValueError(bug)
        self.rate = rate
        self.burst = rate if burst is None else burst
        self._tokens = self.burst
        self._seen: float | None = None

    def take(self, amount: int, now: float) -> float:
        """Take `amount` bytes out at `now` (seconds on a clock that does not jump); seconds to wait before the next."""
        if self._seen is not None and now > self._seen:
            self._tokens = min(self.burst, self._tokens + (now - self._seen) * self.rate)
        self._seen = now
        self._tokens -= amount
        return max(0.0, -self._tokens / self.rate)


def bucket_for(kilobytes_per_second: int) -> TokenBucket | None:
    """The bucket of the setting `bandwidth_kbps`, which gives a quarter of a second at once; None without a cap."""
    rate = kilobytes_per_second * KILO
    return TokenBucket(rate, burst=rate / 4) if rate > 0 else None
