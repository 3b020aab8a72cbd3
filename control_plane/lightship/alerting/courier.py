"""Alerting: the couriers, a thread per channel that sends what is due.

Rules:
* a courier never keeps anybody waiting: it has a thread of its own, and every attempt a deadline;
* what was not taken is tried again after a full-jitter pause, at most a quarter of an hour, for three days;
* at least once: a message is noted as sent after the receiver took it; who is killed in between sends it again, with
  the same id;
* one failure ends a round, so that a receiver that is away is not asked once for every message.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from lightship.storage.audit import now_ms
from lightship.storage.database import Database
from lightship.storage.models import AlertMessage
from lightship_agent.contract.codes import LightshipError
from lightship_agent.fail_points import fail_point

from . import store
from .channels import Channel
from .payload import Message, told

log = logging.getLogger(__name__)
POLL_SECONDS: Final = 1.0
BASE_MS: Final = 2_000
CAP_MS: Final = 900_000
LEAST_MS: Final = 500
GIVE_UP_MS: Final = 3 * 86_400_000


def jittered(attempts: int, draw: float) -> int:
    """Milliseconds before the next attempt, after so many; `draw` is uniform in [0, 1). Pure."""
    return max(LEAST_MS, int(draw * min(CAP_MS, BASE_MS << min(attempts, 20))))


class Courier:
    """Sends over one channel."""

    def __init__(
        self, database: Database, channel: Channel, timeout: float, draw: Callable[[], float] = random.random
    ) -> None:
        """Nothing runs yet."""
        self._database = database
        self._channel = channel
        self._draw = draw
        # Connecting, and what may come before the deadline runs, have the same time again.
        self._hold = int(timeout * 2_000) + 5_000
        self._stop = threading.Event()
        self._refreshed = 0.0
        self._thread = threading.Thread(target=self._run, name=f"alert-{channel.name}", daemon=True)

    def start(self) -> None:
        """Begin in the background."""
        self._thread.start()

    def stop(self) -> None:
        """End after the attempt under way; what it takes too long is claimed again later."""
        self._stop.set()
        self._thread.join(timeout=15)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.round()
            except LightshipError as e:
                log.warning("alert channel %s: %s: %s", self._channel.name, e.code, e)
            except Exception:  # whatever it met, the next round may go well
                log.exception("alert channel %s: unexpected error", self._channel.name)
            self._stop.wait(POLL_SECONDS)

    def round(self) -> int:
        """Send all that is due; how many messages were taken."""
        taken = 0
        while not self._stop.is_set() and (claimed := self._claim()):
            sent = self._send(claimed)
            if not sent:
                return taken
            taken += len(claimed)
        self._refresh()
        return taken

    def _claim(self) -> Sequence[AlertMessage]:
        now = now_ms()
        with self._database.read() as session:
            if not store.any_due(session, self._channel.name, now):
                return ()
        with self._database.write() as session:
            return store.claim(session, self._channel.name, now, hold=self._hold, limit=self._channel.batch)

    def _send(self, claimed: Sequence[AlertMessage]) -> bool:
        name = self._channel.name
        fail_point("alerting", name)
        code = detail = ""
        try:
            self._channel.send([msgspec.json.decode(row.body, type=Message) for row in claimed])
        except LightshipError as e:
            code, detail = e.code, str(e)
        except Exception as e:  # a channel's own fault must not stop it for ever
            log.exception("alert channel %s: unexpected error", name)
            code, detail = "alert.protocol", f"Unexpected {type(e).__name__}."
        fail_point("alerted", name)
        self._settle(claimed, code, detail)
        if code:
            log.warning("alert channel %s: %s: %s", name, code, detail)
        return not code

    def _settle(self, claimed: Sequence[AlertMessage], code: str, detail: str) -> None:
        now = now_ms()
        with self._database.write() as session:
            for stale in claimed:
                row = session.get(AlertMessage, (stale.channel, stale.id))
                if row is None or row.state != "queued":
                    continue
                if not code:
                    row.state, row.sent_at, row.code, row.detail = "sent", now, "", ""
                elif now - row.created_at > GIVE_UP_MS:
                    row.state, row.code, row.detail = "given-up", "alert.given-up", f"{code}: {detail}"
                else:
                    row.due_at, row.code, row.detail = now + jittered(row.attempts, self._draw()), code, detail

    def _refresh(self) -> None:
        every = self._channel.refresh_seconds
        if not every or (self._refreshed and time.monotonic() - self._refreshed < every):
            return
        self._refreshed = time.monotonic()
        with self._database.read() as session:
            mine = [
                told(a)
                for a in store.standing(session)
                if a.status == "open" and a.told and self._channel.name in store.told_channels(session, a.id)
            ]
        if mine:
            self._channel.refresh(mine, now_ms())
