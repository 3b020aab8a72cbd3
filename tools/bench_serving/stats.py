"""Bench serving: what many bursts come to. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Of a figure over bursts: its median, and its best decile (the lowest)."""

    median: float
    best: float


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(statistics.median(values), quantile(values, 0.1))


def quantile(values: Sequence[float], q: float) -> float:
    """The value below which the share `q` lies, between two values where it lies between them."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the line of least squares through the points; 0 where they have no width."""
    xs, ys = zip(*points, strict=True)
    x, y = statistics.fmean(xs), statistics.fmean(ys)
    width = sum((a - x) ** 2 for a in xs)
    return sum((a - x) * (b - y) for a, b in points) / width if width else 0.0
