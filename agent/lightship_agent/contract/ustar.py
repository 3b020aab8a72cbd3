"""Contract: the header of one regular file in a deterministic ustar archive.

Rules:
* a header is a function of name and length alone: no owner, no time, no mode of its own;
* what a header claims is believed only if rebuilding it from the claim gives the same bytes, so links, folders,
  devices, extensions and other dialects can't be said.

Source: POSIX.1-1988 ustar interchange format.
"""

from __future__ import annotations

from typing import Final

BLOCK: Final = 512
#: An archive ends in two blocks of zeros.
END: Final = bytes(2 * BLOCK)
MAX_NAME: Final = 100  # bytes
MAX_LENGTH: Final = 8**11 - 1  # bytes


def header(name: str, length: int) -> bytes:
    """The block before a file of that name and length."""
    fields = [
        name.encode().ljust(MAX_NAME, b"\0"),
        b"0000644\0", b"0000000\0", b"0000000\0",  # mode, uid, gid
        b"%011o\0" % length,
        b"%011o\0" % 0,  # mtime: the same inputs give the same bytes
        b" " * 8,  # checksum, filled in below
        b"0", b"\0" * 100, b"ustar\0", b"00",
        b"\0" * 32, b"\0" * 32, b"0000000\0", b"0000000\0", b"\0" * 155, b"\0" * 12,
    ]  # fmt: skip
    whole = b"".join(fields)
    return whole[:148] + b"%06o\0 " % sum(whole) + whole[156:]


def claimed_name(block: bytes) -> str:
    """The name a header claims; not yet believed."""
    return block[:MAX_NAME].rstrip(b"\0").decode("ascii", "replace")


def claimed_length(block: bytes) -> int | None:
    """The length a header claims, not yet believed; None where it is not a number."""
    digits = block[124:135]
    return int(digits, 8) if all(0x30 <= d <= 0x37 for d in digits) else None


def padding(length: int) -> int:
    """How many zeros follow a file of that length."""
    return -length % BLOCK
