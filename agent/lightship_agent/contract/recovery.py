"""Contract: how a device whose certificate has run out proves that it has the registered key.

    device                                   control plane
      POST /v1/recover/nonce {device}   →
                                        ←    {nonce, expires_seconds}
      POST /v1/recover  DSSE envelope   →    (TLS proves the server only)
                                        ←    {chain}

Rules:
* the envelope is DSSE: what is signed is PAE(type, payload), so no other signature of that key can stand for it;
* the payload names the device, the server's nonce and the request for the next key: none of them can be exchanged;
* a nonce is good for two minutes, for one device, once.
"""

from __future__ import annotations

import base64
import binascii
from typing import Final

import msgspec

from .codes import EnrolError

PAYLOAD_TYPE: Final = "application/vnd.lightship.recovery+json"
NONCE_SECONDS: Final = 120
MAX_ENVELOPE: Final = 16 * 1024  # bytes


class NonceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /v1/recover/nonce."""

    device: str


class NonceReply(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to POST /v1/recover/nonce."""

    nonce: str
    expires_seconds: int


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """The signed payload."""

    device: str
    nonce: str
    csr: str  # PEM, over the key that is to follow


class Signature(msgspec.Struct, frozen=True, kw_only=True):
    """One signature: `keyid` is the sha256 of the SubjectPublicKeyInfo, `sig` ECDSA over SHA-256, DER, in base64."""

    keyid: str
    sig: str
    #: The public key, DER in base64: the server keeps only its digest.
    public: str


class SignedProof(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Body of POST /v1/recover: a DSSE envelope."""

    payload: str
    payload_type: str
    signatures: tuple[Signature, ...]


def pae(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding of a proof: what is signed."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def to_base64(data: bytes) -> str:
    """Standard base64."""
    return base64.b64encode(data).decode()


def from_base64(text: str) -> bytes:
    """The bytes of standard base64.

    Raises:
        EnrolError: enrol.proof.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as e:
        raise EnrolError("enrol.proof", f"Expected base64: {e}.") from e
