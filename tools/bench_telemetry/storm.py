"""Bench telemetry: ten thousand devices come back to a broker that was away; the agent's own pauses, no network.

Each device loses its connection at the moment the broker dies, and tries again after pauses that the agent's link
draws, until the broker is back. The window of jitter is the time in which 95 of a hundred have come back.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Final

from lightship_agent.link.mqtt import retry_pause

DEVICES: Final = 10_000


@dataclass(frozen=True)
class Storm:
    """How they came back after the broker was away for so long."""

    away: float  # seconds
    window: float  # seconds in which nearly all came
    mean: float  # connections a second
    peak: float

    @property
    def ratio(self) -> float:
        """Of the worst tenth of the window to its mean."""
        return self.peak / self.mean


def measure() -> list[Storm]:
    """After a blink, a restart, and longer, up to an outage in which all pauses have grown to their bound."""
    return [_storm(away) for away in (0.0, 10.0, 30.0, 120.0, 3_600.0)]


def _storm(away: float) -> Storm:
    chance = random.Random(10)
    arrivals = sorted(_comes_back(away, chance) for _ in range(DEVICES))
    window = arrivals[int(0.95 * DEVICES)]
    counts = Counter(int(at / window * 10) for at in arrivals if at < window)
    return Storm(away, window, 0.95 * DEVICES / window, max(counts.values()) / window * 10)


def _comes_back(away: float, chance: random.Random) -> float:
    at, attempt = 0.0, 0
    while at <= away:
        at += retry_pause(attempt, uniform=chance.uniform)
        attempt += 1
    return at - away
