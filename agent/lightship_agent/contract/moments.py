"""Contract: how features move together and in time, as whole numbers that merge by addition.

Rules:
* a value becomes a z-score once, by constants of the profile: clipped, scaled, rounded to 1/16 of a reference
  standard deviation, at most ±127 steps; so one wild value counts for no more than 8 standard deviations;
* what is missing, constant or a category counts 0 steps;
* every sum of products of steps is a whole number, and exact: merge is associative, commutative, bit-exact;
* training and device use this same code: the rows of one can't be measured otherwise than those of the other.

The steps of `BLOCK` rows have products that add up to less than 2²⁴, so float32 arithmetic is exact in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from .codes import DataError
from .vectors import add, total

STEPS: Final = 16  # per reference standard deviation
LIMIT: Final = 127  # steps
BLOCK: Final = 1_024  # rows: BLOCK · LIMIT² < 2²⁴
MAX_JOINT: Final = 128  # wider models have no products and no distance: they grow with the square of the width

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Whole = Annotated[int, msgspec.Meta(ge=-(2**54), le=2**54)]
if TYPE_CHECKING:
    Sums = Sequence[int]
else:
    # In memory also a `Vector`; what is decoded are numbers, as many at most as MAX_JOINT features have products.
    Sums = Annotated[tuple[Whole, ...], msgspec.Meta(max_length=8_256)]


class Moments(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """Sums over rows, per feature in schema order, in steps: Σz, Σz², and Σ z[t-1]·z[t] over `pairs` neighbours.

    The neighbours are rows in the order they were predicted. The correlation of a feature with its own past is
    lags / squares, nearly; with it the control plane knows how many independent rows these rows are worth.
    """

    rows: int
    pairs: int
    sums: Sums
    squares: Sums
    lags: Sums

    def __add__(self, other: Moments) -> Moments:
        """Merge: addition.

        Raises:
            DataError: data.profile-mismatch when the widths differ.
        """
        return Moments(
            rows=self.rows + other.rows,
            pairs=self.pairs + other.pairs,
            sums=add(self.sums, other.sums),
            squares=add(self.squares, other.squares),
            lags=add(self.lags, other.lags),
        )


def merge_moments(some: Sequence[Moments]) -> Moments:
    """The sum of one or more, at once.

    Raises:
        DataError: data.profile-mismatch when the widths differ.
    """
    return Moments(
        rows=sum(m.rows for m in some),
        pairs=sum(m.pairs for m in some),
        sums=total([m.sums for m in some]),
        squares=total([m.squares for m in some]),
        lags=total([m.lags for m in some]),
    )


class Products(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Σ z[i]·z[j] over rows, in steps², for i ≤ j: row by row of the upper triangle, with its diagonal."""

    rows: int
    sums: Sums

    def __add__(self, other: Products) -> Products:
        """Merge: addition.

        Raises:
            DataError: data.profile-mismatch when the widths differ.
        """
        return Products(rows=self.rows + other.rows, sums=add(self.sums, other.sums))

    def matrix(self, width: int) -> Ints:
        """The whole symmetric matrix, int64 `[width, width]`.

        Raises:
            DataError: data.profile-mismatch.
        """
        return unpack_triangle(np.asarray(self.sums, dtype=np.int64), width)


