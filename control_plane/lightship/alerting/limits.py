"""Alerting: from the settings to what the decider and the facts need. Pure.

Rules: settings are in the units people think in, everything here is in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightship.settings import Settings

from .decide import Rules


@dataclass(frozen=True)
class Limits:
    """When something is wrong."""

    interval: int  # of devices' reports
    certificate: int  # how long before its end a device's certificate is told of
    dead_letters: int  # an hour
    rules: Rules


def limits(settings: Settings) -> Limits:
    """The thresholds of these settings."""
    rules = Rules(
        group_at=max(2, settings.alert_group_at),
        group_wait=int(settings.alert_group_seconds * 1_000),
        clear=int(settings.alert_clear_seconds * 1_000),
        remind=int(settings.alert_remind_hours * 3_600_000),
    )
    return Limits(
        interval=int(settings.alert_report_seconds * 1_000),
        certificate=int(settings.alert_certificate_days * 86_400_000),
        dead_letters=settings.alert_dead_letters,
        rules=rules,
    )
