"""Alerting: what counts as wrong, from plain facts. Pure.

Rules:
* a device is silent when three of its report intervals have passed by our clock; while we ourselves listen for no
  longer than that, it may only seem so;
* what is counted up for ever (dropped reports) is wrong while it has grown within `RECENT`;
* every finding is one sentence with a name in it, and no secret.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from .decide import Finding, Severity

INTERVALS: Final = 3
RECENT: Final = 3_600_000
#: Dead letters within `RECENT`, in multiples of what is allowed, that are critical.
MANY_TIMES: Final = 10
DAY: Final = 86_400_000
#: An ingest worker says every few seconds that it is at work.
BEAT_LATE: Final = 120_000
#: A message that a channel has not taken for so long.
STUCK: Final = 900_000


class Heard(msgspec.Struct, frozen=True):
    """A device, and when it was heard last."""

    device: str
    group: str
    last: int


class Counted(msgspec.Struct, frozen=True):
    """A counter that only grows, as it was seen last, and when it had grown."""

    value: int
    grew_at: int = 0


class Standing(msgspec.Struct, frozen=True):
    """An open alarm of monitoring."""

    kind: str  # local | fleet | data, or what else monitoring opens
    model: str
    device: str
    group: str
    level: str
    sentence: str
    what: str = ""  # feature and fault


class Ending(msgspec.Struct, frozen=True):
    """A certificate."""

    name: str  # the device, or `ca` and `server`
    group: str
    until: int
    early: int  # how long before its end it is a finding


class Halted(msgspec.Struct, frozen=True):
    """A rollout that stands still or goes back."""

    id: str
    model: str
    version: int
    status: str
    reason: str


def silent(devices: Iterable[Heard], now: int, listening_since: int, interval: int) -> list[Finding]:
    """Devices of which nothing was heard for three intervals."""
    limit = INTERVALS * interval
    sure = now - listening_since > limit
    return [
        Finding(
            key=f"silent:{d.device}", kind="silent", severity="warning", subject=d.device, group=d.group, sure=sure,
            sentence=f"{d.device} has been silent for {INTERVALS} report intervals.",
        )
        for d in devices
        if now - d.last > limit
    ]  # fmt: skip


def drifting(alarms: Iterable[Standing]) -> list[Finding]:
    """What monitoring has an open alarm for."""
    found = []
    for a in alarms:
        kind = "data" if a.kind == "data" else "drift"
        key = ":".join(part for part in (kind, a.kind, a.model, a.device, a.what) if part)
        severity: Severity = "critical" if a.level == "critical" else "warning"
        subject = a.device or a.model
        found.append(
            Finding(key=key, kind=kind, severity=severity, subject=subject, group=a.group, sentence=a.sentence)
        )
    return found


def grown(before: Mapping[str, Counted], counters: Mapping[str, int], now: int, *, first: bool) -> dict[str, Counted]:
    """The counters that are new or other than before; at the `first` look nothing is said to have grown."""
    changed = {}
    for name, value in counters.items():
        known = before.get(name)
        if known is None or value != known.value:
            up = not first and value > (known.value if known else 0)
            changed[name] = Counted(value, now if up else (known.grew_at if known else 0))
    return changed


def dropping(counted: Mapping[str, Counted], groups: Mapping[str, str], now: int) -> list[Finding]:
    """Devices whose outbox dropped reports lately."""
    return [
        Finding(
            key=f"lost:{device}", kind="lost", severity="warning", subject=device, group=groups.get(device, ""),
            sentence=f"{device} has dropped reports from its full outbox, {c.value} in all.",
        )
        for device, c in counted.items()
        if c.grew_at and now - c.grew_at < RECENT
    ]  # fmt: skip


def ending(certificates: Iterable[Ending], now: int) -> list[Finding]:
    """Certificates near their end, or past it."""
    found = []
    for c in certificates:
        left = c.until - now
        if left >= c.early:
            continue
        ours = c.name in ("ca", "server")
        over = left <= 0
        remedy = {"ca": " Plan a new certificate authority.", "server": " Start `lightship up` anew."}.get(c.name, "")
        says = "has run out" if over else f"runs out in less than {_days(c.early)}"
        found.append(
            Finding(
                key=f"certificate:{c.name}", kind="certificate", subject=c.name, group=c.group,
                severity="critical" if over or ours else "warning",
                sentence=f"The certificate of {f'this server ({c.name})' if ours else c.name} {says}.{remedy}",
            )
        )  # fmt: skip
    return found


def degraded(devices: Iterable[tuple[str, str, list[str]]]) -> list[Finding]:
    """Devices that say what keeps them from doing all their work: device, group, codes."""
    found = []
    for device, group, codes in devices:
        other = sorted(c for c in codes if not c.startswith("data."))  # of those monitoring has alarms
        if other:
            sentence = f"{device} is degraded: {', '.join(other)}."
            found.append(
                Finding(
                    key=f"degraded:{device}", kind="degraded", severity="warning", subject=device, group=group,
                    sentence=sentence,
                )
            )  # fmt: skip
    return found


def cloned(devices: Iterable[tuple[str, str]]) -> list[Finding]:
    """Identities that two devices use: device, group."""
    return [
        Finding(
            key=f"clone:{device}", kind="clone", severity="critical", subject=device, group=group,
            sentence=f"The identity of {device} is in use twice.",
        )
        for device, group in devices
    ]  # fmt: skip


def halted(rollouts: Iterable[Halted]) -> list[Finding]:
    """Rollouts that were paused, or that went back."""
    return [
        Finding(
            key=f"rollout:{r.id}", kind="rollout", subject=r.id,
            severity="warning" if r.status == "paused" else "critical",
            sentence=f"Rollout {r.id} of {r.model}@{r.version} is {r.status}. {r.reason}".strip(),
        )
        for r in rollouts
    ]  # fmt: skip


def expiring(roles: Iterable[tuple[str, str, str]]) -> list[Finding]:
    """Roles of the release list that were not signed anew in time: role, state, sentence."""
    return [
        Finding(
            key=f"metadata:{role}", kind="metadata", severity="warning" if state == "due" else "critical", subject=role,
            sentence=f"Release metadata: {sentence}",
        )
        for role, state, sentence in roles
        if state != "ok"
    ]  # fmt: skip


def dead(count: int, allowed: int) -> list[Finding]:
    """Messages of the last hour that could not be understood."""
    if count <= allowed:
        return []
    return [
        Finding(
            key="dead-letters", kind="dead-letters", subject="ingest",
            severity="critical" if count > allowed * MANY_TIMES else "warning",
            sentence=f"More than {allowed} messages in an hour could not be understood; see `telemetry dead list`.",
        )
    ]  # fmt: skip


def missing(workers: Iterable[tuple[str, int]], now: int, listening_since: int) -> list[Finding]:
    """Ingest workers that give no sign of themselves: name, and when they did last."""
    sure = now - listening_since > BEAT_LATE
    return [
        Finding(
            key=f"ingest:{worker}",
            kind="ingest",
            severity="critical",
            subject=worker,
            sure=sure,
            sentence=f"The ingest worker {worker} is dead, stuck or cut off from the broker: reports wait.",
        )
        for worker, at in workers
        if now - at > BEAT_LATE
    ]


def stuck(oldest: Mapping[str, tuple[int, str]], now: int) -> list[Finding]:
    """Channels that take nothing: channel -> when the oldest message was due first, and the last code."""
    return [
        Finding(
            key=f"channel:{name}", kind="channel", severity="critical", subject=name,
            sentence=f"The alert channel {name} has taken nothing for {STUCK // 60_000} minutes: {code or '?'}.",
        )
        for name, (since, code) in oldest.items()
        if now - since > STUCK
    ]  # fmt: skip


def _days(ms: int) -> str:
    return f"{ms / DAY:g} {'day' if ms == DAY else 'days'}"
