"""Monitoring: features that go together otherwise than before, while each alone looks the same.

Rules of this room:
* pure; sums of products in, a verdict out;
* every pair's correlation is compared by Fisher's z, and the largest difference is judged as the largest of all pairs
  (Bonferroni). D² (a stream of the ladder) sees what changes a little everywhere; this sees what changes in one place;
* Fisher's variance is that of normal rows. The device clips to steps, which tames heavy tails; `inflation` is what the
  device's own healthy windows show beyond it;
* two features whose correlations with all others are each other's have been swapped, and are named.
"""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from .tails import chi2_sf

Floats = npt.NDArray[np.float64]

#: Swapping two columns must explain this share of the change before they are named.
_EXPLAINED: Final = 0.5


class JointShift(msgspec.Struct, frozen=True, kw_only=True):
    """How the correlations differ from the reference's."""

    pair: tuple[str, str]  # where the difference is largest
    before: float  # its correlation
    now: float
    z: float
    p_value: float  # of the largest of all pairs
    swapped: tuple[str, str] | None  # two columns whose exchange explains it


def judge_products(
    now: npt.ArrayLike,
    rows: int,
    reference: npt.ArrayLike,
    reference_rows: int,
    names: tuple[str, ...],
    inflation: float = 1.0,
) -> JointShift | None:
    """Compare second moments; None where there is nothing to compare.

    Args:
        now: Σ z·z' over `rows`, `[features, features]`.
        rows: how many rows.
        reference: the same over the reference's rows.
        reference_rows: how many.
        names: of the features.
        inflation: variance of the healthy differences over Fisher's, at least 1.
    """
    a, b = np.asarray(now, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    measured = np.flatnonzero((np.diag(a) > 0) & (np.diag(b) > 0))
    if len(measured) < 2 or min(rows, reference_rows) < 10:
        return None
    current, known = (_correlations(m[np.ix_(measured, measured)]) for m in (a, b))
    z = _differences(current, known, rows, reference_rows, inflation)
    upper = np.triu_indices(len(measured), 1)
    worst = int(np.argmax(np.abs(z[upper])))
    i, j = int(upper[0][worst]), int(upper[1][worst])
    p = min(1.0, float(chi2_sf(z[i, j] ** 2, 1)) * len(upper[0]))
    labels = [names[m] for m in measured]
    swapped = _swapped(current, known, z) if p < 0.01 else None
    return JointShift(
        pair=(labels[i], labels[j]),
        before=float(known[i, j]),
        now=float(current[i, j]),
        z=float(z[i, j]),
        p_value=p,
        swapped=(labels[swapped[0]], labels[swapped[1]]) if swapped else None,
    )


def inflation(healthy: list[tuple[npt.ArrayLike, int]], reference: npt.ArrayLike, reference_rows: int) -> float:
    """How much more healthy windows' correlations vary than Fisher says, over all pairs; at least 1."""
    squares: list[Floats] = []
    for products, rows in healthy:
        current, known = (
            _correlations(np.asarray(products, np.float64)),
            _correlations(np.asarray(reference, np.float64)),
        )
        z = _differences(current, known, rows, reference_rows, 1.0)
        squares.append(z[np.triu_indices(len(z), 1)] ** 2)
    return max(1.0, float(np.mean(squares))) if squares else 1.0


def _correlations(products: Floats) -> Floats:
    scale = np.sqrt(np.maximum(np.diag(products), 1e-9))
    return np.asarray(np.clip(products / np.outer(scale, scale), -0.9999, 0.9999))


def _differences(current: Floats, known: Floats, rows: int, reference_rows: int, inflation_: float) -> Floats:
    spread = np.sqrt(inflation_ * (1 / max(rows - 3, 1) + 1 / max(reference_rows - 3, 1)))
    return np.asarray((np.arctanh(current) - np.arctanh(known)) / spread)


def _swapped(current: Floats, known: Floats, z: Floats) -> tuple[int, int] | None:
    """The two columns whose exchange takes away most of the change, if it takes away enough."""
    size = len(z)
    unlike = ((current - known) ** 2).sum() / 2
    order = np.argsort(-(z**2).sum(axis=1))[: min(size, 12)]
    best, pair = unlike, None
    for n, i in enumerate(order):
        for j in order[n + 1 :]:
            turned = np.arange(size)
            turned[[i, j]] = j, i
            left = ((current[np.ix_(turned, turned)] - known) ** 2).sum() / 2
            if left < best:
                best, pair = left, (int(min(i, j)), int(max(i, j)))
    return pair if pair is not None and best < (1 - _EXPLAINED) * unlike else None
