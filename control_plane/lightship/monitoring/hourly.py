"""Monitoring: a device's memory and the hours of the week, brought together.

Rules of this room:
* pure; what a `Memory` is for the comparisons with the training data, its `seasonal` one is for those with the same
  hour of other weeks. It learns beside the other until a stream is chosen, and from then on decides about that one;
* a stream is chosen by what was seen before, so that the tests that count are one family at any time, and the budget
  is spent once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .drift_settings import DriftSettings
from .ladder import ByHour, Hours
from .layout import Block, Counts, Layout
from .memory import Memory
from .season import Hour, Table
from .verdict import Season

Bools = npt.NDArray[np.bool_]


class Now(NamedTuple):
    """A window: its number, its hour, its cells, and the tests by hour of the blocks that end with it."""

    window: int
    hour: Hour
    cells: Counts
    tests: dict[Block, ByHour]


def season_of(memory: Memory, layout: Layout, settings: DriftSettings, hours: Sequence[Hour]) -> Hours | None:
    """What is known of the hours; None where seasons are off, or there is none and will be none."""
    table = memory.table or Table.fresh(layout.streams, layout.reference.shape[1])
    if not settings.season_weeks or not table.useful:
        return None
    seasonal = memory.seasonal or Memory.fresh(layout, settings)
    return Hours(table, hours, seasonal.calibration(layout, settings, seasonal=True))


def ranked_by_hour(memory: Memory, window: int, tests: ByHour | None, key: str, line: float) -> Memory:
    """With a window's score against its hour ranked among those before."""
    if tests is None or memory.seasonal is None:
        return memory
    ranked = memory.seasonal.ranked(window, tests.statistic, tests.known, f"{key} by hour", line)
    return replace(memory, seasonal=ranked)


def learn_hours(
    memory: Memory,
    layout: Layout,
    settings: DriftSettings,
    season: Hours,
    now: Now,
    then: Now | None,
    *,
    sound: Bools,
    quiet: Bools,
) -> Memory:
    """With a window's comparisons learnt, an older window in the table, and streams chosen whose season is evident.

    Args:
        memory: of the device, with the window in it.
        layout: its streams.
        settings: how many weeks.
        season: what was known before.
        now: the window.
        then: the one that the longest block has left behind; None where there is none yet.
        sound: streams without a fault and with rows.
        quiet: streams in which no latest block is beyond its line.
    """
    seasonal = memory.seasonal or Memory.fresh(layout, settings)
    calibration, chosen = season.calibration, season.table.chosen
    base = next((t for b, t in now.tests.items() if b.size == 1), None)
    known = sound & base.known if base is not None else np.zeros_like(sound)
    calm = quiet | ~chosen
    seasonal = seasonal.learn(
        {b: t.statistic for b, t in now.tests.items() if t.known.any()},
        np.zeros_like(now.cells),
        now.window,
        healthy=known & (calm | ~calibration.ready),
        quiet=calm,
        settings=settings,
    )
    table = season.table.compared(now.hour, now.cells)
    if then is not None:
        fit = sound & ~(chosen & (seasonal.active | ~quiet))
        table = table.learnt(then.hour, then.cells, fit, settings.season_weeks)
    table = table.choose(calibration.ready, calibration.phi, layout.reference, settings.effect_floor)
    return replace(memory, table=table, seasonal=seasonal if table.useful else None)


def season_facts(memory: Memory, settings: DriftSettings) -> Season | None:
    """What a verdict says of the hours of the week."""
    table = memory.table
    if table is None or not settings.season_weeks:
        return None
    return Season(
        weeks=int(table.weeks.max(initial=0)),
        needed=settings.season_weeks,
        hours=int((table.weeks > 0).sum()),
        streams=tuple(memory.names[s] for s in np.flatnonzero(table.chosen)),
        over=table.closed,
    )
