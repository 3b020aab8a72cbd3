"""Contract: a wide input (image, spectrum, embedding) seen through a few fixed numbers.

Rules:
* the numbers are the length of the vector and at most 32 coordinates along fixed directions, found at training time
  and shipped in the profile; they are binned, correlated and tested as features are;
* a coordinate says that something changed, not what: its direction mixes all of the input.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from .codes import DataError

MAX_DIRECTIONS: Final = 32
NORM: Final = "norm"


class Projection(msgspec.Struct, frozen=True, kw_only=True):
    """Of `input`; `directions` is float16 little-endian `[count, width]`, `center` float32 little-endian `[width]`."""

    input: str
    width: int
    count: int
    center: bytes
    directions: bytes

    def __post_init__(self) -> None:
        """Sizes agree, and all numbers are finite.

        Raises:
            DataError: data.profile-mismatch.
        """
        sizes = len(self.center) == 4 * self.width and len(self.directions) == 2 * self.width * self.count
        if not (self.width >= 1 and 1 <= self.count <= MAX_DIRECTIONS and sizes):
            raise DataError("data.profile-mismatch", "The profile's projection is not of the size it says.")
        numbers = np.frombuffer(self.center, dtype="<f4"), np.frombuffer(self.directions, dtype="<f2")
        if not all(np.isfinite(found).all() for found in numbers):
            raise DataError("data.profile-mismatch", "The profile's projection has numbers that are not finite.")


def projected_names(count: int) -> tuple[str, ...]:
    """What the numbers of `count` directions are called: norm, pc1, pc2 …"""
    return (NORM, *(f"pc{i + 1}" for i in range(count)))


class Projector:
    """Applies a projection to tensors."""

    def __init__(self, projection: Projection) -> None:
        """Unpack it."""
        self.width = projection.width
        self._center = np.frombuffer(projection.center, dtype="<f4")
        directions = np.frombuffer(projection.directions, dtype="<f2").reshape(projection.count, projection.width)
        self._directions = directions.astype(np.float32).T

    def of(self, rows: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """The numbers of `rows` (any real type, `[n, …]` of `width` values a row), float32 `[n, 1 + count]`."""
        flat = rows.reshape(len(rows), self.width).astype(np.float32, copy=False)
        norm = np.sqrt(np.einsum("ij,ij->i", flat, flat))[:, None]
        return np.concatenate([norm, (flat - self._center) @ self._directions], axis=1, dtype=np.float32)
