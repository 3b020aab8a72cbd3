"""Contract: media, the one file that somebody carries to devices without a network.

    lightship-media              the format's number, and the reason why the rest is not mistaken for a bundle
    metadata/<N>.root.json       every root, from the first one on
    metadata/<N>.<role>.json     snapshot, targets and what those delegate to
    metadata/timestamp.json
    assignments/<device>.json    what each device shall run: the director's DSSE envelope
    targets/<sha256>             what travels: bundles, compressed

Rules:
* a flat, deterministic ustar, like a bundle: regular files of a closed alphabet, in strictly rising order; the reader
  accepts exactly what the writer writes;
* the file has no signature of its own and needs none, for each part of it is signed or named by something that is:
  the metadata by the keys of its roles, an envelope by the director, and what travels is known by the digest that the
  signed release list gives it. A device verifies them as it does online, and believes nothing else here: neither that
  a name is true, nor that the parts belong together;
* it is read where it lies, by length and position: half a gigabyte is never in memory;
* whatever it claims, sizes and counts are bounded before anything is read.

Source: POSIX.1-1988 ustar interchange format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import BinaryIO, Final, NamedTuple

import msgspec

from .assignment import MAX_ENVELOPE
from .bundle import MAX_BUNDLE
from .codes import MediaError
from .device_api import MAX_RELEASE_LIST
from .ustar import BLOCK, END, claimed_length, claimed_name, header, padding

FORMAT: Final = b"1\n"
FORMAT_MEMBER: Final = "lightship-media"
TIMESTAMP: Final = "metadata/timestamp.json"
#: The release list is the largest of all metadata.
MAX_METADATA: Final = MAX_RELEASE_LIST  # bytes, of one file
#: zstd makes nothing that can't be compressed longer than this.
MAX_TRANSPORT: Final = MAX_BUNDLE + MAX_BUNDLE // 128 + 1024  # bytes
_STEP: Final = 1 << 20


class Kind(NamedTuple):
    """One kind of member: what its names look like, and how large and how many they may be."""

    pattern: re.Pattern[str]
    largest: int  # bytes
    most: int


#: In the order of the file.
KINDS: Final = (
    Kind(re.compile(re.escape(FORMAT_MEMBER)), 16, 1),
    Kind(re.compile(r"metadata/(timestamp|[1-9][0-9]{0,9}\.[a-z0-9-]{1,48})\.json"), MAX_METADATA, 1_024),
    Kind(re.compile(r"assignments/[a-z0-9][a-z0-9-]{1,62}\.json"), MAX_ENVELOPE, 16_384),
    Kind(re.compile(r"targets/[0-9a-f]{64}"), MAX_TRANSPORT, 256),
)


class Entry(msgspec.Struct, frozen=True):
    """Where a member lies, in bytes."""

    offset: int
    length: int


class MediaIndex(msgspec.Struct, frozen=True):
    """What a media file claims to hold."""

    entries: dict[str, Entry]

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that there are envelopes for."""
        names = (n for n in self.entries if n.startswith("assignments/"))
        return tuple(n.removeprefix("assignments/").removesuffix(".json") for n in names)


def assignment_name(device: str) -> str:
    """The member that holds a device's envelope."""
    return f"assignments/{device}.json"


def target_name(sha256: str) -> str:
    """The member that holds what travels, by its digest."""
    return f"targets/{sha256}"


def read_index(file: BinaryIO) -> MediaIndex:
    """What lies where in a file that can seek; only headers and padding are read.

    Raises:
        MediaError: media.malformed, media.truncated, media.too-large, media.format.
        OSError: the file can't be read.
    """
    entries: dict[str, Entry] = {}
    counts = [0] * len(KINDS)
    at, before = 0, (-1, "")
    file.seek(0)
    while any(block := _take(file, BLOCK, first=not entries)):
        kind, name, length = _claims(block, first=not entries)
        counts[kind] += 1
        if (kind, name) <= before:
            raise MediaError("media.malformed", f"Member {name!r} is out of order or twice in the file.")
        if counts[kind] > KINDS[kind].most:
            raise MediaError("media.too-large", f"More than {KINDS[kind].most} members are like {name!r}.")
        before = (kind, name)
        entries[name] = Entry(at + BLOCK, length)
        if name == FORMAT_MEMBER:
            _check_format(_take(file, length))
        file.seek(at + BLOCK + length)
        if any(_take(file, padding(length))):
            raise MediaError("media.malformed", f"Member {name!r}: padding is not zero.")
        at += BLOCK + length + padding(length)
    if any(_take(file, len(END) - BLOCK)) or file.read(1):
        raise MediaError("media.malformed", "The file does not end in exactly two zero blocks.")
    if TIMESTAMP not in entries:
        raise MediaError("media.incomplete", f"Expected {TIMESTAMP} in the file.")
    return MediaIndex(entries)


