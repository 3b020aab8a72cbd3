"""Thousands of update machines in bad weather: whatever is cut or refused, the fleet gets where it was sent.

The devices are the real state machine; the world around them (networks that fail, power that goes, bundles that are
bad) is drawn from a seeded generator. Time is simulated: nothing waits.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import msgspec
import pytest

from lightship_agent.update import machine as m

DEVICES = 2_000
POLL = 900.0  # s
GOOD_OLD, BAD, GOOD_NEW = "a" * 64, "b" * 64, "c" * 64


@dataclass(frozen=True)
class Weather:
    """How often, of each step, the power goes or the network fails; and how often a good bundle fails by bad luck."""

    cut: float
    network: float
    luck: float


@dataclass
class SimulatedDevice:
    """A machine, its disk, and what it serves."""

    chance: random.Random
    weather: Weather
    disk: bytes = field(default_factory=lambda: msgspec.json.encode(m.UpdateState()))
    serving: str | None = None
    served: set[str] = field(default_factory=set)
    cuts: int = 0
    tries: int = 0

    def look(self, target: m.Target, now: float) -> None:
        """One look at the assignment, carried out to its end or to the next power cut."""
        if self.chance.random() < self.weather.network:
            return
        pending: m.Event | None = m.Assigned(target)
        while pending is not None:
            if self.chance.random() < self.weather.cut:
                self.cuts += 1
                pending = m.Started()
            state, actions = m.step(msgspec.json.decode(self.disk, type=m.UpdateState), pending, now)
            self.disk = msgspec.json.encode(state)
            pending = None
            for action in actions:
                pending = self.carry_out(action) or pending

    def carry_out(self, action: m.Action) -> m.Event | None:
        match action:
            case m.Fetch() | m.Reach():
                return m.Failed("link.unreachable") if self.chance.random() < self.weather.network else m.Advanced()
            case m.Try(target):
                self.tries += 1
                fails = target.sha256 == BAD or self.chance.random() < self.weather.luck
                return m.Failed("update.golden") if fails else m.Advanced()
            case m.Swap(target):
                self.serving = target.sha256
                self.served.add(target.sha256)
                return m.Advanced()
            case m.Restore(target):
                self.serving = target.sha256 if target else None
        return None

    @property
    def state(self) -> m.UpdateState:
        return msgspec.json.decode(self.disk, type=m.UpdateState)


def target(digest: str, seq: int) -> m.Target:
    return m.Target(
        model="pump", version=seq, path=f"bundles/pump/{seq}.tar", sha256=digest, length=1, seq=seq, rollout=f"ro-{seq}"
    )


def run(fleet: list[SimulatedDevice], wanted: m.Target, hours: float, now: float) -> float:
    """Every device looks at `wanted` each quarter of an hour; the time after it."""
    for look in range(int(hours * 3_600 / POLL)):
        for device in fleet:
            device.look(wanted, now + look * POLL)
    return now + hours * 3_600


@pytest.mark.parametrize(
    ("weather", "share"),
    [
        (Weather(0.0, 0.0, 0.0), 1.0),
        (Weather(0.01, 0.3, 0.0), 0.99),
        (Weather(0.05, 0.1, 0.02), 0.99),
        # Where every seventh step is cut, a good bundle often ends up in the penalty box too, and takes a day longer.
        (Weather(0.15, 0.5, 0.0), 0.80),
    ],
    ids=["calm", "bad network", "bad power", "storm"],
)
def test_a_fleet_gets_through_a_bad_release_to_a_good_one(weather: Weather, share: float) -> None:
    fleet = [SimulatedDevice(random.Random(n), weather) for n in range(DEVICES)]
    now = run(fleet, target(GOOD_OLD, 1), hours=30, now=1_000_000.0)
    assert sum(d.serving == GOOD_OLD for d in fleet) >= share * DEVICES

    now = run(fleet, target(BAD, 2), hours=6, now=now)

    # Nobody serves the bad one, nobody ever did, and nobody tried it more than the penalty box lets through.
    assert not any(BAD in d.served for d in fleet)
    assert sum(d.serving == GOOD_OLD for d in fleet) >= share * DEVICES
    assert max(len(d.state.penalties.get(BAD, m.Penalty()).failed_at) for d in fleet) <= m.MAX_TRIES

    run(fleet, target(GOOD_NEW, 3), hours=54, now=now)

    assert sum(d.serving == GOOD_NEW for d in fleet) >= share * DEVICES
    for device in fleet:
        state = device.state
        assert state.phase == "idle"
        assert device.serving == (state.current.sha256 if state.current else None)
        assert state.floor <= 3
