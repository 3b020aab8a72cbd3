"""Alerting: what receivers read. Pure.

Rules: fields are added and never renamed; a receiver is told at most `LISTED` devices, and how many there are.
"""

from __future__ import annotations

from typing import Final

import msgspec

from .decide import Alert, Notice

LISTED: Final = 20


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """The alert as receivers see it; times are milliseconds, 0 for not yet."""

    id: str
    kind: str
    severity: str  # warning | critical; ok once it is over
    worst: str  # the worst it was
    sentence: str
    count: int  # of what is there, when it was told
    grouped: bool  # many findings of a kind in one alert
    devices: tuple[str, ...]  # the first of them; what is no device is named too: a role, a rollout
    groups: tuple[str, ...]
    opened_at: int
    resolved_at: int
    acknowledged_by: str


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message; `id` is the same however often it comes."""

    id: str
    event: str  # open | worse | remind | resolve | test
    at: int
    environment: str
    tenant: str
    alert: Told


def message(notice: Notice, environment: str, tenant: str) -> Message:
    """What is sent of a notice."""
    return Message(
        id=notice.id, event=notice.event, at=notice.at, environment=environment, tenant=tenant, alert=told(notice.alert)
    )


def told(alert: Alert) -> Told:
    """The alert as receivers see it."""
    over = alert.status == "resolved"
    members = list(alert.members.values()) if over else alert.present
    names = sorted({m.subject for m in members})
    return Told(
        id=alert.id,
        kind=alert.kind,
        severity="ok" if over else alert.severity,
        worst=alert.severity,
        sentence=alert.sentence,
        count=len(members),
        grouped=alert.grouped,
        devices=tuple(names[:LISTED]),
        groups=tuple(alert.groups[:LISTED]),
        opened_at=alert.opened_at,
        resolved_at=alert.resolved_at,
        acknowledged_by=alert.acked_by,
    )


def trial(now: int, environment: str, tenant: str, number: str) -> Message:
    """What `lightship alert test` sends."""
    alert = Told(
        id="test", kind="test", severity="warning", worst="warning", sentence="This is a test of the alert channel.",
        count=0, grouped=False, devices=(), groups=(), opened_at=now, resolved_at=now, acknowledged_by="",
    )  # fmt: skip
    return Message(id=f"test.{number}", event="test", at=now, environment=environment, tenant=tenant, alert=alert)


def subject(message: Message) -> str:
    """One line: how bad, and what."""
    word = {"resolve": "ok", "remind": f"still {message.alert.severity}", "test": "test"}
    return f"[{message.environment}] {word.get(message.event, message.alert.severity)}: {plain(message.alert.sentence)}"


def plain(text: str) -> str:
    """Text in one line that moves no cursor and begins no header: devices choose some of it."""
    return "".join(c if c.isprintable() else " " for c in text)[:500]
