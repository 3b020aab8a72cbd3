"""Alerting: one look at everything, and what follows from it, in the database.

Rules: looking reads, and holds nobody up; where it changes nothing, nothing is written; what is written is decided anew
in the transaction that writes it, on what stands there by then.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

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
_LEVELS = {"resolve": logging.INFO, "remind": logging.INFO}


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
        with self._home.database.read() as session:
            found, counters = self._facts.look(session, now)
            decision = self._decide(session, found, now)
        prune = now - self._pruned_at > 3_600_000
        if not (decision.changed or decision.dropped or counters or prune):
            return 0
        return self._write(found, counters, now, prune=prune)

    def _write(self, found: list[Finding], counters: list[AlertCounter], now: int, *, prune: bool) -> int:
        with self._home.database.write() as session:
            for counter in counters:
                session.merge(counter)
            decision = self._decide(session, found, now)
            store.save(session, decision)
            for notice in decision.notices:
                store.enqueue(session, self._messages(session, notice))
            if prune:
                store.prune(session, now)
                self._pruned_at = now
        for notice in decision.notices:
            level = _LEVELS.get(notice.event, logging.WARNING)
            log.log(level, "alert %s: %s: %s", notice.alert.id, notice.event, notice.alert.sentence)
        return len(decision.notices)

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
