"""Monitoring: the whole alarm rule over long simulated streams, many at once.

Rules of this room:
* pure; counts in, alarms out. It runs the product's own `Memory`, calibration and tests, with the streams of many
  devices side by side; only the bookkeeping that makes a verdict for people is left out;
* thresholds stand in for p-values where both say the same: T crosses its line where p < alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .calibration import Calibration
from .drift_settings import DriftSettings
from .hourly import Now, learn_hours, ranked_by_hour, season_of
from .ladder import ByHour, Hours
from .layout import Block, Layout
from .memory import Memory
from .season import Hour, are_spread
from .tails import ncx2_isf
from .two_sample import psi_exceeds, two_sample

#: Windows tested at a time.
_SLICE: Final = 256
#: Windows after which a calibration that has not changed is taken for final: then lines stand in for p-values.
_SETTLED: Final = 48

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class Hit(NamedTuple):
    """Something a stream showed at a window."""

    window: int
    stream: int
    size: int  # of the block; 0 for the alarm of record


@dataclass(frozen=True)
class Replayed:
    """What the rule made of a run."""

    warnings: list[Hit]  # tests that crossed their line
    records: list[Hit]  # alarms of record raised
    criticals: list[Hit]  # warnings that the alarm of record, or before calibration a repetition, confirmed


class _Streams(NamedTuple):
    """What `Memory` asks of a layout."""

    names: tuple[str, ...]
    reference: Ints

    @property
    def streams(self) -> int:
        return len(self.names)


def replay(
    counts: npt.NDArray[np.integer],
    reference: npt.ArrayLike,
    settings: DriftSettings,
    *,
    per_device: int,
    key: str = "simulated",
    calibrated: bool = True,
    budget_streams: int | None = None,
    recalibrate: int = 1,
    hours: Sequence[Hour] = (),
) -> Replayed:
    """Run the alarm rule over windows of counts.

    Args:
        counts: int `[windows, streams, cells]`, the streams of a device beside each other.
        reference: int `[streams, cells]`.
        settings: budget, floor, ladder.
        per_device: streams per device, which share its budget.
        key: breaks ties of ranks.
        calibrated: False leaves calibration and record out: the bare ladder, confirmed by repetition.
        budget_streams: streams the budget is shared among, where more exist than are simulated.
        recalibrate: how often, in windows, the calibration is made anew while the baseline grows; the product does so
            every time, and a long simulation need not.
        hours: when each window was; without them no season is looked for.
    """
    run = _Run(np.asarray(counts), np.asarray(reference, dtype=np.int64), settings, budget_streams or per_device, hours)
    return run.all(key, calibrated=calibrated, recalibrate=recalibrate)


class _Run:
    def __init__(
        self,
        counts: npt.NDArray[np.integer],
        reference: Ints,
        settings: DriftSettings,
        per_device: int,
        hours: Sequence[Hour] = (),
    ) -> None:
        self.hours = hours
        self.counts, self.reference, self.settings, self.per_device = counts, reference, settings, per_device
        self.windows, self.streams = counts.shape[0], counts.shape[1]
        self._made = 0  # the window at which the calibration was made
        self._own: dict[int, tuple[Floats, Floats]] = {}  # per level: noncentralities, and lines
        self.statistic: list[Floats] = []
        self.noncentrality: list[Floats] = []
        self.line: list[Floats] = []
        for size in settings.sizes:
            blocks = self.windows // size
            summed = counts[: blocks * size].reshape(blocks, size, *counts.shape[1:]).sum(axis=1, dtype=np.int64)
            # In slices, which fit a processor's cache.
            tests = [two_sample(summed[i : i + _SLICE], reference) for i in range(0, max(blocks, 1), _SLICE)]
            self.statistic.append(np.concatenate([t.statistic for t in tests]))
            self.noncentrality.append(np.concatenate([t.noncentrality(settings.effect_floor) for t in tests]))
            df = np.concatenate([t.df for t in tests])
            self.line.append(_lines(df, self.noncentrality[-1], settings.alpha(size, per_device)))

    def all(self, key: str, *, calibrated: bool, recalibrate: int) -> Replayed:
        settings, out = self.settings, Replayed([], [], [])
        streams = _Streams(tuple(map(str, range(self.streams))), self.reference)
        layout: Layout = streams  # type: ignore[assignment]  # it has what is asked of it
        memory = Memory.fresh(layout, settings)
        line = settings.record_line(self.per_device)
        calibration: Calibration | None = None
        season: Hours | None = None
        learnt: object = None
        latest = np.zeros((settings.levels, self.streams), dtype=np.bool_)
        before = np.zeros((settings.levels, self.streams), dtype=np.bool_)
        yes = np.ones(self.streams, dtype=np.bool_)
        for w in range(self.windows):
            if calibrated and w % recalibrate == 0 and _learnt(memory) != learnt:
                calibration, learnt = memory.calibration(layout, settings), _learnt(memory)
                self._made, self._own = w, {}
            if calibrated and self.hours:
                season = self._season(memory, layout, season, fresh=w % recalibrate == 0)
            due = [(j, Block(w + 1 - n, n)) for j, n in enumerate(settings.sizes) if (w + 1) % n == 0]
            tests = {b: self._by_hour(season, b) for _, b in due} if season is not None else {}
            standing = calibration if season is None else _mixed(calibration, season)
            previous = memory.deciding().active
            if calibrated:
                memory = memory.ranked(w, self.statistic[0][w], yes, key, line)
                memory = ranked_by_hour(memory, w, tests.get(Block(w, 1)), key, line)
                raised = memory.deciding().active & ~previous
                if raised.any():
                    out.records.extend(Hit(w, int(s), 0) for s in np.flatnonzero(raised))
            active = memory.deciding().active
            spread = are_spread(self.hours[max(0, w + 1 - settings.history) : w + 1])
            for level, block in due:
                i = block.start // block.size
                over = self._over(level, i, calibration, settled=w - self._made > _SETTLED)
                if season is not None:
                    over = self._over_by_hour(level, tests[block], season, block, over)
                before[level], latest[level] = latest[level], over
                for s in np.flatnonzero(over):
                    hit = Hit(w, int(s), block.size)
                    out.warnings.append(hit)
                    ready = standing is not None and bool(standing.ready[s])
                    known = not spread or (standing is not None and bool(standing.away[s]))
                    believed = bool(active[s]) if ready else bool(before[level, s]) and known
                    if believed and self._material(block, int(s), tests.get(block), season):
                        out.criticals.append(hit)
            if calibrated:
                quiet = np.asarray(~latest.any(axis=0))
                healthy = quiet if standing is None else quiet | ~standing.ready
                blocks = {b: self.statistic[j][b.start // b.size] for j, b in due}
                cells = self._window(w)
                memory = memory.learn(blocks, cells, w, healthy=healthy, quiet=quiet, settings=settings)
                if season is not None:
                    now = Now(w, self.hours[w], cells, tests)
                    memory = self._learn_hours(memory, layout, season, now, quiet)
        return out

    def _learn_hours(self, memory: Memory, layout: Layout, season: Hours, now: Now, quiet: Bools) -> Memory:
        late = now.window + 1 - self.settings.sizes[-1]
        then = Now(late, self.hours[late], self._window(late), {}) if late >= 0 else None
        sound = np.ones(self.streams, dtype=np.bool_)
        return learn_hours(memory, layout, self.settings, season, now, then, sound=sound, quiet=quiet)

    def _season(self, memory: Memory, layout: Layout, known: Hours | None, *, fresh: bool) -> Hours | None:
        if fresh or known is None:
            return season_of(memory, layout, self.settings, self.hours)
        return known if memory.table is None else known._replace(table=memory.table)

    def _by_hour(self, season: Hours, block: Block) -> ByHour:
        span = slice(block.start, block.end)
        held = self.counts[span]
        rows = held.sum(axis=-1).astype(np.float64)
        expected = season.table.expected([h.slot for h in self.hours[span]], rows)
        tests = two_sample(held.sum(axis=0, dtype=np.int64), expected)
        least = self.settings.min_rows
        return ByHour(tests.statistic, (tests.current >= least) & (tests.reference >= least), expected)

    def _over_by_hour(self, level: int, test: ByHour, season: Hours, block: Block, over: Bools) -> Bools:
        """`over`, and of the streams that have a season, whether they are beyond their line against it."""
        used = season.table.chosen & test.known
        if not used.any():
            return over
        cells = self.counts[block.start : block.end].sum(axis=0, dtype=np.int64)
        tests = two_sample(cells, test.expected)
        p = tests.p_value(self.settings.effect_floor)
        noncentrality = tests.noncentrality(self.settings.effect_floor)
        p = np.maximum(p, season.calibration.p_value(level, tests.statistic, noncentrality))
        return np.where(used, p < self.settings.alpha(block.size, self.per_device), over)

    def _window(self, w: int) -> Ints:
        return np.asarray(self.counts[w], dtype=np.int64)

    def _over(self, level: int, i: int, calibration: Calibration | None, *, settled: bool) -> npt.NDArray[np.bool_]:
        statistic = self.statistic[level][i]
        over = np.asarray(statistic > self.line[level][i])
        if calibration is None or not over.any():
            return over
        alpha, noncentrality = (
            self.settings.alpha(self.settings.sizes[level], self.per_device),
            self.noncentrality[level][i],
        )
        if not settled:
            return np.asarray(over & (calibration.p_value(level, statistic, noncentrality) < alpha))
        if level not in self._own:
            self._own[level] = noncentrality, _own_line(calibration, level, noncentrality, alpha)
        same, own = self._own[level]
        if np.array_equal(same, noncentrality):
            return np.asarray(over & (statistic > own))
        return np.asarray(over & (calibration.p_value(level, statistic, noncentrality) < alpha))

    def _material(self, block: Block, s: int, test: ByHour | None, season: Hours | None) -> bool:
        cells = self.counts[block.start : block.end, s].sum(axis=0, dtype=np.int64)
        by_hour = season is not None and test is not None and bool(season.table.chosen[s] & test.known[s])
        reference = test.expected[s] if by_hour and test is not None else self.reference[s]
        return bool(psi_exceeds(cells, reference, self.settings.effect_floor))


def _learnt(memory: Memory) -> int:
    return int(memory.learnt.sum())


def _mixed(calibration: Calibration | None, season: Hours) -> Calibration | None:
    return None if calibration is None else calibration.mixed(season.calibration, season.table.chosen)


def _own_line(calibration: Calibration, level: int, noncentrality: Floats, alpha: float) -> Floats:
    """T's line by a calibration that no longer changes, per stream, to 1e-9 relative."""
    low, high = np.full(noncentrality.shape, 1e-6), np.full(noncentrality.shape, 1e9)
    for _ in range(64):
        middle = np.sqrt(low * high)
        above = calibration.p_value(level, middle, noncentrality) >= alpha
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return high


def _lines(df: Floats, noncentrality: Floats, alpha: float) -> Floats:
    """T's line for each test: one inversion per distinct (df, λ), rounded to a thousandth of λ."""
    rounded = np.round(noncentrality, 3)
    if df.size and df.min() == df.max() > 0 and rounded.min() == rounded.max():
        # As a rule, all windows are equally long.
        return np.full(df.shape, ncx2_isf(alpha, df.flat[0], rounded.flat[0]))
    keys, where = np.unique(np.stack([df.ravel(), rounded.ravel()]), axis=1, return_inverse=True)
    some = keys[0] > 0
    lines = np.full(keys.shape[1], np.inf)
    lines[some] = ncx2_isf(np.full(int(some.sum()), alpha), keys[0][some], keys[1][some])
    return np.asarray(lines[where.ravel()].reshape(df.shape))
