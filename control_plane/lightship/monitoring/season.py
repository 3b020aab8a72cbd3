"""Monitoring: what a device sees at the same hour of other weeks.

Rules of this room:
* pure arrays in, arrays out; the table has counts for each of the 168 hours of the week, UTC. It is learnt over the
  first `season_weeks` weeks in which an hour is seen, then never again;
* a window enters the table when the longest block has gone by: what is tested is not in what it is tested against;
* hours are those of the device's own clock. It need not be right, only steady: an offset shifts all weeks alike. A time
  that can't be one, or doesn't go forward, is no time, and its window is judged without a season;
* a season is what repeats. With every window, its difference from the pooled hours is multiplied with that of its hour
  in the weeks before: the mean of these products is 0 where weeks don't resemble each other, whatever a window or a
  week is like. A stream is judged by its season from when the mean is beyond doubt and large enough to matter;
* pooled over all hours a seasonal stream must still be the training data: a drift is no season.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .tails import ncx2_sf
from .two_sample import two_sample

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

SLOTS: Final = 168
#: The slot of a window whose time is not known.
UNKNOWN: Final = -1
_HOUR_MS: Final = 3_600_000
_MONDAY: Final = 72  # hours from a Monday to the epoch, which was a Thursday
#: 2020: a clock that says less was never set.
_EARLIEST_MS: Final = 1_577_836_800_000
#: Wider layouts have no season: the table grows with them, 168-fold.
MAX_STREAMS: Final = 160
#: Standard errors from 0 at which what repeats is beyond doubt.
EVIDENT: Final = 5.0
#: A season matters where it makes the statistic this share larger than chance does.
MATERIAL: Final = 0.25
#: The share of the hours seen at all that must have been seen in two weeks.
_COVERED: Final = 0.9
#: How unlikely a table within the floor of the training data must look before it is taken for another world.
_AWAY_ALPHA: Final = 1e-6
_DAY: Final = 24
#: Hours of the day from which on windows are not all of one time.
_SPREAD: Final = 3


class Hour(NamedTuple):
    """When a window was: the hour of the week, and which week; `UNKNOWN` where the time can't be believed."""

    slot: int
    week: int


NO_TIME: Final = Hour(UNKNOWN, 0)


