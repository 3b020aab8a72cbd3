"""Fleet: join tokens, enrolment, renewal, revocation.

Rules:
* of a token's secret only the hash is stored; a token is consumed and its device created in one transaction;
* the same request again within ten minutes (same token, same key) gets a certificate again, because answers get lost;
* a revoked id can be enrolled again only with a token, or a preauthorisation, that the operator bound to it;
* a certificate is never enough: the device's state in the database is looked up on every request.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from lightship.storage import audit
from lightship.storage.models import Cut, Device, DeviceInstance, JoinToken, Preauthorisation
from lightship_agent.contract.codes import EnrolError, FleetError
from lightship_agent.contract.device_api import parse_token
from lightship_agent.contract.names import check_name

from . import certificates, preauthorisation
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
    preauthorised: bool = False,
    approval: bool = False,
) -> str:
    """A new join token, `id.secret.pin`; shown once and never stored.

    `preauthorised` lets in only devices that are listed, `approval` leaves them waiting for the operator's word.

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
            preauthorised=preauthorised,
            approval=approval,
        )
    )
    detail = {"group": group, "device": device, "uses": uses, "ttl_seconds": ttl_seconds}
    detail |= {"preauthorised": preauthorised, "approval": approval}
    audit.append(session, actor=actor, verb="token.create", subject=token_id, detail=detail)
    return f"{token_id}.{secret}.{ca.pin()}"


def enrol(
    session: Session, ca: CertificateAuthority, *, token: str, device: str, csr: str, tenant: str, serial: str = ""
) -> tuple[Device, Issued]:
    """Consume the token or the preauthorisation, create the device, certify its key.

    Raises:
        EnrolError: enrol.token, enrol.request, enrol.taken, enrol.not-listed; nothing was consumed.
    """
    if len(serial) > preauthorisation.MAX_SERIAL:
        raise EnrolError("enrol.request", f"A serial has at most {preauthorisation.MAX_SERIAL} characters.")
    issued = ca.issue_device(csr, device)
    found = session.get(Device, device)
    admission = _admit(session, token, device=device, serial=serial, spki=issued.spki)
    now = audit.now_ms()
    if found is not None and found.state != "revoked":
        if found.spki != issued.spki or now - found.enrolled_at > RETRY_MS:
            raise EnrolError(
                "enrol.taken", f"{device!r} is already enrolled.", remedy="Choose another id, or revoke it first."
            )
        certificates.record(session, device, issued)
        detail = {"key": issued.spki[:16], "because": "the same request again"}
        audit.append(session, actor=f"device:{device}", verb="device.certify-again", subject=device, detail=detail)
        return found, issued
    if found is not None and not admission.bound:
        remedy = (
            f"Choose another id, or ask for a token that is bound to it: `lightship device token --device {device}`."
        )
        raise EnrolError("enrol.taken", f"{device!r} was revoked.", remedy=remedy)
    admission.consume(device, now)
    if found is not None:
        # A device that was wiped or replaced begins anew; its history is kept in the other tables.
        session.delete(found)
        session.execute(delete(DeviceInstance).where(DeviceInstance.device == device))
        session.flush()
    enrolled = _new_device(admission, issued, device=device, tenant=tenant, serial=serial)
    session.add(enrolled)
    certificates.record(session, device, issued)
    detail = {**admission.origin, "group": enrolled.group, "key": issued.spki[:16], "state": enrolled.state}
    audit.append(session, actor=f"device:{device}", verb="device.enrol", subject=device, detail=detail)
    return enrolled, issued


def approve(session: Session, device: str, *, actor: str) -> None:
    """Let a device in that enrolled with a token whose devices wait for approval.

    Raises:
        FleetError: fleet.unknown-device, fleet.device-state.
    """
    row = known_device(session, device)
    if row.state != "pending":
        raise FleetError("fleet.device-state", f"{device!r} does not wait for approval: it is {row.state}.")
    row.state = "active"
    audit.append(session, actor=actor, verb="device.approve", subject=device, detail={"key": row.spki[:16]})


def renew(session: Session, ca: CertificateAuthority, *, device: str, csr: str) -> Issued:
    """A fresh certificate for a fresh key of an active device.

    Raises:
        EnrolError: enrol.revoked, enrol.pending, enrol.request.
    """
    row = active_device(session, device)
    issued = certify_next(session, ca, row, csr)
    audit.append(
        session, actor=f"device:{device}", verb="device.renew", subject=device, detail={"key": issued.spki[:16]}
    )
    return issued


def certify_next(session: Session, ca: CertificateAuthority, row: Device, csr: str) -> Issued:
    """Certify the key that is to follow a device's present one.

    Raises:
        EnrolError: enrol.request.
    """
    issued = ca.issue_device(csr, row.id)
    # The answer may get lost: the old key stays good until the new one is seen.
    # A key in a token stays the same.
    row.spki_next, row.cert_serial = issued.spki if issued.spki != row.spki else "", issued.serial
    row.cert_not_after = int(issued.not_after.timestamp() * 1_000)
    certificates.record(session, row.id, issued)
    return issued


