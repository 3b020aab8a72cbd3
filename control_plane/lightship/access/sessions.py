"""Access: browser sessions, as signed cookies.

Rules:
* a cookie says which token signed in and until when, and holds nothing of its secret; it is signed with a key that
  lives in this process only, so a restart signs everybody out and there is one secret less on the disk;
* it opens nothing by itself: the token is looked up again on every request, so a revoked one ends its sessions;
* cookies are for reading. What changes something needs the token itself, which no foreign page can make a browser send.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Final

COOKIE: Final = "lightship_session"
LIFE_SECONDS: Final = 12 * 3_600


class Sessions:
    """Makes cookies and reads them."""

    def __init__(self, key: bytes | None = None) -> None:
        """Sign with `key`, by default one that nobody else has."""
        self._key = key or secrets.token_bytes(32)

    def seal(self, name: str, until: int) -> str:
        """The cookie of whoever signed in with the token `name`, good until that many seconds since the epoch."""
        body = f"{name}.{until}"
        return f"{body}.{self._sign(body)}"

    def open(self, cookie: str, now: float) -> str | None:
        """The name of the token that signed in; None for a cookie that is not ours, or over."""
        body, _, signature = cookie.rpartition(".")
        name, _, until = body.rpartition(".")
        if not hmac.compare_digest(self._sign(body).encode(), signature.encode()):
            return None
        return name if now < int(until) else None

    def _sign(self, body: str) -> str:
        return hmac.new(self._key, body.encode(), hashlib.sha256).hexdigest()