def hours_of(opened_ms: Sequence[int | None], latest_ms: int) -> list[Hour]:
    """The hours of consecutive windows by the times at which they were opened.

    Args:
        opened_ms: wall-clock milliseconds of the device; None where there is no window.
        latest_ms: no window was opened after this.
    """
    found, before = [], _EARLIEST_MS
    for at in opened_ms:
        if at is None or not before <= at <= latest_ms:
            found.append(NO_TIME)
            continue
        before = at
        week, slot = divmod(at // _HOUR_MS + _MONDAY, SLOTS)
        found.append(Hour(int(slot), int(week)))
    return found


def are_spread(hours: Sequence[Hour]) -> bool:
    """Whether these windows are of different times of the day: then what repeats may be its course, and no change."""
    return len({h.slot % _DAY for h in hours if h.slot != UNKNOWN}) >= _SPREAD


@dataclass(frozen=True)
class Table:
    """The counts of every hour of the week, and what they say about seasons."""

    counts: Ints  # [SLOTS, streams, cells]
    weeks: Ints  # [SLOTS]: weeks that were learnt
    last: Ints  # [SLOTS]: the last of them
    agreement: Floats  # [streams, 3]: windows, sum and sum of squares of how a window agrees with its hour
    size: Floats  # [streams]: sum over windows of the noncentrality that a season has there, over its df
    chosen: Bools  # [streams]: judged by their season
    closed: bool = False  # all is learnt, and who has no season now has none

    @classmethod
    def fresh(cls, streams: int, cells: int) -> Table:
        """Nothing seen; closed from the start where it would be too large."""
        closed = streams > MAX_STREAMS
        return cls(
            counts=np.zeros((0 if closed else SLOTS, streams, cells), dtype=np.int64),
            weeks=np.zeros(SLOTS, dtype=np.int64),
            last=np.full(SLOTS, -1, dtype=np.int64),
            agreement=np.zeros((streams, 3)),
            size=np.zeros(streams),
            chosen=np.zeros(streams, dtype=np.bool_),
            closed=closed,
        )

    @property
    def useful(self) -> bool:
        """Whether anything can be compared with it, now or later."""
        return not self.closed or bool(self.chosen.any())

    def expected(self, slots: Sequence[int], rows: Floats) -> Floats:
        """What the same hours saw, as the counts of a sample as large as it is sure, float `[streams, cells]`.

        The shares of the hours are mixed as the windows' rows are. The mixture of hours with n_i rows each, weighted
        w_i, varies as a sample of 1/Σ(w_i²/n_i) rows does. 0 rows where an hour has none, or a window no time.

        Args:
            slots: of the block's windows.
            rows: per window and stream, `[windows, streams]`.
        """
        where, index = np.unique(np.asarray(slots), return_inverse=True)
        nothing = np.zeros(self.counts.shape[1:])
        if not len(self.counts) or where[0] == UNKNOWN:
            return nothing
        weight = np.zeros((len(where), rows.shape[1]))
        np.add.at(weight, index, rows)
        total = weight.sum(axis=0)
        weight /= np.maximum(total, 1.0)
        held = self.counts[where].astype(np.float64)
        n = held.sum(axis=-1)
        known = (total > 0) & ((n > 0) | (weight == 0)).all(axis=0)
        safe = np.maximum(n, 1.0)
        sure = 1 / np.maximum((weight**2 / safe).sum(axis=0), 1e-12)
        shares = (weight[..., None] * held / safe[..., None]).sum(axis=0)
        return np.where(known[:, None], shares * sure[:, None], 0.0)

    def compared(self, hour: Hour, cells: Ints) -> Table:
        """With a window's agreement with its hour of the weeks before taken into account, and before it is learnt.

        Args:
            hour: of the window.
            cells: its counts, int `[streams, cells]`.
        """
        if self.closed or hour.slot == UNKNOWN or not self.weeks[hour.slot]:
            return self
        held = self.counts[hour.slot].astype(np.float64)
        pooled = self.counts.sum(axis=0, dtype=np.float64)
        n, big, all_ = cells.sum(axis=-1), held.sum(axis=-1), pooled.sum(axis=-1)
        usable = (n > 0) & (big > 0)
        now, then, mean = (c / np.maximum(s, 1.0)[:, None] for c, s in ((cells, n), (held, big), (pooled, all_)))
        products = (now - mean) * (then - mean) / np.where(mean > 0, mean, 1.0)
        alike = np.where(usable, products.sum(axis=-1), 0.0)
        df = np.maximum((pooled > 0).sum(axis=-1) - 1, 1)
        step = np.stack([usable.astype(np.float64), alike, alike**2], axis=-1)
        return replace(self, agreement=self.agreement + step, size=self.size + np.where(usable, alike * n / df, 0.0))

    def learnt(self, hour: Hour, cells: Ints, fit: Bools, most: int) -> Table:
        """With a window learnt, where its hour has not had `most` weeks; closed when every hour has.

        Args:
            hour: of the window.
            cells: its counts.
            fit: streams that may learn from it.
            most: weeks per hour.
        """
        if self.closed or hour.slot == UNKNOWN:
            return self
        again = self.last[hour.slot] == hour.week
        if self.weeks[hour.slot] >= most and not again:
            return self._closed(most)
        counts, weeks, last = self.counts.copy(), self.weeks.copy(), self.last.copy()
        counts[hour.slot] += np.where(fit[:, None], cells, 0)
        weeks[hour.slot] += not again
        last[hour.slot] = hour.week
        return replace(self, counts=counts, weeks=weeks, last=last)

    def _closed(self, most: int) -> Table:
        """Closed, and only what was chosen kept, when nearly all hours that were seen have all their weeks."""
        seen = self.weeks > 0
        if (self.weeks >= most).sum() < _COVERED * seen.sum():
            return self
        kept = np.where(self.chosen[None, :, None], self.counts, 0)
        return replace(self, counts=kept, closed=True)

    def choose(self, ready: Bools, phi: Floats, reference: npt.ArrayLike, floor: float) -> Table:
        """With the streams chosen whose season has become evident; a choice stands for good.

        Args:
            ready: streams that have been compared with their season often enough to be calibrated by it.
            phi: of each stream's comparison with the training data, by which its noise is larger than chance's.
            reference: the training data's counts, int `[streams, cells]`.
            floor: the effect w0² within which all hours together must be.
        """
        seen = self.weeks > 0
        if self.closed or not seen.any() or (self.weeks > 1).sum() < _COVERED * seen.sum():
            return self
        windows, total, squares = self.agreement.T
        with np.errstate(divide="ignore", invalid="ignore"):
            evident = np.where(squares > 0, total / np.sqrt(squares), 0.0) >= EVIDENT
            material = np.where(windows > 0, self.size / windows, 0.0) >= MATERIAL
        fresh = evident & material & ready & ~self.chosen
        if not fresh.any():
            return self
        tests = two_sample(self.counts.sum(axis=0), reference)
        shrunk = np.maximum(phi, 1.0)
        noncentrality = tests.noncentrality(floor) / shrunk
        away = ncx2_sf(tests.statistic / shrunk, np.maximum(tests.df, 1.0), noncentrality) < _AWAY_ALPHA
        return replace(self, chosen=self.chosen | (fresh & ~away))