def revoke(session: Session, device: str, *, actor: str, reason: str) -> None:
    """Refuse the device from its next request on, and ask for its MQTT session to be cut.

    Raises:
        FleetError: fleet.unknown-device.
    """
    row = known_device(session, device)
    row.state = "revoked"
    certificates.retire(session, device, reason="revoked")
    session.merge(Cut(device=device, asked_at=audit.now_ms()))
    audit.append(session, actor=actor, verb="device.revoke", subject=device, detail={"reason": reason})


def known_device(session: Session, device: str) -> Device:
    """The device, whatever its state.

    Raises:
        FleetError: fleet.unknown-device.
    """
    row = session.get(Device, device)
    if row is None:
        raise FleetError("fleet.unknown-device", f"No device {device!r}.", remedy="See `lightship device list`.")
    return row


def active_device(session: Session, device: str) -> Device:
    """The device, if it may still speak to us.

    Raises:
        EnrolError: enrol.revoked, enrol.pending, enrol.certificate.
    """
    row = session.get(Device, device)
    if row is None:
        raise EnrolError("enrol.certificate", f"No device {device!r} is enrolled here.")
    if row.state == "pending":
        message = f"Device {device!r} waits for the operator's approval."
        raise EnrolError("enrol.pending", message, remedy=f"`lightship device approve {device}`.")
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
    device.retired_spki, device.retired_at, device.retired_seen = device.spki, audit.now_ms(), 0
    device.spki, device.spki_next = device.spki_next, ""
    certificates.retire(session, device.id, reason="superseded", keep=spki)
    session.flush()


@dataclass(frozen=True)
class _Admission:
    """Why a device is let in: a token, an entry of the list of expected devices, or both."""

    token: JoinToken | None
    entry: Preauthorisation | None
    device: str

    @property
    def bound(self) -> bool:
        """Whether the operator meant exactly this id."""
        named = [self.token.device if self.token else None, self.entry.device if self.entry else None]
        return self.device in named

    @property
    def origin(self) -> dict[str, str]:
        """For the audit log."""
        found = {"token": self.token.id if self.token else "", "entry": self.entry.id if self.entry else ""}
        return {k: v for k, v in found.items() if v}

    @property
    def group(self) -> str:
        """The group it joins."""
        of_entry = self.entry.group if self.entry else ""
        return of_entry or (self.token.group if self.token else "default")

    @property
    def labels(self) -> dict[str, Any]:
        """Those of the token, then those of the entry."""
        return {**(self.token.labels if self.token else {}), **(self.entry.labels if self.entry else {})}

    def consume(self, device: str, now: int) -> None:
        """Use up what lets it in.

        Raises:
            EnrolError: enrol.token, enrol.not-listed.
        """
        if self.token is not None and self.token.uses_left < 1:
            raise EnrolError(
                "enrol.token", "The join token is used up.", remedy="Ask for one with `lightship device token`."
            )
        if self.entry is not None and self.entry.used_at:
            raise EnrolError("enrol.not-listed", f"The preauthorisation of {device!r} is used up.")
        if self.token is not None:
            self.token.uses_left -= 1
        if self.entry is not None:
            self.entry.used_by, self.entry.used_at = device, now


def _admit(session: Session, token: str, *, device: str, serial: str, spki: str) -> _Admission:
    if not token:
        entry = preauthorisation.find(session, device=device, serial=serial, spki=spki, by_key=True)
        if entry is None:
            message = "A join token is required, or the digest of this device's key on the list of expected devices."
            raise EnrolError("enrol.token", message, remedy="Ask for one with `lightship device token`.")
        return _Admission(None, entry, device)
    row = _valid_token(session, token, device)
    if not row.preauthorised:
        return _Admission(row, None, device)
    entry = preauthorisation.find(session, device=device, serial=serial, spki=spki, by_key=False)
    if entry is None:
        message = f"{device!r} is not on the list of devices that may enrol with this token."
        raise EnrolError("enrol.not-listed", message, remedy="`lightship device preauthorise` adds it.")
    return _Admission(row, entry, device)


def _new_device(admission: _Admission, issued: Issued, *, device: str, tenant: str, serial: str) -> Device:
    return Device(
        id=device,
        tenant=tenant,
        group=admission.group,
        labels=admission.labels,
        state="pending" if admission.token is not None and admission.token.approval else "active",
        spki=issued.spki,
        cert_serial=issued.serial,
        cert_not_after=int(issued.not_after.timestamp() * 1_000),
        enrolled_at=audit.now_ms(),
        serial=serial,
        running=[],
        health={},
        degraded=[],
    )


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
