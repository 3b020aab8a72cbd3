"""Alerting: a Prometheus Alertmanager, over its API v2.

Rules:
* it is told what is open again and again, as it wants to be: what it does not hear of for `LIFE` it takes for over, so
  that alerts end there when we do, and come back when it has forgotten them;
* labels make an alert's identity there: of them only the severity changes, upwards, and then the alert that was
  there runs out within `LIFE`; what else changes is in annotations;
* it reminds by itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from lightship.settings import Settings
from lightship_agent.contract.codes import SettingsError

from .channels import secret
from .payload import Message, Told, plain
from .post import parse, post, trust

LIFE: Final = 300_000
_BATCH: Final = 200


class Alertmanager:
    """One of them, or the address of a cluster's balancer."""

    name = "alertmanager"
    batch = _BATCH
    refresh_seconds = 60.0

    def __init__(self, settings: Settings) -> None:
        """Check the settings and the token.

        Raises:
            SettingsError: settings.invalid.
            AlertError: alert.secret.
        """
        base = parse("alert_alertmanager_url", settings.alert_alertmanager_url)
        self._to = replace(base, path=base.path.rstrip("/") + "/api/v2/alerts")
        self._token = settings.alert_alertmanager_token
        if self._token and not base.tls and not base.near:
            message = "alert_alertmanager_url: expected https://, as a token would be sent to another machine."
            raise SettingsError("settings.invalid", message)
        self._trust = trust(settings.alert_ca)
        self._timeout = settings.alert_timeout_seconds
        self._labels = {"environment": settings.environment, "tenant": settings.tenant}
        self._headers()

    def send(self, messages: Sequence[Message]) -> None:
        """Post the newest of each alert.

        Raises:
            AlertError: alert.secret, alert.unreachable, alert.slow, alert.certificate, alert.status, alert.protocol.
        """
        newest = {m.alert.id: m.alert for m in messages}
        self._post(list(newest.values()), int(time.time() * 1_000))

    def refresh(self, alerts: Sequence[Told], now: int) -> None:
        """Say what is open.

        Raises:
            AlertError: as `send`.
        """
        for i in range(0, len(alerts), _BATCH):
            self._post(alerts[i : i + _BATCH], now)

    def _post(self, alerts: Sequence[Told], now: int) -> None:
        body = msgspec.json.encode([entry(a, self._labels, now) for a in alerts])
        post(self._to, self._headers(), body, self._trust, self._timeout)

    def _headers(self) -> dict[str, str]:
        if not self._token:
            return {}
        return {"authorization": f"Bearer {secret('alert_alertmanager_token', self._token).decode()}"}


def entry(alert: Told, labels: dict[str, str], now: int) -> dict[str, Any]:
    """An alert as Alertmanager reads it. Pure."""
    ends = alert.resolved_at or now + LIFE
    severity = alert.worst
    return {
        "labels": {
            "alertname": "Lightship" + "".join(part.capitalize() for part in alert.kind.split("-")),
            "alert_id": alert.id,
            "kind": alert.kind,
            "severity": severity,
            "group": alert.groups[0] if alert.groups and not alert.grouped else "",
            **labels,
        },
        "annotations": {
            "summary": plain(alert.sentence),
            "count": str(alert.count),
            "devices": ", ".join(alert.devices),
            "acknowledged_by": alert.acknowledged_by,
        },
        "startsAt": _moment(alert.opened_at),
        "endsAt": _moment(ends),
    }


def _moment(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1_000, UTC).isoformat(timespec="milliseconds")
