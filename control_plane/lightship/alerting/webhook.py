"""Alerting: webhooks, one signed POST per message.

Rules: HTTPS, or plain HTTP on this machine; signed as `signature` says; the id is the notice's, so that a receiver
that hears it again can tell.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from lightship.settings import Settings
from lightship_agent.contract.codes import AlertError, SettingsError

from . import signature
from .channels import required, secret
from .payload import Message, Told
from .post import parse, post, trust


class Webhook:
    """Somebody's program."""

    name = "webhook"
    batch = 1
    refresh_seconds = 0.0

    def __init__(self, settings: Settings) -> None:
        """Check the settings and the secret.

        Raises:
            SettingsError: settings.invalid.
            AlertError: alert.secret.
        """
        required(settings, "alert_webhook_secret")
        self._to = parse("alert_webhook_url", settings.alert_webhook_url)
        if not self._to.tls and not self._to.near:
            raise SettingsError("settings.invalid", "alert_webhook_url: expected https://, as it is another machine.")
        self._secret = settings.alert_webhook_secret
        self._trust = trust(settings.alert_ca)
        self._timeout = settings.alert_timeout_seconds
        self._key()

    def send(self, messages: Sequence[Message]) -> None:
        """Post them, one by one.

        Raises:
            AlertError: alert.secret, alert.unreachable, alert.slow, alert.certificate, alert.status, alert.protocol.
        """
        for message in messages:
            body = msgspec.json.encode(message)
            headers = signature.headers(self._key(), message.id, body, int(time.time()))
            post(self._to, {"user-agent": "lightship", **headers}, body, self._trust, self._timeout)

    def refresh(self, alerts: Sequence[Told], now: int) -> None:
        """It remembers what it was told."""

    def _key(self) -> bytes:
        try:
            return signature.key_of(secret("alert_webhook_secret", self._secret))
        except ValueError as e:
            raise AlertError("alert.secret", "alert_webhook_secret: what follows whsec_ is not base64.") from e
