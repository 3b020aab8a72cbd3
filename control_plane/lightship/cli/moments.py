"""CLI: moments, as people give them."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime

import click


def moment(_context: click.Context, _option: click.Parameter, value: str) -> int:
    """`2h` ago, or an ISO date and time, as milliseconds."""
    if found := re.fullmatch(r"(\d{1,6})([smhd])", value):
        ago = int(found[1]) * {"s": 1, "m": 60, "h": 3_600, "d": 86_400}[found[2]]
        return int((time.time() - ago) * 1_000)
    try:
        at = datetime.fromisoformat(value)
    except ValueError as e:
        message = f"expected a span like 12h or 7d, or a date like 2026-05-01T12:00; found {value!r}"
        raise click.BadParameter(message) from e
    return int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1_000)
