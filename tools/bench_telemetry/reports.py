"""Bench telemetry: reports as devices send them, made by the contract's own code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from lightship_agent.contract import topics
from lightship_agent.contract.messages import Envelope, Heartbeat, Running
from lightship_agent.contract.wire import pack

from .site import TENANT

EPOCH: Final = "0123456789abcdef"
_HEALTH: Final = {
    "cpu_percent": 12.5, "memory_mb": 120.5, "memory_free_mb": 812.25, "disk_free_mb": 10_240.0, "temperature": 51.5,
    "load": 0.25, "uptime": 86_400.0, "outbox_records": 3.0, "outbox_dropped": 0.0, "link_rtt_ms": 21.5,
}  # fmt: skip


def beat(seq: int, at: int) -> Heartbeat:
    """A heartbeat of a device that serves one model."""
    running = Running(
        model="pump", version=3, digest="a" * 64, since=1_000, requests=seq, latency_ms=1.25, provider="cpu"
    )
    return Heartbeat(
        s=seq, t=at, running=(running,), agent="0.1.0", onnxruntime="1.32.0", machine="aarch64", health=_HEALTH
    )


def messages(devices: int, first: int, last: int, batch: int, now: int) -> Iterator[tuple[str, bytes]]:
    """Messages `first` to before `last` of a fleet in turn, with so many reports each: topic and payload."""
    for n in range(first, last):
        begins = n // devices * batch + 1
        records = tuple(beat(seq, now + seq) for seq in range(begins, begins + batch))
        envelope = Envelope(e=EPOCH, b=1, us=1, lo=1, r=records)
        yield topics.telemetry(TENANT, name(n % devices)), pack(envelope)


def name(n: int) -> str:
    """Of a device."""
    return f"device-{n}"
