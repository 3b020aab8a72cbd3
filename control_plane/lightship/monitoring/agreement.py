"""Monitoring: how far a challenger agrees with a champion, added up and put into numbers.

Rules:
* counts add up, whichever device and report they come from; each report is added once: ingest knows it by its number;
* a report of an experiment that there is not, or that is about another bundle, counts for nothing;
* shares come with an interval: a challenger that agreed in 20 of 20 rows has not shown that it always will.

Source: Wilson's score interval.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from lightship.storage.models import AgreementRow, ExperimentRow
from lightship_agent.contract.experiment import DIFFERENCE_EDGES, LATENCY_EDGES, quantile
from lightship_agent.contract.messages import Agreement

from .canary import wilson

log = logging.getLogger(__name__)

#: Two-sided 95 %.
Z95: Final = 1.959963984540054
_SHOWN: Final = 5  # of the classes that are taken for each other


def store_agreement(session: Session, device: str, said: Agreement) -> None:
    """Add a device's report to what is known."""
    experiment = session.get(ExperimentRow, said.experiment)
    if experiment is None or experiment.digest != said.digest:
        log.warning("%s reports an experiment %s that there is not", device, said.experiment)
        return
    row = session.get(AgreementRow, (said.experiment, device, said.champion))
    if row is None:
        row = AgreementRow(
            experiment=said.experiment, device=device, champion=said.champion, began_at=said.opened, rows=0, same=0,
            confusion=[], differences=[], difference_sum=0.0, difference_max=0.0, latency=[], failures=0, dropped=0,
        )  # fmt: skip
        session.add(row)
    row.updated_at = said.t
    row.rows, row.same = row.rows + said.rows, row.same + said.same
    row.failures, row.dropped = row.failures + said.failures, row.dropped + said.dropped
    row.confusion = _sum(row.confusion, said.confusion)
    row.differences = _sum(row.differences, said.differences)
    row.latency = _sum(row.latency, said.latency)
    row.difference_sum += said.difference_sum
    row.difference_max = max(row.difference_max, said.difference_max)


def agreement_of(session: Session, experiment: str, labels: Sequence[str]) -> dict[str, Any] | None:
    """What the devices of an experiment have reported, as JSON for people's programs; None for nothing yet.

    Args:
        session: to read in.
        experiment: its id.
        labels: the words of the classes.
    """
    rows = list(session.scalars(select(AgreementRow).where(AgreementRow.experiment == experiment)))
    return summary(rows, labels) if rows else None


def summary(rows: Iterable[AgreementRow], labels: Sequence[str]) -> dict[str, Any]:
    """The sum of rows, and what it says."""
    found = list(rows)
    compared, same = sum(r.rows for r in found), sum(r.same for r in found)
    confusion, differences, latency = (
        _total([getattr(r, name) for r in found]) for name in ("confusion", "differences", "latency")
    )
    counted = sum(differences)
    return {
        "devices": len({r.device for r in found}),
        "rows": compared,
        "same": same,
        "agreement": same / compared if compared else None,
        "interval": list(wilson(same, compared, Z95)) if compared else None,
        "confusion": _disagreements(confusion, labels),
        "differences": dict(zip([*map(str, DIFFERENCE_EDGES), "more"], differences, strict=False)),
        "difference_mean": sum(r.difference_sum for r in found) / counted if counted else None,
        "difference_max": max(r.difference_max for r in found) if counted else None,
        "latency_ms": {"p50": quantile(latency, LATENCY_EDGES, 0.5), "p95": quantile(latency, LATENCY_EDGES, 0.95)}
        if sum(latency)
        else None,
        "failures": sum(r.failures for r in found),
        "dropped": sum(r.dropped for r in found),
        "updated_at": max(r.updated_at for r in found),
    }


def _disagreements(confusion: Sequence[int], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Which class was taken for which, the most frequent first."""
    classes = len(labels)
    if not classes or len(confusion) != classes * classes:
        return []
    apart: list[dict[str, Any]] = [
        {"champion": labels[i], "challenger": labels[j], "rows": confusion[i * classes + j]}
        for i in range(classes)
        for j in range(classes)
        if i != j and confusion[i * classes + j]
    ]
    return sorted(apart, key=lambda x: (-x["rows"], x["champion"], x["challenger"]))[:_SHOWN]


def _sum(a: Sequence[int], b: Sequence[int]) -> list[int]:
    return _total([a, b])


def _total(parts: Sequence[Sequence[int]]) -> list[int]:
    """Counts of the same length added up; those of another length, which no device of ours sends, are left out."""
    length = max((len(p) for p in parts), default=0)
    fit = [p for p in parts if len(p) == length]
    return [sum(column) for column in zip(*fit, strict=True)]
