"""Bench drift: the rows that all tools are shown, as files.

Quiet streams are `[hours, 200, 30]`. In the shifted ones all thirty columns shift at once, from the first hour on: for
rules that judge each column on its own, that is thirty runs in one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from .bench import FEATURES, YEAR, Bench
from .streams import INDEPENDENT, REFERENCE, ROWS, marginal, rows

QUIET: Final = (INDEPENDENT, "AR(1) 0.9", "daily cycle 0.3 sd")
#: Mean and spread after the change.
SHIFTS: Final = {"mean +0.25 sd": (0.25, 1.0), "mean +0.5 sd": (0.5, 1.0), "mean +1 sd": (1.0, 1.0),
                 "spread × 1.25": (0.0, 1.25)}  # fmt: skip
HOURS: Final = 100  # of a shifted stream
#: Before a shift a device of ours has seen as much of its own; others compare with the reference alone.
HEALTHY: Final = 368

assert YEAR > HEALTHY


def write(bench: Bench, folder: Path) -> None:
    """All of them, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "done").exists():
        return
    for number, nature in enumerate(QUIET):
        rng = np.random.default_rng([23, number])
        hours = bench.sizes.quiet_hours
        columns = [rows(nature, rng, hours).astype(np.float32) for _ in range(FEATURES)]
        np.save(folder / f"{nature}.npy", np.stack(columns, axis=-1).reshape(hours, ROWS, FEATURES))
        if nature == INDEPENDENT:
            np.save(folder / "reference.npy", marginal(nature, rng, (REFERENCE, FEATURES)).astype(np.float32))
            np.save(folder / "healthy.npy", _normal(rng, HEALTHY + 32))
    for number, (name, (mean, spread)) in enumerate(SHIFTS.items()):
        rng = np.random.default_rng([29, number])
        np.save(folder / f"drift {name}.npy", mean + spread * _normal(rng, HOURS))
    (folder / "done").touch()


def _normal(rng: np.random.Generator, hours: int) -> npt.NDArray[np.float32]:
    return rng.standard_normal((hours, ROWS, FEATURES)).astype(np.float32)
