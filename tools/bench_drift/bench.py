"""Bench drift: what every part is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

YEAR: Final = 8_760  # windows
FEATURES: Final = 30


@dataclass(frozen=True)
class Sizes:
    """How much is simulated."""

    years: int = 40  # device-years of every nature
    year: int = YEAR  # windows of a device-year; fewer only to see that it runs
    runs: int = 100  # devices per shift
    repeats: int = 40  # windows per change of how features go together
    months: int = 12  # of fleets of a hundred devices
    quiet_hours: int = 72  # of the streams that all tools are shown
    trials: int = 40  # windows per fault of a real dataset
    workers: int = 2


QUICK: Final = Sizes(
    years=2, year=600, runs=6, repeats=5, months=1, quiet_hours=24, trials=4,
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """The workplace."""

    folder: Path
    sizes: Sizes
    again: bool = False  # measure also what a part has kept of a run that was ended
