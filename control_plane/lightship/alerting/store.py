"""Alerting: alerts, mutes and messages in the database.

Rules:
* what the decider remembers of an alert and what is to be sent of it are written in one transaction: neither a restart
  nor a death in between repeats or loses a notice;
* whoever changes an alert or a mute moves the edition: what was decided on what stood there before is not written then;
* a message is known by its channel and the id of its notice, and stands there once;
* a message is claimed before it is sent, for a while; who dies with it leaves it to be claimed again;
* messages of one alert go out in their order: a later one waits until the earlier one is sent or given up.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
from sqlalchemy import delete, exists, func, insert, select, text, update
from sqlalchemy.orm import Session, aliased

from lightship.storage import audit
from lightship.storage.models import AlertCounter, AlertMessage, AlertMute, AlertRow
from lightship_agent.contract.codes import AlertError

from .decide import FLAP_WINDOW, Alert, Mute, Past

#: How long a mute may last: what is muted for longer is to be mended.
MAX_MUTE: Final = 31 * 86_400_000
#: How long sent messages and alerts that are over are kept.
KEEP: Final = 30 * 86_400_000
_AT_ONCE: Final = 500
#: Among the counters: how often alerts and mutes were changed.
_EDITION: Final = "*edition"
_FIRST_EDITION: Final = text(
    "INSERT INTO alert_counters (name, value, grew_at) VALUES (:name, 0, 0) ON CONFLICT (name) DO NOTHING"
)
_COUNT: Final = text(
    "INSERT INTO alert_counters (name, value, grew_at) VALUES (:name, :value, :grew_at) "
    "ON CONFLICT (name) DO UPDATE SET value = excluded.value, grew_at = excluded.grew_at"
)
Row = dict[str, object]
_DECODER: Final = msgspec.msgpack.Decoder(Alert)
_NO_ALERT: Final = "See `lightship alert list --all`."


def load(state: bytes) -> Alert:
    """An alert as the decider knows it."""
    return _DECODER.decode(state)


def standing(session: Session) -> list[Alert]:
    """The alerts that are pending or open."""
    states = select(AlertRow.state).where(AlertRow.status != "resolved").order_by(AlertRow.began, AlertRow.id)
    return [load(state) for state in session.scalars(states)]


def mutes(session: Session, now: int) -> list[Mute]:
    """The mutes that have not ended."""
    return [Mute(id=r.id, what=r.what, until=r.until) for r in mute_rows(session, now)]


def mute_rows(session: Session, now: int) -> list[AlertMute]:
    """The mutes that have not ended, the first to end first."""
    return list(session.scalars(select(AlertMute).where(AlertMute.until > now).order_by(AlertMute.until)))


def past(session: Session, now: int) -> dict[str, Past]:
    """How alerts ended lately, by the key of their finding, or their kind where they were many."""
    ended = select(AlertRow.state).where(AlertRow.status == "resolved", AlertRow.resolved_at > now - FLAP_WINDOW)
    found = {}
    for state in session.scalars(ended.order_by(AlertRow.resolved_at)):
        alert = load(state)
        keys = [alert.kind] if alert.grouped else list(alert.members)
        found.update({key: Past(resolved_at=alert.resolved_at, flaps=alert.flaps) for key in keys})
    return found


def edition(session: Session) -> int:
    """How often alerts and mutes were changed."""
    return session.scalar(select(AlertCounter.value).where(AlertCounter.name == _EDITION)) or 0


def advance(session: Session, known: int | None = None) -> bool:
    """Count a change that this transaction is to make; False where somebody made another since edition `known`.

    Until the transaction ends, nobody else gets through here.
    """
    session.execute(_FIRST_EDITION, {"name": _EDITION})
    mine = update(AlertCounter).where(AlertCounter.name == _EDITION)
    if known is not None:
        mine = mine.where(AlertCounter.value == known)
    moved = session.execute(mine.values(value=AlertCounter.value + 1).returning(AlertCounter.value))
    return moved.first() is not None


def save(session: Session, changed: Sequence[Row], dropped: Sequence[str] = ()) -> None:
    """Write alerts, and forget those that waited for nothing, in few statements: after an outage it is about many."""
    gone = [*dropped, *(str(row["id"]) for row in changed)]
    for i in range(0, len(gone), _AT_ONCE):
        session.execute(delete(AlertRow).where(AlertRow.id.in_(gone[i : i + _AT_ONCE])))
    if changed:
        session.execute(insert(AlertRow), changed)


def count(session: Session, counters: Sequence[AlertCounter]) -> None:
    """Remember counters."""
    if counters:
        rows = [{"name": c.name, "value": c.value, "grew_at": c.grew_at} for c in counters]
        session.execute(_COUNT, rows)


def put(session: Session, alert: Alert) -> None:
    """Write an alert that is there."""
    session.execute(update(AlertRow).where(AlertRow.id == alert.id).values(columns(alert)))


def columns(alert: Alert) -> Row:
    """An alert as it is kept."""
    return {
        "id": alert.id,
        "kind": alert.kind,
        "status": alert.status,
        "severity": alert.severity,
        "sentence": alert.sentence,
        "count": len(alert.present),
        "began": alert.began,
        "resolved_at": alert.resolved_at,
        "state": msgspec.msgpack.encode(alert),
    }


def get(session: Session, ident: str) -> Alert:
    """An alert, by the beginning of its id.

    Raises:
        AlertError: alert.unknown.
    """
    rows = list(session.scalars(select(AlertRow).where(AlertRow.id.startswith(ident, autoescape=True)).limit(2)))
    if len(rows) != 1:
        found = "several" if rows else "none"
        raise AlertError("alert.unknown", f"Expected one alert {ident!r}, found {found}.", remedy=_NO_ALERT)
    return load(rows[0].state)


def acknowledge(session: Session, ident: str, *, actor: str, reason: str, now: int) -> Alert:
    """Somebody looks after it: no more reminders, unless it gets worse.

    Raises:
        AlertError: alert.unknown, alert.state.
    """
    advance(session)
    alert = get(session, ident)
    if alert.status != "open":
        raise AlertError("alert.state", f"The alert {alert.id} is {alert.status}.", remedy=_NO_ALERT)
    after = msgspec.structs.replace(alert, acked_by=actor, acked_at=now, acked_why=reason)
    put(session, after)
    audit.append(session, actor=actor, verb="alert.acknowledge", subject=alert.id, detail={"reason": reason})
    return after


def mute(session: Session, what: str, *, until: int, actor: str, reason: str, now: int) -> AlertMute:
    """Hold back what fits, until then.

    Raises:
        AlertError: alert.mute.
    """
    terms = [t.strip() for t in what.split(",")]
    fine = all(t and t.partition(":")[0] in ("device", "group", "alert") if ":" in t else t for t in terms)
    if not fine or not now < until <= now + MAX_MUTE or not reason.strip():
        message = f"Expected a kind, device:…, group:… or alert:…, at most 31 days and a reason; found {what!r}."
        raise AlertError("alert.mute", message, remedy="For example: `lightship alert mute group:pumps --for 2h`.")
    advance(session)
    row = AlertMute(
        id=secrets.token_hex(6), what=",".join(terms), until=until, reason=reason, created_by=actor, created_at=now
    )
    session.add(row)
    detail = {"what": row.what, "until": until, "reason": reason}
    audit.append(session, actor=actor, verb="alert.mute", subject=row.id, detail=detail)
    return row


def unmute(session: Session, ident: str, *, actor: str, reason: str, now: int) -> AlertMute:
    """End a mute now.

    Raises:
        AlertError: alert.unknown, alert.state.
    """
    advance(session)
    row = session.get(AlertMute, ident)
    if row is None:
        raise AlertError("alert.unknown", f"No mute {ident!r}.", remedy="See `lightship alert list`.")
    if row.until <= now:
        raise AlertError("alert.state", f"The mute {ident} has ended already.")
    row.until = now
    audit.append(session, actor=actor, verb="alert.unmute", subject=ident, detail={"reason": reason})
    return row


def enqueue(session: Session, messages: Iterable[AlertMessage]) -> None:
    """Put messages into the outbox; one that is there already is left as it is."""
    for message in messages:
        if session.get(AlertMessage, (message.channel, message.id)) is None:
            session.add(message)


def told_channels(session: Session, alert: str) -> list[str]:
    """The channels that were told anything of an alert."""
    return list(session.scalars(select(AlertMessage.channel).where(AlertMessage.alert == alert).distinct()))


def claim(session: Session, channel: str, now: int, *, hold: int, limit: int) -> list[AlertMessage]:
    """Messages that are due, for the caller alone to send within `hold` milliseconds."""
    earlier = aliased(AlertMessage)
    behind = exists().where(
        earlier.channel == channel,
        earlier.state == "queued",
        earlier.alert == AlertMessage.alert,
        earlier.number < AlertMessage.number,
    )
    due = select(AlertMessage).where(
        AlertMessage.channel == channel, AlertMessage.state == "queued", AlertMessage.due_at <= now, ~behind
    )
    rows = list(session.scalars(due.order_by(AlertMessage.created_at, AlertMessage.id).limit(limit)))
    for row in rows:
        row.due_at, row.attempts = now + hold, row.attempts + 1
    return rows


def any_due(session: Session, channel: str, now: int) -> bool:
    """Whether a message may be due."""
    due = select(AlertMessage.id).where(
        AlertMessage.channel == channel, AlertMessage.state == "queued", AlertMessage.due_at <= now
    )
    return session.scalar(due.limit(1)) is not None


def oldest_queued(session: Session, channels: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Since when the oldest message of a channel waits, and why it was not taken."""
    query = select(AlertMessage.channel, func.min(AlertMessage.created_at), func.max(AlertMessage.code)).where(
        AlertMessage.state == "queued", AlertMessage.channel.in_(channels)
    )
    return {c: (int(at), code) for c, at, code in session.execute(query.group_by(AlertMessage.channel))}


