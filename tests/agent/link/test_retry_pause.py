"""How long a device waits before it tries its broker again: ten thousand that lost it together do not come together."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from lightship_agent.link import mqtt


@pytest.mark.parametrize("away", [0, 3, 10, 30, 120, 600, 3_600])
def test_a_fleet_comes_back_spread_over_its_window_of_jitter_however_long_the_broker_was_away(away: int) -> None:
    chance, arrivals = random.Random(10), list[float]()
    for _ in range(4_000):
        at, attempt = 0.0, 0
        while at <= away:
            at += mqtt.retry_pause(attempt, uniform=chance.uniform)
            attempt += 1
        arrivals.append(at - away)
    window = sorted(arrivals)[3_800]
    crowd = max(Counter(int(at / window * 10) for at in arrivals if at < window).values())
    assert crowd <= 2 * 380
