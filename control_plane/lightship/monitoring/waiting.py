"""Monitoring: what a proposal to retrain waits for, in words.

Rules:
* rows are the only thing that a proposal waits for in silence, and devices are why they don't come: they are not asked
  to share any, or have shared what they may today;
* a device says in its heartbeats how many rows may still leave it today. What one said yesterday is over: at 00:00 UTC
  all of them may share again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from lightship.storage.models import Device

_DAY_MS: Final = 86_400_000


class Sharers(NamedTuple):
    """Devices that serve a model, those of them that share rows, and those that have shared what they may today."""

    serving: int
    sharing: int
    spent: int


def sharers(session: Session, model: str, excluded: Sequence[str], now: int) -> Sharers:
    """How many devices may share rows of a model.

    Args:
        session: a read session.
        model: what they serve.
        excluded: devices not to learn from.
        now: wall-clock milliseconds.
    """
    d = Device
    left = d.health["shared_rows_left"].as_float()
    spent = case(((left <= 0) & (d.last_seen >= now - now % _DAY_MS), 1), else_=0)
    query = select(func.count(), func.count(d.health["shared_rows_today"].as_float()), func.sum(spent))
    mine = query.where(d.state == "active", d.running_model == model, d.id.not_in(excluded))
    serving, sharing, used = session.execute(mine).one()
    return Sharers(serving, sharing, used or 0)


def words(have: int, needed: int, of: Sharers) -> str:
    """What a proposal waits for that has so many labelled rows; "" where it has enough."""
    if have >= needed:
        return ""
    rows = f"Waits for rows: {have} of {needed}"
    if not of.sharing:
        return f"{rows}; none of {of.serving} devices shares any (share_labelled_rows)."
    if of.spent:
        spent = f"{of.spent} of {of.sharing} devices have shared what they may today (share_rows_a_day)"
        return f"{rows}; {spent}, and go on at 00:00 UTC."
    return f"{rows}; {of.sharing} of {of.serving} devices share theirs as labels come."