class Scales(msgspec.Struct, frozen=True, kw_only=True):
    """What turns a value into steps, per feature in schema order: clipped to [low, high], less center, by scale.

    A scale of 0 marks a feature that is not measured: constant in training, or a category.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    center: tuple[float, ...]
    scale: tuple[float, ...]

    def __post_init__(self) -> None:
        """All four speak of the same features.

        Raises:
            DataError: data.profile-mismatch.
        """
        numbers = np.array([*self.low, *self.high, *self.center, *self.scale])
        same = len(self.low) == len(self.high) == len(self.center) == len(self.scale)
        if not same or not np.isfinite(numbers).all() or min(self.scale, default=0.0) < 0:
            raise DataError("data.profile-mismatch", "Scales: four equally long lists of finite numbers are expected.")

    @property
    def width(self) -> int:
        """The number of features."""
        return len(self.scale)


class Standardiser:
    """Turns float32 rows into steps: whole numbers in float32, which BLAS takes."""

    def __init__(self, scales: Scales) -> None:
        """Lay the constants out as float32 vectors."""
        self.width = scales.width
        self._low = np.array(scales.low, dtype=np.float32)
        self._high = np.array(scales.high, dtype=np.float32)
        self._center = np.array(scales.center, dtype=np.float32)
        scale = np.array(scales.scale, dtype=np.float32)
        self._factor = np.where(scale > 0, np.float32(STEPS) / np.where(scale > 0, scale, 1), 0).astype(np.float32)

    def steps(self, rows: Floats) -> Floats:
        """Steps of `rows` (float32 `[n, width]`), float32 `[n, width]`, each a whole number within ±`LIMIT`."""
        z = np.clip(rows, self._low, self._high)
        z -= self._center
        z *= self._factor
        np.rint(z, out=z)
        np.clip(z, -LIMIT, LIMIT, out=z)
        missing = np.isnan(z)
        if missing.any():
            z[missing] = 0
        return z


class Distance:
    """The squared Mahalanobis distance of steps from the center, by the profile's inverse covariance."""

    def __init__(self, inverse: bytes, width: int) -> None:
        """Unpack the inverse covariance.

        Args:
            inverse: of z (not of steps), float32 little-endian, as `pack_triangle` packs it.
            width: features.

        Raises:
            DataError: data.profile-mismatch.
        """
        packed = np.frombuffer(inverse, dtype="<f4") if len(inverse) % 4 == 0 else np.empty(0, np.float32)
        self._inverse = unpack_triangle(packed.astype(np.float64), width) / STEPS**2

    def of(self, steps: Floats) -> Floats:
        """D² of each row of `steps`, float32 `[n, 1]`.

        Computed in float64 and then rounded, so that a row has the same distance in a block of any size.
        """
        exact = steps.astype(np.float64)
        distances: Floats = np.einsum("ij,ij->i", exact @ self._inverse, exact)[:, None].astype(np.float32)
        return distances


def products_of(steps: Floats) -> Ints:
    """Σ z[i]·z[j] of `steps` (float32 `[n, width]`), the upper triangle, int64 `[width·(width+1)/2]`; exact."""
    upper = _upper(steps.shape[1])
    total = np.zeros(len(upper), dtype=np.int64)
    for at in range(0, len(steps), BLOCK):
        part = steps[at : at + BLOCK]
        total += (part.T @ part).ravel()[upper].astype(np.int64)
    return total


@lru_cache(maxsize=8)
def _upper(width: int) -> npt.NDArray[np.intp]:
    """Where the upper triangle is in a flat square matrix."""
    rows, columns = np.triu_indices(width)
    return rows * width + columns


def moments_of(steps: Floats, before: Floats | None = None) -> tuple[int, Ints]:
    """Pairs, and Σz, Σz² and Σ z[t-1]·z[t] of `steps`, int64 `[3, width]`; exact.

    Args:
        steps: float32 `[n, width]`.
        before: the steps of the row before the first, float32 `[width]`; None where there was none.
    """
    total = np.zeros((3, steps.shape[1]), dtype=np.int64)
    pairs = max(0, len(steps) - (before is None))
    for at in range(0, len(steps), BLOCK):
        part = steps[at : at + BLOCK]
        total[0] += part.sum(axis=0).astype(np.int64)
        total[1] += np.einsum("ij,ij->j", part, part).astype(np.int64)
        total[2] += np.einsum("ij,ij->j", part[:-1], part[1:]).astype(np.int64)
        if before is not None:
            total[2] += (before * part[0]).astype(np.int64)
        before = part[-1]
    return pairs, total


def pack_triangle(matrix: npt.NDArray[np.float64]) -> bytes:
    """The upper triangle of a symmetric matrix as float32, little-endian."""
    return matrix[np.triu_indices(len(matrix))].astype("<f4").tobytes()


def unpack_triangle(packed: npt.NDArray[Any], width: int) -> npt.NDArray[Any]:
    """The symmetric matrix whose upper triangle is `packed`, row by row.

    Raises:
        DataError: data.profile-mismatch when it has another size.
    """
    if packed.shape != (width * (width + 1) // 2,):
        message = f"Expected the {width * (width + 1) // 2} products of {width} features, found {packed.shape[0]}."
        raise DataError("data.profile-mismatch", message)
    matrix = np.zeros((width, width), dtype=packed.dtype)
    matrix[np.triu_indices(width)] = packed
    lower = np.tril_indices(width, -1)
    matrix[lower] = matrix.T[lower]
    return matrix
