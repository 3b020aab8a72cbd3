"""Monitoring: features that are missing, out of range or stuck more often than the reference explains.

Rules of this room: pure; exact tails of counts, with a tolerated rise; never "any unseen value alarms".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from .drift_settings import DriftSettings
from .layout import Block, Counts, Layout
from .tails import beta_binomial_sf
from .verdict import QualityFault


def quality_faults(layout: Layout, block: Block, counts: Counts, settings: DriftSettings) -> tuple[QualityFault, ...]:
    """Missing, out-of-range and stuck features of one block, from its flat counts."""
    alpha = settings.quality_alpha(block.size, 3 * max(len(layout.kept), 1))
    faults: list[QualityFault] = []
    # Plain integers: a few cells at a time are quicker without numpy.
    plain: list[int] = counts.tolist()
    for s, reference in enumerate(layout.quality_reference):
        held = plain[layout.raw[s]]
        rows = sum(held)
        if rows < settings.min_rows or sum(reference) < settings.min_rows:
            continue
        for kind, seen, known, p in _quality_tests(held, reference, settings.quality_floor):
            if p < alpha:
                faults.append(
                    QualityFault(
                        name=layout.names[s],
                        kind=kind,
                        rate=seen,
                        reference_rate=known,
                        p_value=p,
                        level_windows=block.size,
                        first_window=block.start,
                        rows=rows,
                    )
                )
    return tuple(faults)


def _quality_tests(
    current: Sequence[int], reference: Sequence[int], floor: float
) -> list[tuple[Literal["missing", "range", "stuck"], float, float, float]]:
    """(kind, rate, reference rate, p) of each check that could fail, by exact beta-binomial tails.

    Missing after r of N reference rows: X ~ BetaBinomial(n; r + ½ + δN, N − r + ½), δ the tolerated rise. Out of
    range: low and high are the reference's own extremes, and the share of new rows beyond both is Beta(2, N − 1).
    Stuck: all present values in one cell, which held r of the reference's values.
    """
    n, big = sum(current), sum(reference)
    tolerated = floor * big
    found: list[tuple[Literal["missing", "range", "stuck"], float, float, float]] = []
    missing, known = current[-1], reference[-1]
    if missing / n > known / big + floor:
        p = beta_binomial_sf(missing - 1, n, known + 0.5 + tolerated, max(big - known + 0.5, 1.0))
        found.append(("missing", missing / n, known / big, p))
    beyond, was = current[0] + current[-2], reference[0] + reference[-2]
    if beyond / n > was / big + floor:
        p = beta_binomial_sf(beyond - 1, n, was + 2.0 + tolerated, max(big - was - 1.0, 1.0))
        found.append(("range", beyond / n, was / big, p))
    present, present_reference = n - missing, big - known
    fullest = max(current[:-1])
    held = reference[current.index(fullest)]
    if fullest == present >= 2 and held < present_reference:
        p = beta_binomial_sf(present - 1, present, held + 0.5, max(present_reference - held + 0.5, 1.0))
        found.append(("stuck", 1.0, held / present_reference, p))
    return found
