"""Alerting: which channel hears of what. Pure.

    critical=webhook,mail; warning/pumps=mail; *=alertmanager

Rules: every route that fits adds its channels; without any route every channel hears of everything; an alert fits a
device group when one of its devices is of it, and an alert of no device fits only routes of no group.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Sequence
from typing import Final

import msgspec

from lightship_agent.contract.codes import SettingsError

_ROUTE: Final = re.compile(
    r"(?P<severity>critical|warning|\*)(?:/(?P<group>[\w.*?-]+))?=(?P<channels>[a-z]+(?:,[a-z]+)*)"
)


class Route(msgspec.Struct, frozen=True):
    """One of them."""

    severity: str  # *: any
    group: str  # "": any, and none
    channels: tuple[str, ...]


def parse(text: str, channels: Collection[str]) -> tuple[Route, ...]:
    """The routes in `text`, to channels that are set up.

    Raises:
        SettingsError: settings.invalid.
    """
    routes = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        match = _ROUTE.fullmatch(re.sub(r"\s+", "", part))
        if match is None:
            message = f"alert_routes: expected SEVERITY[/GROUP]=CHANNEL[,CHANNEL], found {part!r}."
            raise SettingsError("settings.invalid", message)
        named = tuple(match["channels"].split(","))
        if strangers := sorted(set(named) - set(channels)):
            message = (
                f"alert_routes: {', '.join(strangers)} is not set up; set up are: {', '.join(channels) or 'none'}."
            )
            raise SettingsError("settings.invalid", message)
        routes.append(Route(match["severity"], match["group"] or "", named))
    return tuple(routes)


def channels_for(routes: Sequence[Route], channels: Sequence[str], severity: str, groups: Collection[str]) -> list[str]:
    """The channels that hear of an alert, in the order in which they are set up."""
    if not routes:
        return list(channels)
    chosen = {c for r in routes if _fits(r, severity, groups) for c in r.channels}
    return [c for c in channels if c in chosen]


def _fits(route: Route, severity: str, groups: Collection[str]) -> bool:
    if route.severity not in ("*", severity):
        return False
    return not route.group or any(fnmatch.fnmatchcase(g, route.group) for g in groups)
