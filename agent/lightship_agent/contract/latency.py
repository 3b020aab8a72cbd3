"""Contract: latencies as counts in fixed cells, which add up over requests, models, devices and years.

Rules:
* the edges are the same on every device and in every release: two counts of the same cell may always be added;
* two cells to an octave: a quantile is known to within a fifth of itself, however fast or slow the model is;
* a cell holds what took at most its upper edge, as Prometheus has it; what is above the last edge has its own cell;
* counts are those since a beginning. Zeros at the end are not sent.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate, zip_longest
from typing import Final

#: Upper edges in nanoseconds: from 32 µs to 33.6 s, a factor of √2 apart.
EDGES_NS: Final = tuple(round(32_000 * 2 ** (k / 2)) for k in range(41))
#: The same in seconds.
EDGES: Final = tuple(ns / 1e9 for ns in EDGES_NS)
CELLS: Final = len(EDGES) + 1
#: Every second edge, for those who keep a series for each.
OCTAVES: Final = EDGES[::2]


def cell(seconds: float) -> int:
    """The cell of what took so long."""
    return bisect_left(EDGES, seconds)


def trimmed(counts: Sequence[int]) -> tuple[int, ...]:
    """Without the zeros at the end."""
    last = max((i for i, n in enumerate(counts) if n), default=-1)
    return tuple(counts[: last + 1])


def merged(histograms: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """What they count together; exact."""
    total: list[int] = []
    for counts in histograms:
        total = [a + b for a, b in zip_longest(total, counts, fillvalue=0)]
    return trimmed(total)


def grown(before: Sequence[int], after: Sequence[int]) -> tuple[int, ...]:
    """What was counted between two readings; all of the later one where counting began anew in between."""
    steps = [b - a for a, b in zip_longest(before, after, fillvalue=0)]
    return trimmed(after if any(step < 0 for step in steps) else steps)


def quantile(counts: Sequence[int], share: float) -> float | None:
    """The latency in seconds that `share` of all stayed below, None of nothing; between edges by their logarithm."""
    total = sum(counts)
    if not total:
        return None
    rank, below = share * total, 0
    for i, n in enumerate(counts):
        if n and below + n >= rank:
            if i >= len(EDGES):
                return EDGES[-1]
            low = EDGES[i - 1] if i else EDGES[0] / math.sqrt(2)
            return float(low * (EDGES[i] / low) ** (max(0.0, rank - below) / n))
        below += n
    return EDGES[-1]


def cumulative(counts: Sequence[int]) -> tuple[int, ...]:
    """How many took at most each of `OCTAVES`: exact, because those are edges too."""
    sums = list(accumulate((*counts, *(0,) * (CELLS - len(counts)))))
    return tuple(sums[: len(EDGES) : 2])
