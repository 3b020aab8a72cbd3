"""Contract: vectors of whole numbers: as bytes on the wire, as an array where they are counted with.

Rules:
* packed, a vector is one byte that says how many bytes a number takes, whether any is negative, and whether eight bytes
  follow that are to be added to all of them; then come the lowest bytes of all numbers, the next bytes of all numbers,
  and so on. The bins of a feature hold nearly the same: less what most hold, their high bytes are all alike, and beside
  each other they take no room once they are compressed;
* nothing else is needed to read it: no profile, no float; exact, of fixed width, and as long as it says;
* a vector never changes; many are added up at once, from their bytes.

A number takes at most seven bytes, so that a sum of 128 fits 64 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, overload

import numpy as np
import numpy.typing as npt

from .codes import DataError, WireError

Ints = npt.NDArray[np.int64]

#: Bytes that a number may take.
WIDEST: Final = 7
#: Added to the width where a number is negative.
SIGNED: Final = 0x80
#: Added to the width where a base follows that the numbers are counted from.
BASED: Final = 0x40
_BASE: Final = 8  # bytes
#: Vectors as long as this have one, if that pays.
_WORTH: Final = 64
_FLAGS: Final = SIGNED | BASED
#: Numbers in a vector, at most.
MOST: Final = 120_000
#: Bytes of a packed vector, at most.
LONGEST: Final = 1 + _BASE + WIDEST * MOST


class Vector(Sequence[int]):
    """Whole numbers; equal to any sequence of the same ones."""

    __slots__ = ("_array", "_packed")

    def __init__(self, numbers: bytes | Sequence[int] | Ints) -> None:
        """Of these numbers, which nobody changes any more; of bytes, what they were packed from.

        Bytes are as `check` lets pass. They are looked into when somebody wants to know.
        """
        if isinstance(numbers, bytes):
            self._packed: bytes | None = numbers
            self._array: Ints | None = None
        else:
            self._packed = None
            self._array = np.asarray(numbers, dtype=np.int64)

    @property
    def array(self) -> Ints:
        """The numbers, int64; not to be written to."""
        if self._array is None:
            assert self._packed is not None
            self._array = _unpacked(self._packed)
        return self._array

    @property
    def packed(self) -> bytes:
        """The numbers as bytes.

        Raises:
            DataError: data.profile-mismatch for a number that takes more than seven bytes.
        """
        if self._packed is None:
            assert self._array is not None
            self._packed = _packed(self._array)
        return self._packed

    @property
    def at_hand(self) -> bytes | None:
        """The packed numbers, where they need not be packed first."""
        return self._packed

    def __len__(self) -> int:
        if self._array is not None:
            return len(self._array)
        assert self._packed is not None
        first = self._packed[0]
        return (len(self._packed) - _head(first)) // (first & ~_FLAGS)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Vector: ...
    def __getitem__(self, index: int | slice) -> int | Vector:
        found = self.array[index]
        return Vector(found) if isinstance(index, slice) else int(found)

    def __iter__(self) -> Iterator[int]:
        return iter(self.array.tolist())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self.array, dtype=dtype, copy=copy)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Vector):
            return np.array_equal(self.array, other.array)
        return tuple(self) == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"Vector({self.array.tolist()})"


def check(packed: bytes, least: int, most: int) -> None:
    """Whether bytes of somebody else are a vector of numbers within bounds.

    Args:
        packed: the bytes.
        least: the lowest number that may be there.
        most: the highest one.

    Raises:
        WireError: wire.malformed.
    """
    first = packed[0] if packed else 0
    width, length = first & ~_FLAGS, len(packed) - _head(first)
    if not 1 <= width <= WIDEST or length < 0 or length % width or length // width > MOST:
        raise WireError("wire.malformed", f"A vector of {len(packed)} bytes begins with {packed[:1].hex() or 'none'}.")
    bits = 8 * width - bool(first & SIGNED)
    lowest = -(1 << bits) if first & SIGNED else 0
    if length and (first & BASED or lowest < least or (1 << bits) - 1 > most):
        base = _base(packed)
        numbers = _unpacked(packed) if abs(base) <= most else np.array([base])
        if not (least <= int(numbers.min()) and int(numbers.max()) <= most):
            raise WireError("wire.malformed", f"Expected numbers from {least} to {most}.")


def _head(first: int) -> int:
    """Bytes before the numbers."""
    return 1 + _BASE if first & BASED else 1


def _base(packed: bytes) -> int:
    return int.from_bytes(packed[1 : 1 + _BASE], "little", signed=True) if packed[0] & BASED else 0


def add(a: Sequence[int], b: Sequence[int]) -> Sequence[int]:
    """The sum, cell by cell.

    Raises:
        DataError: data.profile-mismatch when the lengths differ.
    """
    if len(a) != len(b):
        raise DataError("data.profile-mismatch", f"Can't merge {len(a)} counts with {len(b)}.")
    if isinstance(a, Vector) and isinstance(b, Vector):
        return Vector(a.array + b.array)
    return tuple(x + y for x, y in zip(a, b, strict=True))


def total(vectors: Sequence[Sequence[int]]) -> Sequence[int]:
    """The sum of one or more, cell by cell: what `add` makes of them one after the other, at once.

    Raises:
        DataError: data.profile-mismatch when the lengths differ.
    """
    alike: dict[tuple[int, int], list[bytes]] = {}
    others: list[Sequence[int]] = []
    for vector in vectors:
        packed = vector.at_hand if isinstance(vector, Vector) else None
        if packed:
            alike.setdefault((packed[0], len(packed)), []).append(packed)
        else:
            others.append(vector)
    whole, *rest = [*map(_sum, alike.values()), *others]
    for more in rest:
        whole = add(whole, more)
    return whole


def _sum(packed: list[bytes]) -> Sequence[int]:
    """The sum of vectors that begin with the same byte and are equally long."""
    first = packed[0][0]
    width, head = first & ~_FLAGS, _head(first)
    length = (len(packed[0]) - head) // width
    planes = np.frombuffer(b"".join(packed), dtype=np.uint8).reshape(len(packed), -1)[:, head:]
    # Bytes first, and then their places: no number is ever put together.
    sums = planes.sum(axis=0, dtype=np.int64).reshape(width, length)
    if first & SIGNED:
        negative = planes[:, (width - 1) * length :] >= SIGNED
        sums[width - 1] -= 256 * negative.sum(axis=0, dtype=np.int64)
    base = sum(map(_base, packed)) if first & BASED else 0
    if len(packed) < 1 << (62 - 8 * width) and abs(base) < 1 << 62:
        shifts = 8 * np.arange(width, dtype=np.int64)[:, None]
        return Vector((sums << shifts).sum(axis=0) + base)
    return tuple(base + sum(place << (8 * i) for i, place in enumerate(column)) for column in sums.T.tolist())


def _packed(numbers: Ints) -> bytes:
    first, base = _width(numbers), b""
    if 1 < first & ~SIGNED < WIDEST and len(numbers) >= _WORTH:
        # What most hold is then the middle of a byte.
        middle = int(np.median(numbers)) - 128
        numbers, base = numbers - middle, middle.to_bytes(_BASE, "little", signed=True)
        first = _width(numbers) | BASED
    octets = numbers.astype("<i8").view(np.uint8).reshape(-1, 8)
    return bytes([first]) + base + octets[:, : first & ~_FLAGS].T.tobytes()


def _width(numbers: Ints) -> int:
    """The first byte of these numbers."""
    low, high = (int(numbers.min()), int(numbers.max())) if len(numbers) else (0, 0)
    signed = low < 0
    bits = max(high.bit_length(), (~low).bit_length() if signed else 0) + signed
    width = max(1, -(-bits // 8))
    if width > WIDEST:
        raise DataError("data.profile-mismatch", f"Numbers from {low} to {high} take more than {WIDEST} bytes.")
    return width | (SIGNED if signed else 0)


def _unpacked(packed: bytes) -> Ints:
    first = packed[0]
    width = first & ~_FLAGS
    planes = np.frombuffer(packed, dtype=np.uint8, offset=_head(first)).reshape(width, -1)
    octets = np.zeros((planes.shape[1], 8), dtype=np.uint8)
    octets[:, :width] = planes.T
    if first & SIGNED:
        octets[:, width:] = np.where(planes[-1:] >= SIGNED, 0xFF, 0).T
    numbers: Ints = octets.view("<i8").ravel().astype(np.int64, copy=False)
    return numbers + _base(packed) if first & BASED else numbers