def messages_of(session: Session, alert: str) -> list[AlertMessage]:
    """What was sent of an alert, or waits to be."""
    query = select(AlertMessage).where(AlertMessage.alert == alert)
    return list(session.scalars(query.order_by(AlertMessage.number, AlertMessage.channel)))


def prune(session: Session, now: int) -> None:
    """Forget what is long over."""
    old = select(AlertRow.id).where(AlertRow.status == "resolved", AlertRow.resolved_at < now - KEEP)
    session.execute(delete(AlertMessage).where(AlertMessage.alert.in_(old), AlertMessage.state != "queued"))
    session.execute(delete(AlertRow).where(AlertRow.status == "resolved", AlertRow.resolved_at < now - KEEP))
    session.execute(delete(AlertMute).where(AlertMute.until < now - KEEP))


def newest(session: Session, *, everything: bool, limit: int = 500) -> list[Alert]:
    """Open alerts, the worst first; with `everything` also those that are over, the newest first."""
    query = select(AlertRow).where(AlertRow.status == "open").order_by(AlertRow.severity, AlertRow.began.desc())
    rows = list(session.scalars(query.limit(limit)))
    if everything:
        over = select(AlertRow).where(AlertRow.status == "resolved").order_by(AlertRow.resolved_at.desc())
        rows += session.scalars(over.limit(limit))
    return [load(row.state) for row in rows]


def troubles(session: Session) -> list[tuple[str, int, str, str]]:
    """Channels whose messages were not taken: how many wait, and the code and words of the oldest."""
    query = select(AlertMessage).where(AlertMessage.state == "queued", AlertMessage.code != "")
    found: dict[str, tuple[str, int, str, str]] = {}
    for row in session.scalars(query.order_by(AlertMessage.created_at).limit(1_000)):
        name, n, code, detail = found.get(row.channel, (row.channel, 0, row.code, row.detail))
        found[row.channel] = (name, n + 1, code, detail)
    return list(found.values())
