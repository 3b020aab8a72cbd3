"""Data: what is wrong with a file, cell by cell, said in one error.

Rules:
* a reader collects what fails and speaks once: the first five cases, and how many there are;
* the code is that of the earliest case, so the same file always gives the same code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from lightship_agent.contract.codes import DataError

SHOWN: Final = 5
_REMEDIES: Final = {
    "data.missing-value": "Fill the cells, drop the rows, or allow missing values.",
    "data.type": "Correct the cells, or drop the rows or the column.",
    "data.category": "Correct the words; a model that shall know new ones is trained on them.",
    "data.range": "Rescale the column, or correct the cells: float32 holds finite values up to 3.4e38.",
}


@dataclass(frozen=True, order=True)
class Failure:
    """One cell that can't be used.

    Attributes:
        at: the line of the file, or the row of the array.
        column: the column's title.
        code: a `data.*` code.
        sentence: what was expected and what was found, without place.
    """

    at: int
    column: str
    code: str
    sentence: str


@dataclass
class Failures:
    """Collects failures of one dataset: keeps the first of each column, counts all."""

    place: str = "line"
    total: int = 0
    kept: list[Failure] = field(default_factory=list)
    _per_column: dict[str, int] = field(default_factory=dict)

    def add(self, failure: Failure) -> None:
        """Count `failure`; keep it if it is among its column's first ones."""
        self.total += 1
        seen = self._per_column.get(failure.column, 0)
        if seen < SHOWN:
            self.kept.append(failure)
            self._per_column[failure.column] = seen + 1

    def check(self) -> None:
        """Speak, if anything failed.

        Raises:
            DataError: the code of the earliest failure.
        """
        if not self.kept:
            return
        first = sorted(self.kept)[:SHOWN]
        cases = "; ".join(f"{self.place} {f.at}, column {f.column!r}: {f.sentence}" for f in first)
        rest = f"; and {self.total - len(first)} more" if self.total > len(first) else ""
        counted = "1 cell" if self.total == 1 else f"{self.total} cells"
        message = f"{counted} can't be used: {cases}{rest}."
        raise DataError(first[0].code, message, remedy=_REMEDIES.get(first[0].code, ""))
