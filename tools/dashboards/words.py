"""Dashboards: what several of them say."""

from __future__ import annotations

from typing import Final

from .panels import Panel, Query

GROUP: Final = ("group", "Group", "lightship_devices")
MODEL: Final = ("model", "Model", "lightship_devices_running")
OF: Final = 'group=~"$group"'
WHICH: Final = 'model=~"$model"'
VERSION: Final = "{{model}}@{{version}}"


def stat(title: str, says: str, expression: str, *, unit: str = "short", steps: tuple[float, ...] = ()) -> Panel:
    """A number, and what it was."""
    return Panel(title, says, "stat", (Query(expression),), unit=unit, width=4, height=4, steps=steps)
