"""Fleet: a device whose certificate ran out gets a new one for the proof that it has the registered key.

Rules:
* only an active device, only its registered key, only within the operator's days after the certificate ran out;
* a nonce carries its own seal, so that asking for one stores nothing: a stranger can't fill the database;
* a nonce that brought a certificate is written down in the same transaction, and never brings another;
* a stranger learns nothing about which devices there are before the signature has been checked.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import delete
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from lightship.storage import audit
from lightship.storage.models import UsedNonce
from lightship_agent.contract.codes import EnrolError
from lightship_agent.contract.recovery import NONCE_SECONDS, PAYLOAD_TYPE, Proof, SignedProof, from_base64, pae
from lightship_agent.files import write_durably

from . import enrolment
from .ca import CertificateAuthority, Issued, spki_digest

_DAY_MS: Final = 86_400_000


class NonceSeal:
    """Makes nonces, and knows its own again: `<random>.<Unix seconds of its end>.<seal>`."""

    def __init__(self, path: Path) -> None:
        """Keep the key in `path` (0600); it is made when it is first needed."""
        self._path = path

    def make(self, device: str) -> str:
        """A nonce for one device.

        Raises:
            StorageError: storage.full, storage.unwritable.
        """
        body = f"{secrets.token_hex(16)}.{int(time.time()) + NONCE_SECONDS}"
        return f"{body}.{self._seal(device, body)}"

    def check(self, device: str, nonce: str) -> int:
        """The milliseconds at which this nonce ends.

        Raises:
            EnrolError: enrol.proof for one that is not ours, not for this device, or too old.
            StorageError: storage.full, storage.unwritable.
        """
        body, _, seal = nonce.rpartition(".")
        end = body.rpartition(".")[2]
        ours = hmac.compare_digest(seal.encode(), self._seal(device, body).encode())
        if not ours or int(end) < time.time():
            message = "The nonce is not one that was given to this device within the last two minutes."
            raise EnrolError("enrol.proof", message, remedy="Ask for a new one.")
        return int(end) * 1_000

    def _seal(self, device: str, body: str) -> str:
        return hmac.new(self._key(), f"{device}\n{body}".encode(), hashlib.sha256).hexdigest()

    def _key(self) -> bytes:
        if not self._path.exists():
            write_durably(self._path, secrets.token_bytes(32), mode=0o600)
        return self._path.read_bytes()


@dataclass(frozen=True)
class Verified:
    """A proof that holds; whose key it is of, the database has to say."""

    proof: Proof
    spki: str
    ends: int  # of its nonce, milliseconds


def recover(session: Session, ca: CertificateAuthority, verified: Verified, *, days: float) -> tuple[str, Issued]:
    """Certify the next key of a device that proved to have its registered one; the device's id.

    Args:
        session: a write session.
        ca: the authority.
        verified: what the device sent, from `verify`.
        days: how long after its certificate ran out a device may still recover.

    Raises:
        EnrolError: enrol.proof, enrol.certificate, enrol.revoked, enrol.pending, enrol.too-late, enrol.request.
    """
    proof, spki = verified.proof, verified.spki
    row = enrolment.active_device(session, proof.device)
    if spki not in {row.spki, row.spki_next}:
        raise EnrolError("enrol.certificate", "The proof is not of the registered key.")
    if days <= 0 or audit.now_ms() - row.cert_not_after > days * _DAY_MS:
        message = f"The certificate ran out more than {days:g} days ago."
        raise EnrolError("enrol.too-late", message, remedy="Revoke the device, and enrol it anew with a bound token.")
    _use_up(session, proof, verified.ends)
    enrolment.check_key(session, row, spki)
    issued = enrolment.certify_next(session, ca, row, proof.csr)
    detail = {"key": issued.spki[:16], "proved_by": spki[:16]}
    audit.append(session, actor=f"device:{row.id}", verb="device.recover", subject=row.id, detail=detail)
    return row.id, issued


def verify(seal: NonceSeal, signed: SignedProof) -> Verified:
    """Check signature and nonce, all that needs no database: strangers shall not keep it busy.

    Raises:
        EnrolError: enrol.proof.
        StorageError: storage.full, storage.unwritable.
    """
    proof, spki = open_proof(signed)
    return Verified(proof, spki, seal.check(proof.device, proof.nonce))


def open_proof(signed: SignedProof) -> tuple[Proof, str]:
    """The proof and the digest of the key that signed it; whose key that is, is not asked here.

    Raises:
        EnrolError: enrol.proof.
    """
    if signed.payload_type != PAYLOAD_TYPE or len(signed.signatures) != 1:
        raise EnrolError("enrol.proof", f"Expected one signature over {PAYLOAD_TYPE}.")
    payload, (signature,) = from_base64(signed.payload), signed.signatures
    try:
        key = serialization.load_der_public_key(from_base64(signature.public))
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise EnrolError("enrol.proof", "Expected a P-256 key.")
        key.verify(from_base64(signature.sig), pae(payload), ec.ECDSA(hashes.SHA256()))
        return msgspec.json.decode(payload, type=Proof), spki_digest(key)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, msgspec.MsgspecError, RecursionError) as e:
        raise EnrolError("enrol.proof", f"The proof does not hold: {type(e).__name__}: {e}.") from e


def _use_up(session: Session, proof: Proof, ends: int) -> None:
    session.execute(delete(UsedNonce).where(UsedNonce.expires_at < audit.now_ms()))
    digest = hashlib.sha256(proof.nonce.encode()).hexdigest()
    if session.get(UsedNonce, digest) is not None:
        raise EnrolError("enrol.proof", "The nonce was used before.", remedy="Ask for a new one.")
    session.add(UsedNonce(nonce=digest, device=proof.device, expires_at=ends))
    try:
        session.flush()
    except IntegrityError as e:
        raise EnrolError("enrol.proof", "The nonce was used before.") from e
