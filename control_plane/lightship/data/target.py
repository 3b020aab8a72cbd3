"""Data: what a target column means - the task, the class names in order, the numbers to learn.

Rules:
* pure: texts in, arrays out;
* whole numbers are class names when there are few of them, and they sort as numbers: 2 before 10;
* a number column with a typo is not a column of classes: it is refused, naming the cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import DataError

from .failures import Failure, Failures

Task = Literal["classification", "regression"]
TaskChoice = Literal["auto", "classification", "regression"]

#: Up to this many distinct whole numbers are classes.
MAX_AUTO_CLASSES: Final = 20
MAX_CLASSES: Final = 1_000
FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
_MISSING: Final = frozenset({"", "na", "n/a", "nan", "null", "none"})


@dataclass(frozen=True, eq=False)
class Target:
    """An encoded target: `y` is int64 `[n]` class indices, or float32 `[n]` values."""

    task: Task
    labels: tuple[str, ...]
    y: npt.NDArray[Any]


def is_missing(cell: str) -> bool:
    """Empty, NA, N/A, NaN, null or None, in any case."""
    return cell.strip().lower() in _MISSING


def parse_number(cell: str) -> float | None:
    """The number in `cell` (infinities included), or None when it is not one."""
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def fits_float32(value: float) -> bool:
    """Finite, and not above what float32 holds."""
    return math.isfinite(value) and abs(value) <= FLOAT32_MAX


def encode_target(
    cells: Sequence[str],
    places: Sequence[int],
    column: str,
    *,
    task: TaskChoice = "auto",
    labels: tuple[str, ...] | None = None,
    place: str = "line",
) -> Target:
    """Decide the task and encode the target.

    Args:
        cells: the target's texts, one per row.
        places: the line or row number of each.
        column: the target's title.
        task: "auto" takes text or at most `MAX_AUTO_CLASSES` distinct whole numbers for classes.
        labels: the class names of an existing model; others are then refused.
        place: what `places` count.

    Raises:
        DataError: data.missing-value, data.type, data.range, data.empty.
    """
    failures = Failures(place)
    for at, cell in zip(places, cells, strict=True):
        if is_missing(cell):
            failures.add(Failure(at, column, "data.missing-value", "the target has no value"))
    failures.check()
    numbers = [parse_number(cell) for cell in cells]
    chosen = _decide(cells, numbers, column) if task == "auto" and not labels else task
    if labels or chosen == "classification":
        return _encode_classes(cells, numbers, places, column=column, labels=labels, place=place)
    return _encode_values(cells, numbers, places, column=column, place=place)


def _decide(cells: Sequence[str], numbers: Sequence[float | None], column: str) -> Task:
    distinct = {n for n in numbers if n is not None}
    texts = [cell for cell, n in zip(cells, numbers, strict=True) if n is None]
    if not texts:
        whole = all(n.is_integer() for n in distinct)
        return "classification" if whole and len(distinct) <= MAX_AUTO_CLASSES else "regression"
    if len(distinct) > MAX_AUTO_CLASSES and len(texts) < len(cells) / 2:
        # Mostly numbers, and many different ones: the texts are slips, not class names.
        return "regression"
    many = len(set(cells))
    if many > MAX_CLASSES or (many == len(cells) and many > MAX_AUTO_CLASSES):
        message = f"Target {column!r} holds {many} different texts in {len(cells)} rows: an identifier, not a class."
        raise DataError("data.type", message, remedy="Name the column to predict.")
    return "classification"


def _encode_classes(
    cells: Sequence[str],
    numbers: Sequence[float | None],
    places: Sequence[int],
    *,
    column: str,
    labels: tuple[str, ...] | None,
    place: str,
) -> Target:
    whole = all(n is not None and math.isfinite(n) and n.is_integer() for n in numbers)
    names = [str(int(n or 0)) for n in numbers] if whole else [cell.strip() for cell in cells]
    known = labels or sort_labels(set(names))
    if len(known) > MAX_CLASSES:
        raise DataError("data.type", f"Expected at most {MAX_CLASSES} classes, found {len(known)} in {column!r}.")
    index = {name: i for i, name in enumerate(known)}
    failures = Failures(place)
    y = np.zeros(len(cells), dtype=np.int64)
    for i, (at, name) in enumerate(zip(places, names, strict=True)):
        found = index.get(name, index.get(cells[i].strip(), -1))
        if found < 0:
            sentence = f"{name[:60]!r} is not a class of the model ({', '.join(known[:10])})"
            failures.add(Failure(at, column, "data.type", sentence))
        y[i] = found
    failures.check()
    return Target("classification", known, y)


def sort_labels(names: set[str]) -> tuple[str, ...]:
    """Class names in order: as numbers when all are whole numbers, else as text."""
    try:
        return tuple(sorted(names, key=int))
    except ValueError:
        return tuple(sorted(names))


def _encode_values(
    cells: Sequence[str], numbers: Sequence[float | None], places: Sequence[int], *, column: str, place: str
) -> Target:
    failures = Failures(place)
    for at, cell, number in zip(places, cells, numbers, strict=True):
        if number is None:
            failures.add(Failure(at, column, "data.type", f"expected a number, found {cell[:60]!r}"))
        elif not fits_float32(number):
            failures.add(Failure(at, column, "data.range", f"{cell[:60]!r} can't be held by float32"))
    failures.check()
    return Target("regression", (), np.array(numbers, dtype=np.float64).astype(np.float32))
