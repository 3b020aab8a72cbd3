"""Access: API tokens in the database.

Rules:
* a token is `lst_<id>_<secret>`: the prefix lets secret scanners find one that leaked; the secret has 256 bits, is
  shown once, and only the sha256 of the whole is stored, so a stolen database lets nobody in;
* comparison takes the same time wherever it fails, also for an id that does not exist;
* a name is never used twice, so that a name in the audit log means one token for ever;
* `last used` is written at most once a minute, and a database that can't be written refuses nobody.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from typing import Final

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from lightship.storage import audit
from lightship.storage.models import ApiToken
from lightship_agent.contract.codes import AccessError
from lightship_agent.contract.names import check_name

from .rules import Grant, Role

PREFIX: Final = "lst_"
#: What a secret scanner should look for.
FORM: Final = re.compile(r"lst_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")
TOUCH_MS: Final = 60_000
_NO_DIGEST: Final = "0" * 64


def create(
    session: Session, *, name: str, role: Role, environment: str, ttl_seconds: int, actor: str, reason: str = ""
) -> str:
    """A new API token; shown once and never stored.

    Raises:
        InvalidNameError: name.invalid.
        AccessError: access.exists.
    """
    check_name("token name", name)
    check_name("environment", environment)
    if session.get(ApiToken, name) is not None:
        message = f"A token {name!r} exists, or existed."
        raise AccessError("access.exists", message, remedy="Choose another name: the audit log tells tokens by theirs.")
    token_id = secrets.token_hex(6)
    shown = f"{PREFIX}{token_id}_{secrets.token_urlsafe(32)}"
    now = audit.now_ms()
    expires = now + ttl_seconds * 1_000
    session.add(
        ApiToken(
            name=name,
            id=token_id,
            secret_hash=digest(shown),
            role=role.value,
            environment=environment,
            created_at=now,
            created_by=actor,
            expires_at=expires,
        )
    )
    detail = {"role": role.value, "environment": environment, "expires_at": expires, "reason": reason}
    audit.append(session, actor=actor, verb="access.grant", subject=name, detail=detail)
    return shown


def revoke(session: Session, name: str, *, actor: str, reason: str) -> ApiToken:
    """Refuse a token from its next request on; twice is no harm, and one event.

    Raises:
        AccessError: access.unknown.
    """
    row = session.get(ApiToken, name)
    if row is None:
        raise AccessError("access.unknown", f"No API token {name!r}.", remedy="See `lightship token list`.")
    if row.revoked_at is None:
        row.revoked_at = audit.now_ms()
        session.flush()
        audit.append(session, actor=actor, verb="access.withdraw", subject=name, detail={"reason": reason})
    return row


def listed(session: Session) -> list[ApiToken]:
    """All tokens, also those that are worth nothing any more, by name."""
    return list(session.scalars(select(ApiToken).order_by(ApiToken.name)))


def state(row: ApiToken, now: int) -> str:
    """active, expired or revoked."""
    if row.revoked_at is not None:
        return "revoked"
    return "expired" if row.expires_at <= now else "active"


def identify(session: Session, shown: str, now: int) -> ApiToken | None:
    """The token that was shown, if it is one of ours and still good."""
    found = FORM.fullmatch(shown)
    row = session.scalars(select(ApiToken).where(ApiToken.id == (found[1] if found else ""))).one_or_none()
    same = hmac.compare_digest(row.secret_hash if row else _NO_DIGEST, digest(shown))
    return row if row is not None and same and state(row, now) == "active" else None


def by_name(session: Session, name: str, now: int) -> ApiToken | None:
    """The token of that name, if it is still good."""
    row = session.get(ApiToken, name)
    return row if row is not None and state(row, now) == "active" else None


def grant_of(row: ApiToken) -> Grant:
    """What a token grants."""
    return Grant(row.name, Role(row.role), row.environment)


def needs_touch(row: ApiToken, now: int) -> bool:
    """Whether its last use is worth writing down again."""
    return now - row.last_used_at >= TOUCH_MS


def touch(session: Session, name: str, *, now: int, origin: str) -> None:
    """Note that a token was used, and from where."""
    session.execute(update(ApiToken).where(ApiToken.name == name).values(last_used_at=now, last_used_from=origin))


def digest(shown: str) -> str:
    """What is stored of a token."""
    return hashlib.sha256(shown.encode()).hexdigest()
