"""Monitoring: a device's windows as rows of the database, and back.

Rules:
* what is searched has a column; all else of a window is one MessagePack of parts of the contract's own `WindowCounts`,
  packed as they came, so that merging late labels into it is the contract's addition;
* a part that is absent was not counted: by an older agent, or since the profile has none;
* what a device says of its windows is believed only as far as the counts fit together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from lightship.storage.models import PendingLabels, WindowRow
from lightship_agent.contract.codes import DataError
from lightship_agent.contract.messages import (
    Counts,
    Labels,
    PackedCounts,
    PackedMoments,
    Together,
    Window,
    numbers,
    packed,
)
from lightship_agent.contract.moments import Products, Sums
from lightship_agent.contract.profile import WindowCounts
from lightship_agent.contract.quality import Quality
from lightship_agent.contract.wire import decode, encode

_NOTHING: Final = WindowCounts(rows=0, counts=())


class _More(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Of a window's counts, those without a column, as they came; empty parts were not counted."""

    distances: PackedCounts = ()
    values: PackedCounts = ()
    moments: PackedMoments | None = None
    residuals: Counts = ()
    residual_sums: Sums = ()
    quality: Quality = ()


class StoredProducts(msgspec.Struct, frozen=True, kw_only=True):
    """Products over the windows `first` to that of the row, both included."""

    first: int
    products: Products


class _Residuals(msgspec.Struct, frozen=True, kw_only=True):
    """Of a window's `WindowCounts`, what labels have told of residuals."""

    residuals: Counts = ()
    residual_sums: Sums = ()


def window_row(device: str, window: Window, pending: PendingLabels | None) -> WindowRow:
    """A new row, with the labels that came before it."""
    more = _rest(window.content()) + _more(pending)
    return WindowRow(
        device=device,
        digest=window.digest,
        w=window.w,
        model=window.model,
        version=window.version,
        opened_at=window.opened if window.q else 0,  # a clock that knows nothing says nothing of hours
        closed_at=window.t,
        rows=window.rows,
        invalid=window.invalid,
        counts=encode(window.counts),
        predictions=list(numbers(window.predictions)),
        scores=encode(window.scores),
        labelled=pending.labelled if pending else 0,
        errors=pending.errors if pending else 0,
        more=_packed(more),
    )


def add_labels(row: WindowRow | PendingLabels, labels: Labels) -> None:
    """Add late labels to a window, or to what waits for it; residuals of another layout than before are left out."""
    row.labelled += labels.labelled
    row.errors += min(labels.errors, labels.labelled)
    late = WindowCounts(rows=0, counts=(), residuals=labels.residuals, residual_sums=labels.residual_sums)
    try:
        row.more = _packed(_more(row) + late)
    except DataError:
        return


def add_products(row: WindowRow, together: Together) -> None:
    """Keep the products of a window and of those before it; the first ones stand."""
    if not row.together:
        row.together = encode(StoredProducts(first=together.first, products=together.products))


def content(row: WindowRow) -> WindowCounts:
    """All counts of a stored window but its products."""
    return msgspec.structs.replace(
        _more(row),
        rows=row.rows,
        counts=numbers(_decoded(row.counts)),
        predictions=tuple(row.predictions),
        scores=numbers(_decoded(row.scores)),
        labelled=row.labelled,
        errors=row.errors,
        invalid=row.invalid,
    )


def products(row: WindowRow) -> StoredProducts | None:
    """The products that were told with this window, and since which window they count."""
    return decode(row.together, StoredProducts) if row.together else None


def late_residuals(more: bytes) -> tuple[Counts, Sums]:
    """Of a stored window's `more`, the cells of its residuals and their sums; nothing else of it is read."""
    found = decode(more, _Residuals) if more else _Residuals()
    return found.residuals, found.residual_sums


def _decoded(part: bytes) -> bytes | Sequence[int]:
    counts: bytes | Sequence[int] = decode(part, PackedCounts)  # type: ignore[arg-type]
    return counts


def _rest(counts: WindowCounts) -> WindowCounts:
    """Of a window's counts, those without a column."""
    return msgspec.structs.replace(counts, rows=0, counts=(), predictions=(), scores=(), invalid=0)


def _more(row: WindowRow | PendingLabels | None) -> WindowCounts:
    if row is None or not row.more:
        return _NOTHING
    more = decode(row.more, _More)
    return msgspec.structs.replace(
        _NOTHING,
        distances=numbers(more.distances),
        values=numbers(more.values),
        moments=None if more.moments is None else more.moments.moments(),
        residuals=more.residuals,
        residual_sums=more.residual_sums,
        quality=more.quality,
    )


def _packed(more: WindowCounts) -> bytes:
    kept = _More(
        distances=packed(more.distances),
        values=packed(more.values),
        moments=PackedMoments.of(more.moments),
        residuals=tuple(more.residuals),
        residual_sums=tuple(more.residual_sums),
        quality=more.quality,
    )
    return b"" if kept == _More() else encode(kept)
