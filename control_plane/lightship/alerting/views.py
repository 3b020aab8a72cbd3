"""Alerting: what people and their programs look at, as plain JSON values, for CLI and dashboard.

Rules: read-only; times are milliseconds since the Unix epoch; lists are bounded.
"""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy.orm import Session

from . import store
from .decide import Alert, Mute, muted
from .payload import told

Json = dict[str, Any]


def alert(found: Alert, mutes: list[Mute], now: int) -> Json:
    """One alert in short."""
    return {
        **msgspec.to_builtins(told(found)),
        "status": found.status,
        "muted": found.status == "open" and muted(found, mutes, now),
        "told_at": found.told_at,
        "notices": found.number,
        "flaps": found.flaps,
        "acknowledged_at": found.acked_at,
        "acknowledged_because": found.acked_why,
    }


def listing(session: Session, now: int, *, everything: bool = False) -> Json:
    """Alerts, mutes, and channels that take nothing."""
    mutes = store.mutes(session, now)
    rows = store.mute_rows(session, now)
    return {
        "alerts": [alert(a, mutes, now) for a in store.newest(session, everything=everything)],
        "mutes": [
            {"id": m.id, "what": m.what, "until": m.until, "reason": m.reason, "by": m.created_by, "at": m.created_at}
            for m in rows
        ],
        "troubles": [
            {"channel": channel, "waiting": n, "code": code, "detail": detail}
            for channel, n, code, detail in store.troubles(session)
        ],
    }


def detail(session: Session, ident: str, now: int) -> Json:
    """One alert, with its messages.

    Raises:
        AlertError: alert.unknown.
    """
    found = store.get(session, ident)
    return {
        **alert(found, store.mutes(session, now), now),
        "members": [
            {"subject": m.subject, "group": m.group, "gone": m.gone} for m in list(found.members.values())[:1_000]
        ],
        "messages": [
            {
                "id": m.id,
                "channel": m.channel,
                "event": m.event,
                "state": m.state,
                "at": m.created_at,
                "sent_at": m.sent_at,
                "attempts": m.attempts,
                "due_at": m.due_at if m.state == "queued" else 0,
                "code": m.code,
                "detail": m.detail,
            }
            for m in store.messages_of(session, found.id)
        ],
    }
