"""Bench telemetry: where we lose, from what this run has measured. No figure of another run is in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .cost import Cost, Steady
from .daily import Day
from .proof import Proof
from .storm import Storm


def of_devices(days: Sequence[Day], limit: float) -> Iterator[str]:
    """What another cadence than the default would cost; the default is the first."""
    for other in days[1:]:
        usual = days[0]
        word = "more" if other.wire > limit else "less"
        yield (
            f"A report every {other.report_seconds:g} s is {other.wire / usual.wire:.1f} times the bytes of one every "
            f"{usual.report_seconds:g} s, and {word} than a device may send a day: what can't wait is sent at once."
        )


def of_costs(costs: Sequence[Cost]) -> Iterator[str]:
    """What the dearer ways of ingest cost beside the cheaper ones, one report in a message."""
    single = {(c.history, c.protocol): c.report_micros for c in costs if c.batch == 1}
    for protocol in ("3.1.1", "5"):
        here, there = single.get(("sqlite", protocol)), single.get(("postgres", protocol))
        if here and there:
            yield (
                f"MQTT {protocol}: a report costs ingest {there:.0f} µs with its history on PostgreSQL, {here:.0f} µs "
                "in SQLite. Only the history is there: which reports of a device are stored is in the fleet's file, "
                "and ingest writes both."
            )
    old, new = single.get(("sqlite", "3.1.1")), single.get(("sqlite", "5"))
    if old and new:
        yield f"MQTT 5 costs ingest {new / old - 1:+.0%} CPU a report beside 3.1.1 (SQLite)."


def of_the_proof(proofs: Sequence[Proof]) -> Iterator[str]:
    """What is sent again, and what the proof is not."""
    for proof in proofs:
        if proof.overflowed:
            yield (
                f"{proof.resent:.1%} was sent again with {proof.broker}'s own queue: how much depends on how fast "
                "ingest catches up before it overflows again. The configuration that Lightship generates keeps more."
            )
    devices = sorted({proof.devices for proof in proofs if proof.devices})
    if devices:
        yield f"The proof's devices share a process and a disk, and they are {', '.join(map(str, devices))}."


def of_writers(steady: Sequence[Steady]) -> Iterator[str]:
    """What somebody waits for who writes beside ingest."""
    for s in steady:
        yield f"Who writes to the fleet's database beside ingest waited up to {s.slowest_ms:.0f} ms for it."


def of_crowds(storms: Sequence[Storm]) -> Iterator[str]:
    """The densest crowd."""
    for storm in sorted(storms, key=lambda s: s.mean)[-1:]:
        yield (
            f"A fleet that comes back after {storm.away:g} s comes at {storm.peak:,.0f} a second: more than one broker "
            "with mutual TLS takes in that moment (above)."
        )
