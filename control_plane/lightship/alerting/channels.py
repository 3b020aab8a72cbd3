"""Alerting: the channels that are set up.

Rules:
* a channel that is set up halfway is refused at the start, by name of the setting;
* secrets are read from their files whenever they are used, so that a new one needs no restart; a file that others may
  read is refused; no secret is in a setting, a message or a log;
* what belongs to a channel alone is in its own file.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from lightship.settings import Settings
from lightship_agent.contract.codes import AlertError, SettingsError

from .payload import Message, Told

MAX_SECRET: Final = 4_096


class Channel(Protocol):
    """Carries messages."""

    name: str
    batch: int  # messages it takes at once
    refresh_seconds: float  # how often it wants to hear what is open; 0: never

    def send(self, messages: Sequence[Message]) -> None:
        """Send them; returns once the receiver has taken them.

        Raises:
            AlertError: alert.*, by what went wrong.
        """

    def refresh(self, alerts: Sequence[Told], now: int) -> None:
        """Say what is open.

        Raises:
            AlertError: as `send`.
        """


def set_up(settings: Settings) -> list[Channel]:
    """The channels of these settings.

    Raises:
        SettingsError: settings.invalid.
        AlertError: alert.secret.
    """
    from .alertmanager import Alertmanager
    from .mail import Mail
    from .webhook import Webhook

    found: list[Channel] = []
    if settings.alert_webhook_url:
        found.append(Webhook(settings))
    if settings.alert_mail_server:
        found.append(Mail(settings))
    if settings.alert_alertmanager_url:
        found.append(Alertmanager(settings))
    return found


def named(settings: Settings, name: str) -> Channel:
    """The channel of that name.

    Raises:
        AlertError: alert.unknown, alert.secret.
        SettingsError: settings.invalid.
    """
    channels = set_up(settings)
    for channel in channels:
        if channel.name == name:
            return channel
    there = ", ".join(c.name for c in channels) or "none"
    message = f"No alert channel {name!r} is set up; set up are: {there}."
    raise AlertError("alert.unknown", message, remedy="Set alert_webhook_url, alert_mail_server or the like.")


def required(settings: Settings, *names: str) -> None:
    """Refuse a channel that lacks one of these settings.

    Raises:
        SettingsError: settings.invalid.
    """
    for name in names:
        if not getattr(settings, name):
            raise SettingsError("settings.invalid", f"{name}: expected a value, as its channel is set up.")


def secret(setting: str, path: str) -> bytes:
    """The content of a secret's file, without the line's end.

    Raises:
        AlertError: alert.secret.
    """
    try:
        with Path(path).expanduser().open("rb") as f:
            mode = stat.S_IMODE(Path(path).expanduser().stat().st_mode)
            content = f.read(MAX_SECRET + 1)
    except OSError as e:
        raise AlertError("alert.secret", f"{setting}: {path} can't be read: {e.strerror}.") from e
    if mode & 0o077:
        message = f"{setting}: others may read {path}, its mode is {mode:04o}."
        raise AlertError("alert.secret", message, remedy=f"chmod 600 {path}")
    found = content.strip()
    if not found or len(content) > MAX_SECRET or not found.isascii() or b"\n" in found:
        raise AlertError("alert.secret", f"{setting}: expected one line of ASCII in {path}.")
    return found
