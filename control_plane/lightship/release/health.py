"""Release: is signed metadata renewed in time? Pure.

Rules: what can be signed here is signed anew at half of its life, so that less than 45 % left means that it is not;
what needs the key of somebody asks for it when a quarter of its life is left; expired metadata stops updates, never
serving.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

from .metadata import LIFE

RENEWED_HERE: Final = 0.45  # of its life
RENEWED_BY_PEOPLE: Final = 0.25


@dataclass(frozen=True)
class RoleHealth:
    """One role's."""

    role: str
    expires: datetime
    state: Literal["ok", "due", "late", "expired"]
    sentence: str


def judge(expiries: Mapping[str, datetime], lacking: Mapping[str, int], now: datetime) -> list[RoleHealth]:
    """The health of every role.

    Args:
        expiries: when each role's metadata expires.
        lacking: how many signatures of each role can't be made here.
        now: the time.
    """
    return [_judge(role, expires, lacking.get(role, 0), now) for role, expires in expiries.items()]


def _judge(role: str, expires: datetime, lacking: int, now: datetime) -> RoleHealth:
    left, until = expires - now, f"{expires:%Y-%m-%d %H:%M} UTC"
    if left.total_seconds() <= 0:
        return RoleHealth(role, expires, "expired", f"{role} expired on {until}: devices take no update.")
    if lacking and left < LIFE[role] * RENEWED_BY_PEOPLE:
        sentence = f"{role} ends on {until}, and {lacking} of its signatures must be made elsewhere: "
        sentence += f"`lightship keys ceremony begin --renew {role}`."
        return RoleHealth(role, expires, "due", sentence)
    if not lacking and left < LIFE[role] * RENEWED_HERE:
        return RoleHealth(role, expires, "late", f"{role} ends on {until} and should have been signed anew by now.")
    return RoleHealth(role, expires, "ok", "")
