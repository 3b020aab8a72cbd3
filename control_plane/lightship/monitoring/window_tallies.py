"""Monitoring: what a judged window adds to the control plane's counters.

Rules: of a model's features the most important ones are told apart, the others are counted together: every feature is a
series for each cell.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Final

from sqlalchemy.orm import Session

from lightship.storage.models import WindowRow

from .stored import content
from .tallies import count

#: Upper edges of the cells of debiased PSI.
PSI_EDGES: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
MOST_FEATURES: Final = 40
OTHERS: Final = "(other)"


def tally_window(session: Session, row: WindowRow, group: str, psi: Mapping[str, float]) -> None:
    """Count a window that was judged.

    Args:
        session: the transaction that judges it.
        row: the window, with its level.
        group: of its device.
        psi: debiased, of each feature that is told apart, and of the others together.
    """
    of = {"model": row.model, "version": row.version}
    count(session, 1, "lightship_judged_windows_total", group=group, **of, level=row.level)
    count(session, row.rows, "lightship_watched_rows_total", **of)
    count(session, row.invalid, "lightship_refused_rows_total", **of)
    for item in content(row).quality:
        count(session, item.count, "lightship_data_quality_total", **of, kind=item.kind)
    for feature, value in psi.items():
        at = bisect_left(PSI_EDGES, value)
        edge = str(PSI_EDGES[at]) if at < len(PSI_EDGES) else "+Inf"
        count(session, 1, "lightship_drift_psi_bucket", **of, feature=feature, le=edge)
        count(session, max(value, 0.0), "lightship_drift_psi_sum", **of, feature=feature)


def told_apart(psi: Mapping[str, float], importances: Mapping[str, float]) -> dict[str, float]:
    """The most important features by name, and of the others the one that has moved most."""
    ranked = sorted(psi, key=lambda name: (-importances.get(name, 0.0), name))
    found = {name: psi[name] for name in ranked[:MOST_FEATURES]}
    if len(ranked) > MOST_FEATURES:
        found[OTHERS] = max(psi[name] for name in ranked[MOST_FEATURES:])
    return found