def read_member(file: BinaryIO, index: MediaIndex, name: str, limit: int) -> bytes:
    """A small member, at most `limit` bytes.

    Raises:
        MediaError: media.incomplete, media.truncated, media.too-large.
        OSError: the file can't be read.
    """
    entry = index.entries.get(name)
    if entry is None:
        raise MediaError("media.incomplete", f"There is no {name} in the file.")
    if entry.length > limit:
        raise MediaError("media.too-large", f"{name}: {entry.length} bytes exceed {limit}.")
    return b"".join(read_chunks(file, entry))


def read_chunks(file: BinaryIO, entry: Entry) -> Iterator[bytes]:
    """A member's bytes, a megabyte at a time; nothing else may move `file` meanwhile.

    Raises:
        MediaError: media.truncated.
        OSError: the file can't be read.
    """
    file.seek(entry.offset)
    left = entry.length
    while left:
        chunk = _take(file, min(left, _STEP))
        left -= len(chunk)
        yield chunk


class MediaWriter:
    """Writes members in their order; `finish` ends the file."""

    def __init__(self, file: BinaryIO) -> None:
        """Begin the file with its format."""
        self._file = file
        self._before = (-1, "")
        self._counts = [0] * len(KINDS)
        self.add(FORMAT_MEMBER, len(FORMAT), [FORMAT])

    def add(self, name: str, length: int, chunks: Iterable[bytes]) -> None:
        """Write a member of exactly `length` bytes.

        Raises:
            MediaError: media.malformed for an unknown name, a wrong order or another length; media.too-large.
            OSError: the file can't be written.
        """
        kind = _kind_of(name)
        if (kind, name) <= self._before:
            raise MediaError("media.malformed", f"Member {name!r} comes too late, or a second time.")
        self._before = (kind, name)
        self._counts[kind] += 1
        if length > KINDS[kind].largest or self._counts[kind] > KINDS[kind].most:
            message = f"{name}: expected at most {KINDS[kind].most} such members of {KINDS[kind].largest} bytes."
            raise MediaError("media.too-large", message)
        self._file.write(header(name, length))
        written = 0
        for chunk in chunks:
            written += len(chunk)
            if written <= length:
                self._file.write(chunk)
        if written != length:
            raise MediaError("media.malformed", f"{name}: {length} bytes were announced, {written} came.")
        self._file.write(bytes(padding(length)))

    def finish(self) -> None:
        """Write the end of the file.

        Raises:
            OSError: the file can't be written.
        """
        self._file.write(END)


def member_order(name: str) -> tuple[int, str]:
    """What members are sorted by.

    Raises:
        MediaError: media.malformed for a name that no member has.
    """
    return _kind_of(name), name


def media_size(lengths: Iterable[int]) -> int:
    """Bytes of a file with members of such lengths, its format aside."""
    return 2 * BLOCK + len(END) + sum(BLOCK + length + padding(length) for length in lengths)


def _kind_of(name: str) -> int:
    for i, kind in enumerate(KINDS):
        if kind.pattern.fullmatch(name):
            return i
    raise MediaError("media.malformed", f"{name[:80]!r} is not a member of a media file.")


def _claims(block: bytes, *, first: bool) -> tuple[int, str, int]:
    name, length = claimed_name(block), claimed_length(block)
    if first and name != FORMAT_MEMBER:
        message = f"Expected a file that `lightship release export` wrote; this one begins with {name[:40]!r}."
        raise MediaError("media.malformed", message)
    kind = _kind_of(name)
    if length is None:
        raise MediaError("media.malformed", f"Member {name!r}: the length is not octal.")
    if length > KINDS[kind].largest:
        raise MediaError("media.too-large", f"Member {name!r}: {length} bytes exceed {KINDS[kind].largest}.")
    if block != header(name, length):
        raise MediaError("media.malformed", f"Member {name!r}: not a plain deterministic ustar header.")
    return kind, name, length


def _check_format(found: bytes) -> None:
    if found != FORMAT:
        message = f"The media file is of format {found.strip()[:16]!r}, this version reads {FORMAT.strip()!r}."
        raise MediaError("media.format", message, remedy="Update the agent, or export with an older control plane.")


def _take(file: BinaryIO, length: int, *, first: bool = False) -> bytes:
    data = file.read(length)
    if len(data) < length:
        if first:
            raise MediaError("media.malformed", f"Not a media file: it has {len(data)} bytes.")
        raise MediaError(
            "media.truncated", "The file ends too early.", remedy="Copy it once more, and unmount cleanly."
        )
    return data
