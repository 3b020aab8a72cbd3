"""Monitoring: faults of data that a device found by itself, as alarms.

Rules:
* the device decides; what it says begins opens one alarm, and what it says is over closes it;
* a beginning that is told twice opens nothing more, an end without a beginning closes nothing;
* a heartbeat without any code of `data.*` among what degrades the device ends all of them: it serves another bundle
  since, or has begun anew and looks again.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from lightship.storage import audit
from lightship.storage.models import Alarm, Device
from lightship_agent.contract.messages import Fault

ACTOR = "lightship:monitoring"
KIND = "data"
#: Alarms of data that stand, of which each heartbeat's device is looked for by hand: mostly there are few, or none.
_FEW: Final = 200

_WORDS = {
    "stuck": "does not move any more",
    "unit": "is measured in another unit",
    "swapped": "has the values of another feature",
    "missing": "is missing",
    "range": "is beyond what training saw",
    "category": "has unknown categories",
}


def note_fault(session: Session, device: Device, fault: Fault) -> None:
    """Open or close the alarm of a fault."""
    of_it = (fault.digest, fault.kind, fault.feature)
    same = [a for a in _standing(session, [device.id]) if (a.digest, *_subject(a)) == of_it]
    if fault.raised and not same:
        _open(session, device, fault)
    elif not fault.raised:
        for alarm in same:
            _close(session, alarm, fault.t, "it is over")


def end_faults(session: Session, well: Collection[str], now: int) -> None:
    """Close what stands of devices that say they are well."""
    query = select(Alarm.device).where(Alarm.kind == KIND, Alarm.closed_at.is_(None)).limit(_FEW) if well else None
    ill = set(session.scalars(query)) if query is not None else set()
    for alarm in _standing(session, well if len(ill) == _FEW else ill.intersection(well)) if ill else ():
        _close(session, alarm, now, "the device says nothing of it any more")


def says_of_data(degraded: object) -> bool:
    """Whether a fault of data is among the codes of what degrades a device."""
    return isinstance(degraded, list | tuple) and any(str(code).startswith("data.") for code in degraded)


def _close(session: Session, alarm: Alarm, at: int, reason: str) -> None:
    alarm.closed_at = at
    audit.append(session, actor=ACTOR, verb="alarm.close", subject=alarm.id, detail={"reason": reason})


def _open(session: Session, device: Device, fault: Fault) -> None:
    words = _WORDS.get(fault.kind, fault.kind)
    share = "" if fault.rate >= 1 else f" in {fault.rate:.0%} of its rows"
    alarm = Alarm(
        id=secrets.token_hex(6),
        kind=KIND,
        model=fault.model,
        digest=fault.digest,
        device=device.id,
        level="critical",
        sentence=f"{device.id}: {fault.feature} {words}{share}.",
        evidence={"kind": fault.kind, "feature": fault.feature, "window": fault.w, "rate": fault.rate},
        opened_at=fault.t,
    )
    session.add(alarm)
    detail = {
        "kind": KIND,
        "model": alarm.model,
        "device": device.id,
        "level": alarm.level,
        "sentence": alarm.sentence,
    }
    audit.append(session, actor=ACTOR, verb="alarm.open", subject=alarm.id, detail=detail)


def _standing(session: Session, devices: Collection[str]) -> list[Alarm]:
    query = select(Alarm).where(Alarm.kind == KIND, Alarm.closed_at.is_(None), Alarm.device.in_(devices))
    return list(session.scalars(query))


def _subject(alarm: Alarm) -> tuple[str, str]:
    return str(alarm.evidence.get("kind", "")), str(alarm.evidence.get("feature", ""))
