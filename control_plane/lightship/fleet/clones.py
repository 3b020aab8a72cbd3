"""Fleet: the same identity in use twice is noticed.

Every run of an agent has a random name of its own, its instance, and says it with each HTTPS request. Of one device one
instance follows another: what was superseded is never heard again. Two devices with the same key take turns.

    heard            one device                            is it a clone?
    A A A B B B      it restarted, was reset, or got an    no: A is never heard again
                     older copy of its disk back
    A A B A          A's last request came late            no: once, and within the minute
    A B A B A        nothing that one device does          yes: A was heard twice more than a minute after B began
    old key, new key, old key again                        yes: a copy from before a renewal, beside the device

Rules:
* only requests that wait for an answer count: a report that a broker kept for hours says nothing about who lives;
* a restart is written down, a request in between is not: what is usual costs no write;
* a clone is said, once: as an audit event, on the device, in a metric. Nobody is locked out for it, because which of
  the two is the copy is for the operator to find out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from lightship.storage import audit
from lightship.storage.models import Device, DeviceInstance

#: A request is answered, or given up, within a minute: who is heard later than that is alive.
LATE_MS: Final = 60_000
#: A device that renews still has requests under way with the key before.
GRACE_MS: Final = 600_000
RETURNS: Final = 2
_KEPT: Final = 20
_HEADER: Final = re.compile(r"([0-9a-f]{16}):([0-9]{1,15})")


class Instance(NamedTuple):
    """One run of an agent."""

    name: str
    boot: int


class Heard(NamedTuple):
    """What is known of an instance. Times are milliseconds of the server's clock."""

    name: str
    first: int
    returns: int


def parse_header(text: str) -> Instance | None:
    """The instance a request names; None where it names none that can be believed."""
    match = _HEADER.fullmatch(text)
    return Instance(match[1], int(match[2])) if match else None


def has_returned(known: Sequence[Heard], current: str, name: str, now: int) -> bool:
    """Whether an instance is heard that another one had superseded more than a minute ago.

    Args:
        known: the device's instances.
        current: the name of the one heard last.
        name: the one that is heard now.
        now: milliseconds.
    """
    first = {h.name: h.first for h in known}
    if name not in first or name == current or current not in first:
        return False
    successor = max(first[current], first[name])
    return now - successor > LATE_MS


def is_clone(known: Sequence[Heard]) -> bool:
    """Whether these are the instances of more than one device."""
    return any(h.returns >= RETURNS for h in known)


def heard(session: Session, device: Device, instance: Instance, address: str, now: int) -> None:
    """Note that this instance asks now, and not the one that asked before."""
    if device.instance == instance.name:
        return
    rows = list(session.scalars(select(DeviceInstance).where(DeviceInstance.device == device.id)))
    by_name = {r.instance: r for r in rows}
    row = by_name.get(instance.name)
    known = [Heard(r.instance, r.first_seen, r.returns) for r in rows]
    if row is None:
        row = DeviceInstance(device=device.id, instance=instance.name, first_seen=now, returns=0)
        session.add(row)
        for old in sorted(rows, key=lambda r: r.last_seen)[: -_KEPT + 1]:
            session.delete(old)
    elif has_returned(known, device.instance, instance.name, now):
        row.returns += 1
    row.boot, row.address, row.last_seen = instance.boot, address[:64], now
    if device.instance in by_name:
        by_name[device.instance].last_seen = max(by_name[device.instance].last_seen, row.first_seen)
    device.instance = instance.name
    if row.returns >= RETURNS:
        addresses = sorted({r.address for r in (*rows, row)})
        _say(session, device, {"why": "instances take turns", "instances": len(rows), "addresses": addresses}, now)
    session.flush()


def old_key_shown(session: Session, device: Device, spki: str, now: int) -> bool:
    """Note a valid certificate over the key that the device has replaced; False where that is none of its keys.

    Seen once, it is a device that got an older copy of its disk back: it is refused, and has to be enrolled anew. Seen
    again after the present key was used, the copy and the device are two.
    """
    if not spki or spki != device.retired_spki:
        return False
    if now - device.retired_at <= GRACE_MS:
        return True
    used_between = device.clone.get("registered_again", 0) - LATE_MS > device.retired_seen > 0
    if used_between:
        _say(session, device, {"why": "the key before the renewal is in use beside the present one"}, now)
    if not device.retired_seen:
        detail = {"key": spki[:16]}
        audit.append(session, actor=f"device:{device.id}", verb="device.old-key", subject=device.id, detail=detail)
    if not device.retired_seen or used_between:
        device.retired_seen = now
    session.flush()
    return True


def must_note_key(device: Device, now: int) -> bool:
    """Whether the registered key's use is worth a note now: its old one was shown, more than a minute ago."""
    seen = device.retired_seen
    return bool(seen) and not device.cloned_at and device.clone.get("registered_again", 0) <= seen < now - LATE_MS


def note_key(session: Session, device: Device, now: int) -> None:
    """Note that the registered key was used after the old one was shown."""
    device.clone = {**device.clone, "registered_again": now}
    session.flush()


def clear(session: Session, device: Device, *, actor: str, reason: str) -> None:
    """Take the flag away: the operator has seen to it."""
    device.cloned_at, device.clone, device.retired_seen = 0, {}, 0
    for row in session.scalars(select(DeviceInstance).where(DeviceInstance.device == device.id)):
        row.returns = 0
    audit.append(session, actor=actor, verb="device.clear-clone", subject=device.id, detail={"reason": reason})


def _say(session: Session, device: Device, evidence: dict[str, Any], now: int) -> None:
    if device.cloned_at:
        return
    device.cloned_at, device.clone = now, evidence
    audit.append(session, actor="lightship:clones", verb="device.clone", subject=device.id, detail=evidence)
