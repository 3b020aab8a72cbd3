"""Monitoring: the whole alarm rule over long simulated streams, many at once.

Rules of this room:
* pure; counts in, alarms out. It runs the product's own `Memory`, calibration and tests, with the streams of many
  devices side by side; only the bookkeeping that makes a verdict for people is left out;
* thresholds stand in for p-values where both say the same: T crosses its line where p < alpha.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .calibration import Calibration
from .drift_settings import DriftSettings
from .layout import Block
from .memory import Memory
from .tails import ncx2_isf
from .two_sample import psi_exceeds, two_sample

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


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
    """
    run = _Run(np.asarray(counts), np.asarray(reference, dtype=np.int64), settings, budget_streams or per_device)
    return run.all(key, calibrated=calibrated, recalibrate=recalibrate)


class _Run:
    def __init__(
        self, counts: npt.NDArray[np.integer], reference: Ints, settings: DriftSettings, per_device: int
    ) -> None:
        self.counts, self.reference, self.settings, self.per_device = counts, reference, settings, per_device
        self.windows, self.streams = counts.shape[0], counts.shape[1]
        self.statistic: list[Floats] = []
        self.noncentrality: list[Floats] = []
        self.line: list[Floats] = []
        for size in settings.sizes:
            blocks = self.windows // size
            summed = counts[: blocks * size].reshape(blocks, size, *counts.shape[1:]).sum(axis=1, dtype=np.int64)
            tests = two_sample(summed, reference)
            self.statistic.append(tests.statistic)
            self.noncentrality.append(tests.noncentrality(settings.effect_floor))
            self.line.append(_lines(tests.df, self.noncentrality[-1], settings.alpha(size, per_device)))

    def all(self, key: str, *, calibrated: bool, recalibrate: int) -> Replayed:
        settings, out = self.settings, Replayed([], [], [])
        layout = _Streams(tuple(map(str, range(self.streams))), self.reference)
        memory = Memory.fresh(layout, settings)  # type: ignore[arg-type]  # it has what is asked of it
        line = settings.record_line(self.per_device)
        calibration: Calibration | None = None
        learnt = -1
        latest = np.zeros((settings.levels, self.streams), dtype=np.bool_)
        before = np.zeros((settings.levels, self.streams), dtype=np.bool_)
        yes = np.ones(self.streams, dtype=np.bool_)
        for w in range(self.windows):
            if calibrated and w % recalibrate == 0 and int(memory.learnt.sum()) != learnt:
                calibration, learnt = memory.calibration(layout, settings), int(memory.learnt.sum())  # type: ignore[arg-type]
            previous = memory.active
            if calibrated:
                memory = memory.ranked(w, self.statistic[0][w], yes, key, line)
                raised = memory.active & ~previous
                if raised.any():
                    out.records.extend(Hit(w, int(s), 0) for s in np.flatnonzero(raised))
            blocks: dict[Block, Floats] = {}
            for level, size in enumerate(settings.sizes):
                if (w + 1) % size:
                    continue
                i = (w + 1) // size - 1
                blocks[Block(w + 1 - size, size)] = self.statistic[level][i]
                over = self._over(level, i, calibration)
                before[level], latest[level] = latest[level], over
                for s in np.flatnonzero(over):
                    hit = Hit(w, int(s), size)
                    out.warnings.append(hit)
                    ready = calibration is not None and bool(calibration.ready[s])
                    believed = bool(memory.active[s]) if ready else bool(before[level, s])
                    if believed and self._material(level, i, int(s)):
                        out.criticals.append(hit)
            if calibrated:
                quiet = np.asarray(~latest.any(axis=0))
                memory = memory.learn(
                    blocks,
                    self._window(w),
                    w,
                    healthy=quiet if calibration is None else quiet | ~calibration.ready,
                    quiet=quiet,
                    settings=settings,
                )
        return out

    def _window(self, w: int) -> Ints:
        return np.asarray(self.counts[w], dtype=np.int64)

    def _over(self, level: int, i: int, calibration: Calibration | None) -> npt.NDArray[np.bool_]:
        statistic = self.statistic[level][i]
        over = np.asarray(statistic > self.line[level][i])
        if calibration is None or not over.any():
            return over
        p = calibration.p_value(level, statistic, self.noncentrality[level][i])
        return np.asarray(over & (p < self.settings.alpha(self.settings.sizes[level], self.per_device)))

    def _material(self, level: int, i: int, s: int) -> bool:
        size = self.settings.sizes[level]
        cells = self.counts[i * size : (i + 1) * size, s].sum(axis=0, dtype=np.int64)
        return bool(psi_exceeds(cells, self.reference[s], self.settings.effect_floor))


def _lines(df: Floats, noncentrality: Floats, alpha: float) -> Floats:
    """T's line for each test: one inversion per distinct (df, λ), rounded to a thousandth of λ."""
    rounded = np.round(noncentrality, 3)
    keys, where = np.unique(np.stack([df.ravel(), rounded.ravel()]), axis=1, return_inverse=True)
    some = keys[0] > 0
    lines = np.full(keys.shape[1], np.inf)
    lines[some] = ncx2_isf(np.full(int(some.sum()), alpha), keys[0][some], keys[1][some])
    return np.asarray(lines[where.ravel()].reshape(df.shape))
