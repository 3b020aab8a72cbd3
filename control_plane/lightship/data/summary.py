"""Data: a dataset at a glance, for `lightship data show`.

Rules: pure; numbers first, a text table as one rendering of them.
"""

from __future__ import annotations

import msgspec
import numpy as np

from .dataset import Dataset


class FeatureSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One column: ranges are None where it has no value at all."""

    name: str
    title: str
    unit: str
    low: float | None
    high: float | None
    mean: float | None
    missing: int
    distinct: int
    categories: tuple[str, ...] = ()


class DatasetSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A dataset: its columns, and rows per class (classification) or the target's range (regression)."""

    name: str
    digest: str
    rows: int
    task: str
    target: str
    features: tuple[FeatureSummary, ...]
    classes: dict[str, int]
    target_low: float | None
    target_high: float | None


def summarise(dataset: Dataset) -> DatasetSummary:
    """Ranges, means, gaps and distinct values per feature, and the target's make-up."""
    classification = dataset.task == "classification"
    counts = np.bincount(dataset.y, minlength=len(dataset.labels)).tolist() if classification else []
    return DatasetSummary(
        name=dataset.name,
        digest=dataset.digest,
        rows=dataset.rows,
        task=dataset.task,
        target=dataset.target,
        features=tuple(_feature(dataset, j) for j in range(dataset.schema.width)),
        classes=dict(zip(dataset.labels, counts, strict=True)),
        target_low=None if classification else float(dataset.y.min()),
        target_high=None if classification else float(dataset.y.max()),
    )


def _feature(dataset: Dataset, j: int) -> FeatureSummary:
    column = dataset.x[:, j]
    present = column[~np.isnan(column)]
    some = len(present) > 0
    return FeatureSummary(
        name=dataset.schema.names[j],
        title=dataset.titles[j],
        unit=dataset.schema.features[j].unit,
        low=float(present.min()) if some else None,
        high=float(present.max()) if some else None,
        mean=float(present.mean(dtype=np.float64)) if some else None,
        missing=len(column) - len(present),
        distinct=len(np.unique(present)),
        categories=dataset.schema.features[j].levels,
    )


def summary_lines(summary: DatasetSummary) -> list[str]:
    """The summary as lines of an aligned text table."""
    head = ["feature", "unit", "min", "max", "mean", "missing", "distinct"]
    body = [
        [f.name, f.unit, _short(f.low), _short(f.high), _short(f.mean), str(f.missing), str(f.distinct)]
        for f in summary.features
    ]
    widths = [max(len(row[k]) for row in [head, *body]) for k in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *body]]
    if summary.classes:
        target = ", ".join(f"{label}: {n}" for label, n in summary.classes.items())
    else:
        target = f"{_short(summary.target_low)} to {_short(summary.target_high)}"
    return [
        f"{summary.name}  {summary.rows} rows  {summary.task} of {summary.target}  sha256:{summary.digest}",
        *lines,
        f"{summary.target}: {target}",
    ]


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
