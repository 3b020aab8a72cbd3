"""Fleet: what is asked of a device, and what it answers.

Rules:
* to ask is an act, and so is the answer: both are in the audit log;
* an ask is sent over MQTT once, and goes along with every answer to the device's polls until it is answered or has
  expired; the device carries it out once, however often it comes;
* an answer counts only from the device that was asked, to that ask, once, and while it is not long expired.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from lightship.storage import audit
from lightship.storage.audit import now_ms
from lightship.storage.models import Device, DeviceAsk
from lightship_agent.contract.codes import FleetError
from lightship_agent.contract.messages import ASKABLE, MAX_ASK_SECONDS, MAX_ASKED, Command, Reply

from .enrolment import known_device

#: Puts a command on its way to a device of a tenant; nobody knows whether it arrives.
Send = Callable[[str, str, str, Command], None]

VALID_SECONDS: Final = 300
#: So long after its end an answer is still taken: it may have been on its way.
LATE_MS: Final = 3_600_000
_AT_ONCE: Final = 500


def ask(
    session: Session,
    device: str,
    verb: str,
    *,
    actor: str,
    level: str = "",
    seconds: int = 0,
    valid: int = VALID_SECONDS,
) -> DeviceAsk:
    """Ask a device something; `send` and its polls bring it there.

    Args:
        session: a write session.
        device: its id.
        verb: rebirth, loglevel or snapshot.
        actor: who asks.
        level: of loglevel.
        seconds: of loglevel: for how long.
        valid: seconds within which the device must hear it.

    Raises:
        FleetError: fleet.unknown-device, fleet.device-state, fleet.unknown-ask.
    """
    row = known_device(session, device)
    if row.state != "active":
        raise FleetError("fleet.device-state", f"{device} is {row.state}: it hears nothing of us.")
    if verb not in ASKABLE or not 0 < valid <= MAX_ASK_SECONDS:
        known = ", ".join(ASKABLE)
        message = f"Expected one of {known}, valid for 1 to {MAX_ASK_SECONDS} s; found {verb!r}, {valid} s."
        raise FleetError("fleet.unknown-ask", message)
    now = now_ms()
    arguments = {"level": level, "seconds": seconds} if verb == "loglevel" else {}
    made = DeviceAsk(
        id=secrets.token_hex(8),
        device=device,
        verb=verb,
        arguments=arguments,
        asked_by=actor,
        asked_at=now,
        expires_at=now + valid * 1_000,
    )
    session.add(made)
    detail = {"verb": verb, "id": made.id, **arguments}
    audit.append(session, actor=actor, verb="device.ask", subject=device, detail=detail)
    return made


def send(session: Session, by: Send) -> int:
    """Put on its way what was not sent yet; how many."""
    now = now_ms()
    waiting = select(DeviceAsk, Device.tenant).join(Device, Device.id == DeviceAsk.device)
    waiting = waiting.where(DeviceAsk.sent_at == 0, DeviceAsk.answered_at == 0, DeviceAsk.expires_at > now)
    found = session.execute(waiting.order_by(DeviceAsk.asked_at).limit(_AT_ONCE)).all()
    for row, tenant in found:
        by(tenant, row.device, row.verb, command_of(row))
        row.sent_at = now
    return len(found)


def waiting_for(session: Session, device: str) -> tuple[tuple[str, Command], ...]:
    """What a device was asked and has not answered, for the answer to its poll."""
    mine = (DeviceAsk.device == device, DeviceAsk.answered_at == 0, DeviceAsk.expires_at > now_ms())
    rows = session.scalars(select(DeviceAsk).where(*mine).order_by(DeviceAsk.asked_at).limit(MAX_ASKED))
    return tuple((row.verb, command_of(row)) for row in rows)


def answered(session: Session, device: str, reply: Reply, now: int) -> bool:
    """Keep what a device answers; False where it was not asked that, or has answered."""
    row = session.get(DeviceAsk, reply.id)
    if row is None or (row.device, row.verb) != (device, reply.verb):
        return False
    if row.answered_at or now > row.expires_at + LATE_MS:
        return False
    row.answered_at, row.code, row.detail, row.answer = now, reply.code, reply.detail, reply.body
    detail = {"verb": row.verb, "id": row.id, **({"code": reply.code} if reply.code else {})}
    audit.append(session, actor=f"device:{device}", verb="device.answer", subject=device, detail=detail)
    return True


def get(session: Session, ident: str) -> DeviceAsk:
    """One ask.

    Raises:
        FleetError: fleet.unknown-ask.
    """
    row = session.get(DeviceAsk, ident)
    if row is None:
        remedy = "See `lightship device asked DEVICE`."
        raise FleetError("fleet.unknown-ask", f"Nothing was asked under {ident!r}.", remedy=remedy)
    return row


def of_device(session: Session, device: str, limit: int = 50) -> list[DeviceAsk]:
    """What a device was asked, the latest first."""
    mine = select(DeviceAsk).where(DeviceAsk.device == device)
    return list(session.scalars(mine.order_by(DeviceAsk.asked_at.desc()).limit(limit)))


def facts(row: DeviceAsk, now: int) -> dict[str, Any]:
    """An ask and its answer, as plain data."""
    return {
        "id": row.id,
        "device": row.device,
        "verb": row.verb,
        **row.arguments,
        "state": _state(row, now),
        "asked_by": row.asked_by,
        "asked_at": row.asked_at,
        "expires_at": row.expires_at,
        "answered_at": row.answered_at,
        "code": row.code,
        "detail": row.detail,
        "answer": _json(row.answer),
    }


def _state(row: DeviceAsk, now: int) -> str:
    if row.answered_at:
        return "refused" if row.code else "answered"
    if row.expires_at <= now:
        return "expired"
    return "sent" if row.sent_at else "waiting"


def command_of(row: DeviceAsk) -> Command:
    """The command that asks it."""
    arguments = row.arguments
    return Command(
        id=row.id,
        expires=row.expires_at // 1_000,
        level=str(arguments.get("level", "")),
        seconds=int(arguments.get("seconds", 0)),
    )


def _json(answer: bytes) -> Any:
    try:
        return json.loads(answer) if answer else None
    except (ValueError, RecursionError):
        return answer.decode(errors="replace")[:2_000]
