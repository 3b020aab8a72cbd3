"""Alerting: the signature of a webhook, as the Standard Webhooks specification has it. Pure.

    webhook-id: 1f2e3d4c5b6a.1          the same however often it is sent: who has seen it drops it
    webhook-timestamp: 1767225600       seconds, of this attempt
    webhook-signature: v1,<base64>      HMAC-SHA256 of "<id>.<timestamp>.<body>"; several with spaces between

Rules: the body is signed as it goes over the wire; a receiver compares in constant time, and refuses what is older or
newer than `WINDOW`, so that what was recorded can't be played again later.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping
from typing import Final

#: Seconds by which a timestamp may differ from the receiver's clock.
WINDOW: Final = 300
_PREFIX: Final = b"whsec_"


def key_of(secret: bytes) -> bytes:
    """The key in a secret: what follows `whsec_` is base64, anything else is the key itself.

    Raises:
        ValueError: not base64.
    """
    stripped = secret.strip()
    if not stripped.startswith(_PREFIX):
        return stripped
    try:
        return base64.b64decode(stripped.removeprefix(_PREFIX), validate=True)
    except binascii.Error as e:
        raise ValueError(str(e)) from e


def headers(key: bytes, ident: str, body: bytes, now: int) -> dict[str, str]:
    """The three headers of a message that is sent at `now`, in seconds."""
    signature = base64.b64encode(_mac(key, ident, str(now), body)).decode()
    return {"webhook-id": ident, "webhook-timestamp": str(now), "webhook-signature": f"v1,{signature}"}


def is_genuine(key: bytes, found: Mapping[str, str], body: bytes, now: int) -> bool:
    """Whether a message is of who has the key, and was sent about `now`; `found` has names in lower case."""
    ident, timestamp = found.get("webhook-id", ""), found.get("webhook-timestamp", "")
    if not (timestamp.isascii() and timestamp.isdigit()) or abs(now - int(timestamp[:12])) > WINDOW:
        return False
    expected = b"v1," + base64.b64encode(_mac(key, ident, timestamp, body))
    said = found.get("webhook-signature", "").split(" ")
    return any([hmac.compare_digest(expected, s.encode()) for s in said])  # noqa: C419 - all of them, in any case


def _mac(key: bytes, ident: str, timestamp: str, body: bytes) -> bytes:
    return hmac.digest(key, f"{ident}.{timestamp}.".encode() + body, hashlib.sha256)
