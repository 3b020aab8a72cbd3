"""Contract: what is wrong with data before any statistics: kinds, and counts that merge by addition.

Rules:
* counts are sparse: what did not happen is not there;
* a count is known by its kind and its feature's place in the schema, `WHOLE` where it is about all of a row;
* what the cells of the profile count already (missing, under, over, a new category) is not counted here again, nor is
  volume: a window has its rows, and when it was opened and closed.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Final

import msgspec

WHOLE: Final = -1

#: What counts rows that were refused, and so are in no window's cells.
REFUSED: Final[dict[str, str]] = {
    "type": "rows of a wrong type",
    "shape": "rows of a wrong width or shape",
    "missing": "rows without a value where one is required",
    "infinite": "rows with an infinite value",
    "category": "rows with an unknown category where only known ones are allowed",
}
#: What is found of a window when it closes, and counts windows.
FOUND: Final[dict[str, str]] = {
    "stuck": "one and the same value in all rows, of a feature that varied in training",
    "unit": "nearly all rows beyond what training saw, by another order of magnitude",
    "swapped": "the values of another feature, which has this one's",
    "clock": "the device's clock was set back while the window was open",
}

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class QualityCount(msgspec.Struct, frozen=True, kw_only=False, array_like=True, order=True):
    """How often a kind was met. A reader steps over kinds it does not know."""

    kind: Annotated[str, msgspec.Meta(max_length=16)]
    feature: Annotated[int, msgspec.Meta(ge=WHOLE, le=2**20)]
    count: Count


Quality = Annotated[tuple[QualityCount, ...], msgspec.Meta(max_length=50_000)]


def merge_quality(*some: tuple[QualityCount, ...]) -> tuple[QualityCount, ...]:
    """The sum, by kind and feature, in their order."""
    counts: dict[tuple[str, int], int] = {}
    for item in itertools.chain(*some):
        key = item.kind, item.feature
        counts[key] = counts.get(key, 0) + item.count
    return tuple(QualityCount(*key, count) for key, count in sorted(counts.items()) if count)
