"""Monitoring: a run of windows, tested alone and in aligned blocks of 2, 4, … windows.

Rules of this room:
* pure; a block of 2^j is tested once, when its last window is in;
* a window without rows is still a window, so that blocks stay aligned;
* a stream that has a season is compared with the same hours of other weeks, where their hours are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.profile import WindowCounts

from .calibration import Calibration
from .drift_settings import DriftSettings
from .layout import Block, Counts, Layout
from .quality import quality_faults
from .season import Hour, Table
from .two_sample import two_sample
from .verdict import AlarmKind, QualityFault

Floats = npt.NDArray[np.float64]


class Hours(NamedTuple):
    """When the windows of a run were, and what is known of those hours."""

    table: Table
    of: Sequence[Hour]  # of each window of the run
    calibration: Calibration


class ByHour(NamedTuple):
    """A block's tests against the same hours of other weeks; arrays by stream."""

    statistic: Floats
    known: npt.NDArray[np.bool_]  # rows on both sides
    expected: Floats  # `[streams, cells]`


class Ladder:
    """Block sums of a run of windows, and the tests made on them."""

    def __init__(
        self,
        layout: Layout,
        windows: Sequence[WindowCounts],
        first: int,
        settings: DriftSettings,
        calibration: Calibration | None = None,
        hours: Hours | None = None,
    ) -> None:
        """Sum the windows up. With a `calibration`, its p-values count where they are the larger ones.

        With `hours`, streams that have a season are compared with it.

        Raises:
            DataError: data.profile-mismatch.
        """
        self.layout, self.settings, self.first, self._calibration = layout, settings, first, calibration
        self.end = first + len(windows)
        matrix = np.stack([layout.flat(w) for w in windows])
        self._hours = hours
        self._window_rows = layout.cells(matrix).sum(axis=-1).astype(np.float64) if hours else None
        self._sums = np.concatenate([np.zeros((1, matrix.shape[1]), dtype=np.int64), np.cumsum(matrix, axis=0)])
        self._rows = np.concatenate([[0], np.cumsum([w.rows for w in windows], dtype=np.int64)])
        self.statistics: dict[Block, Floats] = {}
        self.enough: dict[Block, npt.NDArray[np.bool_]] = {}  # rows on both sides
        self.p_values: dict[Block, Floats] = {}
        self.over: dict[Block, npt.NDArray[np.bool_]] = {}  # beyond the line
        self.faults: dict[Block, tuple[QualityFault, ...]] = {}
        self.by_hour: dict[Block, ByHour] = {}

    def rows(self, block: Block) -> int:
        """Rows in a block."""
        return int(self._rows[block.start + block.size - self.first] - self._rows[block.start - self.first])

    def counts(self, block: Block) -> Counts:
        """A block's flat counts."""
        summed: Counts = self._sums[block.start + block.size - self.first] - self._sums[block.start - self.first]
        return summed

    def _testable(self, block: Block) -> bool:
        within = block.start >= self.first and block.start + block.size <= self.end
        return within and self.rows(block) >= self.settings.min_rows

    def ending_at(self, window: int) -> list[Block]:
        """The testable blocks whose last window is `window`."""
        blocks = (Block(window + 1 - s, s) for s in self.settings.sizes if (window + 1) % s == 0)
        return [b for b in blocks if self._testable(b)]

    def latest(self, size: int) -> Block | None:
        """The last complete block of `size`, if it is testable."""
        block = Block(self.end // size * size - size, size)
        return block if self._testable(block) else None

    def preceding(self, block: Block) -> Block | None:
        """The block of the same length before, if it is testable."""
        earlier = Block(block.start - block.size, block.size)
        return earlier if self._testable(earlier) else None

    def test(self, blocks: set[Block]) -> None:
        """Test all streams of all `blocks` in one go."""
        ordered = sorted(blocks)
        if not ordered:
            return
        cells = self.layout.cells(np.stack([self.counts(b) for b in ordered]))
        tests = two_sample(cells, self.layout.reference)
        p = tests.p_value(self.settings.effect_floor)
        if self._calibration is not None:
            noncentrality = tests.noncentrality(self.settings.effect_floor)
            for i, block in enumerate(ordered):
                level = block.size.bit_length() - 1
                own = self._calibration.p_value(level, tests.statistic[i], noncentrality[i])
                p[i] = np.maximum(p[i], own)
        enough = (tests.current >= self.settings.min_rows) & (tests.reference >= self.settings.min_rows)
        p[~enough] = 1.0
        if self._hours is not None:
            self._test_by_hour(ordered, cells, p, self._hours)
        for i, block in enumerate(ordered):
            self.statistics[block], self.enough[block], self.p_values[block] = tests.statistic[i], enough[i], p[i]
            self.over[block] = p[i] < self.settings.alpha(block.size, max(self.layout.streams, 1))
            self.faults[block] = quality_faults(self.layout, block, self.counts(block), self.settings)

    def _test_by_hour(self, ordered: list[Block], cells: Counts, p: Floats, hours: Hours) -> None:
        """Test all blocks against the same hours, and put those p-values in the place of the chosen streams'."""
        assert self._window_rows is not None
        spans = [slice(b.start - self.first, b.end - self.first) for b in ordered]
        slots = [h.slot for h in hours.of]
        expected = np.stack([hours.table.expected(slots[s], self._window_rows[s]) for s in spans])
        tests = two_sample(cells, expected)
        least = self.settings.min_rows
        known = (tests.current >= least) & (tests.reference >= least)
        own = tests.p_value(self.settings.effect_floor)
        noncentrality = tests.noncentrality(self.settings.effect_floor)
        for i, block in enumerate(ordered):
            level = block.size.bit_length() - 1
            calibrated = hours.calibration.p_value(level, tests.statistic[i], noncentrality[i])
            p[i] = np.where(hours.table.chosen & known[i], np.maximum(own[i], calibrated), p[i])
            self.by_hour[block] = ByHour(tests.statistic[i], known[i], expected[i])

    def seasonal(self, block: Block, stream: int) -> bool:
        """Whether a tested block's stream was compared with the same hours of other weeks."""
        found = self.by_hour.get(block)
        return (
            self._hours is not None
            and found is not None
            and bool(self._hours.table.chosen[stream] & found.known[stream])
        )

    def reference(self, block: Block, stream: int) -> Floats:
        """The cells that a tested block's stream was compared with."""
        if self.seasonal(block, stream):
            return np.asarray(self.by_hour[block].expected[stream])
        return np.asarray(self.layout.reference[stream], dtype=np.float64)

    def crossed(self, block: Block) -> list[tuple[AlarmKind, str]]:
        """What crossed its line in a tested block."""
        keys: list[tuple[AlarmKind, str]] = [("shift", self.layout.names[s]) for s in np.flatnonzero(self.over[block])]
        return keys + [(fault.kind, fault.name) for fault in self.faults[block]]
