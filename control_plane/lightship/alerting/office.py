"""Alerting: the composition of the room: it looks within the reconciler's tick, and a thread per channel sends.

Rules: the replica that holds the reconciler's lease looks; couriers run in every replica, as messages are claimed.
"""

from __future__ import annotations

import time

from lightship.home import Home
from lightship.settings import Settings
from lightship.storage.audit import now_ms

from .channels import set_up
from .courier import Courier
from .evaluate import Evaluator


class AlertOffice:
    """Looks when it is told to, and sends by itself."""

    def __init__(self, home: Home, settings: Settings) -> None:
        """Set the channels up; nothing runs yet.

        Raises:
            SettingsError: settings.invalid.
            AlertError: alert.secret.
        """
        channels = set_up(settings)
        self._evaluator = Evaluator(home, settings, [c.name for c in channels], now_ms())
        self._couriers = [Courier(home.database, c, settings.alert_timeout_seconds) for c in channels]
        self._every = settings.alert_seconds
        self._looked = 0.0

    def start(self) -> None:
        """Begin to send."""
        for courier in self._couriers:
            courier.start()

    def stop(self) -> None:
        """End."""
        for courier in self._couriers:
            courier.stop()

    def tick(self) -> None:
        """Look, if it is time; called by the reconciler under its lease, and never waits for a receiver."""
        if self._looked and time.monotonic() - self._looked < self._every:
            return
        self._looked = time.monotonic()
        self._evaluator.look(now_ms())
