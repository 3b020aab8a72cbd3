"""Alerting: one look at everything, and what follows from it, in the database.

Rules:
* looking and deciding only read, however long they take, and hold nobody up;
* what was decided is written in short transactions, a part at a time, each only while nobody else has changed an alert
  or a mute since: otherwise the rest is decided anew, on what stands there by then;
* what is told goes first, each alert together with its messages; what only waits to be told follows, for it would be
  found again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, TypeVar

import msgspec
from sqlalchemy.orm import Session

from lightship.home import Home
from lightship.settings import Settings
from lightship.storage.models import AlertCounter, AlertMessage

from . import decide as decider
from . import store
from .decide import Decision, Finding, Notice
from .facts import Facts
from .limits import limits
from .payload import message
from .routes import channels_for, parse

log = logging.getLogger(__name__)
#: Alerts that are written in one transaction, and the pause in which somebody else writes.
PART: Final = 1_000
PAUSE_SECONDS: Final = 0.02
#: So often a look begins anew because somebody else has changed something; after that the next one comes soon.
TRIES: Final = 5
_T = TypeVar("_T")
_PRUNED_EVERY: Final = 3_600_000
_LEVELS = {"resolve": logging.INFO, "remind": logging.INFO}


class _Part(NamedTuple):
    """What is written in one transaction."""

    changed: Sequence[store.Row] = ()
    dropped: Sequence[str] = ()
    messages: Sequence[AlertMessage] = ()
    notices: Sequence[Notice] = ()


class Evaluator:
    """Looks, decides and stores."""

    def __init__(self, home: Home, settings: Settings, channels: Sequence[str], listening_since: int) -> None:
        """Ready to look; `channels` are the names of those that are set up.

        Raises:
            SettingsError: settings.invalid, for routes.
        """
        self._home = home
        self._settings = settings
        self._channels = channels
        self._routes = parse(settings.alert_routes, channels)
        self._limits = limits(settings)
        self._facts = Facts(home, self._limits, listening_since, channels)
        self._pruned_at = 0

    def look(self, now: int) -> int:
        """Look once; the number of notices that follow."""
        told = 0
        for _ in range(TRIES):
            with self._home.database.read() as session:
                edition = store.edition(session)
                found, counters = self._facts.look(session, now)
                decision = self._decide(session, found, now)
                parts = list(self._parts(session, decision))
            self._count(counters)
            written, whole = self._write(parts, edition)
            told += written
            if whole:
                break
        else:
            log.info("alerts were changed by others while we looked; the rest is for the next look")
        if now - self._pruned_at > _PRUNED_EVERY:
            self._prune(now)
        return told

    def _parts(self, session: Session, decision: Decision) -> Iterator[_Part]:
        """What is to be written, made ready."""
        notices = {notice.alert.id: notice for notice in decision.notices}
        told = [a for a in decision.changed if a.status != "pending"]
        waiting = [a for a in decision.changed if a.status == "pending"]
        for alerts in _by_part(told):
            mine = [notices[a.id] for a in alerts if a.id in notices]
            messages = [m for notice in mine for m in self._messages(session, notice)]
            yield _Part([store.columns(a) for a in alerts], messages=messages, notices=mine)
        for alerts in _by_part(waiting):
            yield _Part([store.columns(a) for a in alerts])
        for dropped in _by_part(decision.dropped):
            yield _Part(dropped=dropped)

    def _write(self, parts: Sequence[_Part], edition: int) -> tuple[int, bool]:
        """Write while nobody else does; how many notices that were, and whether it is all."""
        told = 0
        for n, part in enumerate(parts):
            if n:
                time.sleep(PAUSE_SECONDS)
            with self._home.database.write() as session:
                if not store.advance(session, edition + n):
                    return told, False
                store.save(session, part.changed, part.dropped)
                store.enqueue(session, part.messages)
            told += len(part.notices)
            for notice in part.notices:
                level = _LEVELS.get(notice.event, logging.WARNING)
                log.log(level, "alert %s: %s: %s", notice.alert.id, notice.event, notice.alert.sentence)
        return told, True

    def _count(self, counters: Sequence[AlertCounter]) -> None:
        """Remember what has grown: by itself, for the next look would find the same."""
        for some in _by_part(counters):
            with self._home.database.write() as session:
                store.count(session, some)

    def _prune(self, now: int) -> None:
        with self._home.database.write() as session:
            store.prune(session, now)
        self._pruned_at = now

    def _decide(self, session: Session, found: list[Finding], now: int) -> Decision:
        return decider.decide(
            store.standing(session),
            found,
            store.mutes(session, now),
            store.past(session, now),
            now,
            self._limits.rules,
        )

    def _messages(self, session: Session, notice: Notice) -> list[AlertMessage]:
        """One to each channel of its routes; the end of an alert goes also to whoever was told of it before."""
        channels = channels_for(self._routes, self._channels, notice.alert.severity, notice.alert.groups)
        if notice.event == "resolve":
            told = store.told_channels(session, notice.alert.id)
            channels = [c for c in self._channels if c in channels or c in told]
        body = msgspec.json.encode(message(notice, self._settings.environment, self._settings.tenant))
        return [
            AlertMessage(
                channel=channel,
                id=notice.id,
                alert=notice.alert.id,
                number=notice.number,
                event=notice.event,
                body=body,
                state="queued",
                created_at=notice.at,
                due_at=notice.at,
            )
            for channel in channels
        ]


def _by_part(items: Sequence[_T]) -> Iterator[Sequence[_T]]:
    for first in range(0, len(items), PART):
        yield items[first : first + PART]
