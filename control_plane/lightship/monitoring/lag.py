"""Monitoring: how much a row says that the row before did not.

Rules of this room:
* pure; the moments of windows in, a fact for people out; nothing alarms by it;
* the correlation of a feature with its own past is taken within windows: what windows have in common is φ's to tell.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Final, NamedTuple

import numpy as np

from lightship_agent.contract.moments import Moments

#: Rows so far apart that they are correlated less than this are as good as independent.
INDEPENDENT: Final = 0.2
#: Neighbours that are needed before anything is said, and standard errors that it must be above nothing.
_FEWEST: Final = 200
_SURE: Final = 4.0
#: Beyond this, how far apart rows would have to be isn't known.
_MOST: Final = 0.999


class Repeats(NamedTuple):
    """The feature whose rows repeat most."""

    name: str
    lag: float  # correlation of neighbouring rows
    every: int  # one row in so many carries nearly the same information


def repeats(moments: Iterable[Moments | None], names: tuple[str, ...], exclude: Collection[str] = ()) -> Repeats | None:
    """The feature whose rows repeat most; None where no feature's do, or too few rows came.

    Args:
        moments: of windows; None where a window has none.
        names: of the features, in their order.
        exclude: features that are not watched.
    """
    known = [m for m in moments if m is not None and m.rows > 1 and len(m.sums) == len(names)]
    pairs = sum(m.pairs for m in known)
    if pairs < _FEWEST:
        return None
    counts = [m.rows for m in known], [m.pairs for m in known]
    rows, neighbours = (np.array(n, dtype=np.float64)[:, None] for n in counts)
    sums, squares, lags = (
        np.array([np.asarray(part, dtype=np.float64) for part in parts])
        for parts in zip(*((m.sums, m.squares, m.lags) for m in known), strict=True)
    )
    mean = sums / rows
    variance = (squares - rows * mean**2).sum(axis=0) / rows.sum()
    together = (lags - neighbours * mean**2).sum(axis=0) / pairs
    measured = (variance > 0) & ~np.isin(names, list(exclude))
    lag = np.where(measured, together / np.where(variance > 0, variance, 1.0), 0.0)
    worst = int(lag.argmax())
    found = min(float(lag[worst]), _MOST)
    if found < INDEPENDENT or found * math.sqrt(pairs) < _SURE:
        return None
    return Repeats(names[worst], found, every=math.ceil(math.log(INDEPENDENT) / math.log(found)))
