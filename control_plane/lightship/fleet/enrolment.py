"""Fleet: join tokens, enrolment, renewal, revocation.

Rules:
* of a token's secret only the hash is stored; a token is consumed and its device created in one transaction;
* the same request again within ten minutes (same token, same key) gets a certificate again, because answers get lost;
* a revoked id can be enrolled again only with a token that the operator bound to it;
* a certificate is never enough: the device's state in the database is looked up on every request.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from lightship.storage import audit
from lightship.storage.models import Device, JoinToken
from lightship_agent.contract.codes import EnrolError, FleetError
from lightship_agent.contract.device_api import parse_token
from lightship_agent.contract.names import check_name

from .ca import CertificateAuthority, Issued

RETRY_MS: Final = 600_000


def create_token(
    session: Session,
    ca: CertificateAuthority,
    *,
    group: str,
    labels: dict[str, Any],
    device: str | None,
    uses: int,
    ttl_seconds: int,
    actor: str,
) -> str:
    """A new join token, `id.secret.pin`; shown once and never stored.

    Raises:
        InvalidNameError: name.invalid.
    """
    check_name("group", group)
    if device is not None:
        check_name("device id", device)
    token_id, secret = secrets.token_hex(6), secrets.token_urlsafe(24)
    now = audit.now_ms()
    session.add(
        JoinToken(
            id=token_id,
            secret_hash=_hash(secret),
            group=group,
            labels=labels,
            device=device,
            uses_left=uses,
            expires_at=now + ttl_seconds * 1_000,
            created_at=now,
            created_by=actor,
        )
    )
    detail = {"group": group, "device": device, "uses": uses, "ttl_seconds": ttl_seconds}
    audit.append(session, actor=actor, verb="token.create", subject=token_id, detail=detail)
    return f"{token_id}.{secret}.{ca.pin()}"


def enrol(
    session: Session, ca: CertificateAuthority, *, token: str, device: str, csr: str, tenant: str
) -> tuple[Device, Issued]:
    """Consume the token, create the device, certify its key.

    Raises:
        EnrolError: enrol.token, enrol.request, enrol.taken; nothing was consumed.
    """
    issued = ca.issue_device(csr, device)
    found = session.get(Device, device)
    row = _valid_token(session, token, device)
    now = audit.now_ms()
    if found is not None and found.state == "active":
        if found.spki != issued.spki or now - found.enrolled_at > RETRY_MS:
            raise EnrolError(
                "enrol.taken", f"{device!r} is already enrolled.", remedy="Choose another id, or revoke it first."
            )
        return found, issued
    if found is not None and row.device != device:
        remedy = (
            f"Choose another id, or ask for a token that is bound to it: `lightship device token --device {device}`."
        )
        raise EnrolError("enrol.taken", f"{device!r} was revoked.", remedy=remedy)
    if row.uses_left < 1:
        raise EnrolError(
            "enrol.token", "The join token is used up.", remedy="Ask for one with `lightship device token`."
        )
    row.uses_left -= 1
    if found is not None:
        # A device that was wiped or replaced begins anew; its history is kept in the other tables.
        session.delete(found)
        session.flush()
    enrolled = Device(
        id=device,
        tenant=tenant,
        group=row.group,
        labels=row.labels,
        state="active",
        spki=issued.spki,
        cert_serial=issued.serial,
        cert_not_after=int(issued.not_after.timestamp() * 1_000),
        enrolled_at=now,
        running=[],
        health={},
        degraded=[],
    )
    session.add(enrolled)
    detail = {"token": row.id, "group": row.group, "key": issued.spki[:16]}
    audit.append(session, actor=f"device:{device}", verb="device.enrol", subject=device, detail=detail)
    return enrolled, issued


def renew(session: Session, ca: CertificateAuthority, *, device: str, csr: str) -> Issued:
    """A fresh certificate for a fresh key of an active device.

    Raises:
        EnrolError: enrol.revoked, enrol.request.
    """
    row = active_device(session, device)
    issued = ca.issue_device(csr, device)
    # The answer may get lost: the old key stays good until the new one is seen.
    row.spki_next, row.cert_serial = issued.spki, issued.serial
    row.cert_not_after = int(issued.not_after.timestamp() * 1_000)
    audit.append(
        session, actor=f"device:{device}", verb="device.renew", subject=device, detail={"key": issued.spki[:16]}
    )
    return issued


def revoke(session: Session, device: str, *, actor: str, reason: str) -> None:
    """Refuse the device from its next request on.

    Raises:
        FleetError: fleet.unknown-device.
    """
    row = session.get(Device, device)
    if row is None:
        raise FleetError("fleet.unknown-device", f"No device {device!r}.")
    row.state = "revoked"
    audit.append(session, actor=actor, verb="device.revoke", subject=device, detail={"reason": reason})


def active_device(session: Session, device: str) -> Device:
    """The device, if it may still speak to us.

    Raises:
        EnrolError: enrol.revoked, enrol.certificate.
    """
    row = session.get(Device, device)
    if row is None:
        raise EnrolError("enrol.certificate", f"No device {device!r} is enrolled here.")
    if row.state != "active":
        raise EnrolError("enrol.revoked", f"Device {device!r} is {row.state}.")
    return row


def check_key(session: Session, device: Device, spki: str) -> None:
    """Refuse a key that is not the device's; the first use of a renewed key retires the one before.

    Raises:
        EnrolError: enrol.certificate.
    """
    if spki == device.spki:
        return
    if not device.spki_next or spki != device.spki_next:
        raise EnrolError("enrol.certificate", "The certificate's key is not the registered one.")
    device.spki, device.spki_next = device.spki_next, ""
    session.flush()


def _valid_token(session: Session, token: str, device: str) -> JoinToken:
    parsed = parse_token(token)
    row = session.scalars(select(JoinToken).where(JoinToken.id == parsed.token_id)).one_or_none()
    # One message for all of these: an answer must not tell a stranger which part was right.
    refused = EnrolError("enrol.token", "The join token is unknown, expired, or meant for another device.")
    if row is None or not hmac.compare_digest(row.secret_hash, _hash(parsed.secret)):
        raise refused
    if row.expires_at < audit.now_ms() or row.device not in (None, device):
        raise refused
    return row


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
