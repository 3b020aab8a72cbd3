"""Data: the directions along which a wide input is watched.

Rules:
* pure; the directions are the principal ones of what the makers sent. Their scale is free, since what becomes of the
  coordinates is quantiles: each has a largest number of one, which float16 holds well at any width;
* directions in which the rows do not differ are no directions: asking for more than there are is an error.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import DataError
from lightship_agent.contract.projection import MAX_DIRECTIONS, Projection

#: Of the profile's 4 MB; the rest is bins.
MAX_BYTES: Final = 3 * 1024 * 1024
#: More rows tell the directions no better, and cost memory with their square.
MAX_ROWS: Final = 2_000
_FLAT: Final = 1e-5  # of the widest direction's spread; narrower ones are rounding


def fit_projection(name: str, rows: npt.NDArray[Any], count: int) -> Projection:
    """The projection of input `name` on its `count` principal directions.

    Found through the rows' Gram matrix, `[n, n]`, because there are fewer rows than numbers in a row as a rule.

    Args:
        name: of the input.
        rows: `[n, …]`, any real type; at most 2,000 of them are used, evenly.
        count: of directions, 1 to 32.

    Raises:
        DataError: data.type for a count that can't be, or a projection too large to travel; data.empty for too few
            rows, or rows that differ in fewer directions.
    """
    width = int(np.prod(rows.shape[1:]))
    _check(name, len(rows), width, count)
    some = rows[np.linspace(0, len(rows) - 1, min(len(rows), MAX_ROWS)).astype(int)]
    flat = some.reshape(len(some), -1).astype(np.float64)
    center = flat.mean(axis=0)
    flat -= center
    spread, vectors = np.linalg.eigh(flat @ flat.T)  # ascending
    spread, vectors = spread[::-1][:count], vectors[:, ::-1][:, :count]
    if not np.isfinite(spread).all() or spread[-1] <= max(spread[0], 0.0) * _FLAT**2:
        found = int((spread > max(spread[0], 0.0) * _FLAT**2).sum())
        message = f"Input {name!r}: the golden rows differ in {found} directions, and {count} were asked for."
        raise DataError("data.empty", message, remedy="Send more rows, of all kinds the model meets, or ask for fewer.")
    directions = vectors.T @ flat
    largest = np.abs(directions).argmax(axis=1)
    directions /= directions[np.arange(count), largest][:, None]
    return Projection(
        input=name,
        width=width,
        count=count,
        center=center.astype("<f4").tobytes(),
        directions=directions.astype("<f2").tobytes(),
    )


def _check(name: str, rows: int, width: int, count: int) -> None:
    most = min(MAX_DIRECTIONS, (MAX_BYTES - 4 * width) // (2 * width))
    if not 1 <= count <= most:
        message = f"Input {name!r}: expected 1 to {most} directions, found {count}." if most >= 1 else (
            f"Input {name!r}: rows of {width} numbers are too wide for directions."
        )  # fmt: skip
        raise DataError("data.type", message)
    if rows <= count:
        message = f"Input {name!r}: {count} directions take more than {count} golden rows, found {rows}."
        raise DataError("data.empty", message, remedy="Hundreds of rows, as the model meets them, are worth having.")
