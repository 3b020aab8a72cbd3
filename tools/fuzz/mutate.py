"""Fuzz: how a valid input becomes another, by bytes or by fields.

Rules: everything comes from one seeded generator, so that an input is known by its seed and its number.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any, Final

MAX_GROWTH: Final = 65_536  # bytes
_NUMBERS: Final = (0, 1, -1, 2, 127, 128, 255, 256, 65_535, 2**31 - 1, 2**31, 2**53, 2**63, 2**64 - 1, 2**64, 10**40)
_STRANGE: Final[tuple[Any, ...]] = (
    None, True, False, "", "a" * 300, "\x00", "../../etc/passwd", "é\u202e", "\ud800", 1e308, -0.0, 0.5, [], {}, [[]],
    {"": None}, "0" * 64, "9" * 5_000,
)  # fmt: skip
_PIECES: Final = (
    b"", b"\x00", b"\xff", b"\x80", b"\n", b"{", b"}", b"[", b'"', b"\\u0000", b"\\ud800", b"NaN", b"1e999", b"-",
    b"null", b"\xff\xff\xff\xff", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x7f\xff\xff\xff", b"\xc0\x80", b"../",
    b"%00", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"(\xb5/\xfd",
)  # fmt: skip


class Mutator:
    """Makes inputs out of seeds."""

    def __init__(self, seed: int, seeds: Sequence[bytes]) -> None:
        """Begin with that seed of the generator."""
        self._random = random.Random(seed)
        self._seeds = list(seeds)
        self._parsed = [_parsed(s) for s in seeds]

    def next(self) -> bytes:
        """Another input."""
        choose = self._random
        at = choose.randrange(len(self._seeds))
        document = self._parsed[at]
        if document is not None and choose.random() < 0.6:
            return self._by_field(document)
        data = self._seeds[at]
        if choose.random() < 0.03:
            return choose.randbytes(choose.randrange(0, 300))
        for _ in range(choose.choice((1, 1, 1, 2, 3, 8))):
            data = self._by_byte(data)
        return data

    def _by_byte(self, data: bytes) -> bytes:
        choose = self._random
        if not data:
            return choose.choice(_PIECES)
        at = choose.randrange(len(data))
        match choose.randrange(9):
            case 0:
                return data[:at] + bytes([data[at] ^ (1 << choose.randrange(8))]) + data[at + 1 :]
            case 1:
                return data[:at] + choose.randbytes(1) + data[at + 1 :]
            case 2:
                return data[:at] + choose.choice(_PIECES) + data[at:]
            case 3:
                return data[:at]
            case 4:
                return data[:at] + data[at + choose.randrange(1, 64) :]
            case 5:
                end = min(len(data), at + choose.randrange(1, 600))
                return (data[:end] + data[at:end] * choose.choice((1, 2, 40)) + data[end:])[: len(data) + MAX_GROWTH]
            case 6:
                other = choose.choice(self._seeds)
                return data[:at] + other[choose.randrange(len(other) + 1) :]
            case 7:
                number = choose.choice(_NUMBERS) & 0xFFFFFFFF
                return data[:at] + number.to_bytes(4, choose.choice(("little", "big"))) + data[at + 4 :]
            case _:
                piece = choose.choice(_PIECES)
                return data[:at] + piece + data[at + len(piece) :]

    def _by_field(self, document: Any) -> bytes:
        changed = document
        for _ in range(self._random.choice((1, 1, 1, 2, 4))):
            changed = self._changed(changed, 12)
        if self._random.random() < 0.01:
            depth = self._random.choice((50, 900, 20_000))
            return b"[" * depth + b"]" * depth
        return json.dumps(changed).encode("utf-8", "surrogatepass")

    def _changed(self, value: Any, depth: int) -> Any:
        choose = self._random
        if not depth or not isinstance(value, dict | list) or not value or choose.random() < 0.1:
            return self._other(value)
        copy = dict(value) if isinstance(value, dict) else list(value)
        key = choose.choice(list(copy)) if isinstance(copy, dict) else choose.randrange(len(copy))
        match choose.randrange(8):
            case 0:
                del copy[key]
            case 1 if isinstance(copy, dict):
                copy[choose.choice(("", "x", "__class__", str(key) + " ", str(key).upper()))] = copy[key]
            case 1 | 2 if isinstance(copy, list):
                copy *= choose.choice((2, 3, 200 if len(copy) < 20 else 2))
            case _:
                copy[key] = self._changed(copy[key], depth - 1)
        return copy

    def _other(self, value: Any) -> Any:
        choose = self._random
        if isinstance(value, bool | None):
            return choose.choice(_STRANGE)
        if isinstance(value, int | float):
            return choose.choice((*_NUMBERS, value + 1, -value, float(value), str(value), choose.choice(_STRANGE)))
        if isinstance(value, str) and value and choose.random() < 0.6:
            at = choose.randrange(len(value))
            return choose.choice(
                (value[:at], value + value, value[:at] + chr(choose.randrange(0x500)) + value[at + 1 :])
            )
        return choose.choice((*_STRANGE, *_NUMBERS))


def _parsed(data: bytes) -> Any:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict | list) else None
