"""Fleet: which certificates are out there, and which of them no longer count.

Rules:
* every certificate is written down in the transaction that issues it: what is not known can't be revoked;
* a device's first use of a renewed key retires its older certificates; a revoked device has none that counts;
* the revocation list names what has not run out by itself; the database stays the word of record, the list is for the
  broker, which can't ask it;
* the list is good for a month and made anew every day: once it lapses, the broker refuses everybody.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from lightship.storage import audit
from lightship.storage.models import Certificate

from .ca import BACKDATE, CertificateAuthority, Issued

CRL_LIFE: Final = timedelta(days=30)
#: What has run out is kept for so long, because clocks differ.
_KEPT_MS: Final = 86_400_000


def record(session: Session, device: str, issued: Issued) -> None:
    """Write down a certificate that is being issued."""
    session.add(
        Certificate(
            serial=issued.serial,
            device=device,
            spki=issued.spki,
            issued_at=audit.now_ms(),
            not_after=int(issued.not_after.timestamp() * 1_000),
        )
    )


def retire(session: Session, device: str, *, reason: str, keep: str = "") -> None:
    """No certificate of the device counts any more, but those over the key `keep`."""
    now = audit.now_ms()
    for row in session.scalars(select(Certificate).where(Certificate.device == device, Certificate.revoked_at == 0)):
        if row.spki != keep:
            row.revoked_at, row.reason = now, reason


def forget_expired(session: Session) -> None:
    """Drop what has run out: no list needs to name it."""
    session.execute(delete(Certificate).where(Certificate.not_after < audit.now_ms() - _KEPT_MS))


def revoked(session: Session) -> list[tuple[str, int]]:
    """Serial and time of every certificate that no longer counts and has not run out."""
    query = select(Certificate.serial, Certificate.revoked_at).where(
        Certificate.revoked_at > 0, Certificate.not_after >= audit.now_ms() - _KEPT_MS
    )
    return [(serial, at) for serial, at in session.execute(query.order_by(Certificate.serial))]


def revocation_list(ca: CertificateAuthority, entries: Iterable[tuple[str, int]], before: bytes = b"") -> bytes:
    """The signed list, PEM.

    Args:
        ca: the authority.
        entries: serial in hexadecimal, and milliseconds of the revocation.
        before: the list that this one replaces, PEM; nothing if there is none.
    """
    now = datetime.now(UTC)
    at = {int(serial, 16): datetime.fromtimestamp(ms / 1_000, UTC) for serial, ms in entries}
    return ca.sign_revocations(at, now=now, last_update=last_update(now, _dated(before)), next_update=now + CRL_LIFE)


def last_update(now: datetime, before: datetime | None) -> datetime:
    """The date of a new list: a second after the one it replaces, and never in the future.

    A running broker's OpenSSL keeps every list it was given (one that has lapsed does no harm beside one that has not),
    and believes the one with the latest date, which it reads to the second: of two lists of one second, either.
    """
    usual = now - BACKDATE
    return usual if before is None else min(max(usual, before + timedelta(seconds=1)), now)


def _dated(crl: bytes) -> datetime | None:
    try:
        return x509.load_pem_x509_crl(crl).last_update_utc if crl else None
    except ValueError:
        return None
