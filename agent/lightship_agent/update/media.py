"""Update: a file that somebody carried here, in place of the control plane.

    <state>/import/<seq>-<sha256>.media    verified files that wait for the agent, cut down to what this device needs

Rules:
* nothing in the file is believed: the metadata goes through the same TUF client as the server's, the envelope through
  the same checks, and what travels must have the released digest (`check`, `fetch`);
* a file enters `import/` only whole, verified and synced, by rename, and after room was made sure of: a stick that is
  pulled out, a full disk and a cut leave the folder as it was;
* the agent alone acts on its state: a command leaves a file here, and the agent takes it, now or at its next start;
* nothing here loads the TUF client: `open_fetcher` does, in the process of the check.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import msgspec

from lightship_agent.contract.assignment import MAX_ENVELOPE
from lightship_agent.contract.codes import MediaError, StorageError, TrustError
from lightship_agent.contract.media import (
    FORMAT_MEMBER,
    Entry,
    MediaIndex,
    MediaWriter,
    assignment_name,
    media_size,
    read_chunks,
    read_index,
    read_member,
    target_name,
)
from lightship_agent.fail_points import fail_point
from lightship_agent.files import storage_error, sweep, sync_folder

from .released import ReleasedFile
from .store import RESERVE

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from tuf.ngclient.fetcher import FetcherInterface

log = logging.getLogger(__name__)

#: What `check.FileSource` opens these files with.
OPENER: Final = "lightship_agent.update.media:open_fetcher"
FOLDER: Final = "import"
SUFFIX: Final = ".media"


class Media(msgspec.Struct, frozen=True):
    """An opened file, and what lies where in it."""

    file: BinaryIO
    index: MediaIndex
    path: Path

    def read(self, name: str, limit: int) -> bytes:
        """A small member.

        Raises:
            MediaError: media.incomplete, media.truncated, media.too-large, media.unreadable.
        """
        try:
            return read_member(self.file, self.index, name, limit)
        except OSError as e:
            raise _unreadable(self.path, e) from e

    def chunks(self, name: str) -> Iterator[bytes]:
        """A large member, piece by piece.

        Raises:
            MediaError: media.truncated, media.unreadable.
        """
        try:
            yield from read_chunks(self.file, self.index.entries[name])
        except OSError as e:
            raise _unreadable(self.path, e) from e


@contextmanager
def open_media(path: Path) -> Iterator[Media]:
    """The file at `path`, its structure checked.

    Raises:
        MediaError: media.*.
    """
    try:
        file = path.open("rb")
    except OSError as e:
        raise _unreadable(path, e) from e
    with file:
        try:
            index = read_index(file)
        except OSError as e:
            raise _unreadable(path, e) from e
        yield Media(file, index, path)


def open_fetcher(path: Path, cache: Path, now: float) -> AbstractContextManager[FetcherInterface]:
    """The metadata in the file, for the TUF client. Args and errors are those of `media_fetcher`."""
    from .media_fetcher import open_fetcher as opened

    return opened(path, cache, now)


def envelope_for(path: Path, device: str) -> bytes:
    """The envelope for `device`, not yet verified.

    Raises:
        MediaError: media.foreign where the file holds none, and the others of `open_media`.
    """
    with open_media(path) as media:
        name = assignment_name(device)
        if name not in media.index.entries:
            meant = media.index.devices
            some = f"{', '.join(meant[:5])}{' and others' if len(meant) > 5 else ''}" if meant else "no device at all"
            message = f"The file is for {some}; this is {device}."
            remedy = f"Export one with --device {device}, or for its group."
            raise MediaError("media.foreign", message, remedy=remedy)
        return media.read(name, MAX_ENVELOPE)


@contextmanager
def open_transport(path: Path, file: ReleasedFile) -> Iterator[Member]:
    """What travels, as a stream of exactly `file.length` bytes whose digest the caller verifies.

    Raises:
        MediaError: media.incomplete where the file lacks it, and the others of `open_media`.
        TrustError: trust.digest where its length is not the released one.
    """
    with open_media(path) as media:
        yield Member(media, _transport(media, file))


class Member:
    """One member as a stream."""

    def __init__(self, media: Media, entry: Entry) -> None:
        """From its first byte on."""
        self._media = media
        self._at = entry.offset
        self._end = entry.offset + entry.length

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes; all that are left where it is negative; none at the end.

        Raises:
            MediaError: media.truncated, media.unreadable.
        """
        left = self._end - self._at
        entry = Entry(self._at, left if size < 0 else min(size, left))
        self._at += entry.length
        try:
            return b"".join(read_chunks(self._media.file, entry))
        except OSError as e:
            raise _unreadable(self._media.path, e) from e


def spool(
    path: Path,
    state_dir: Path,
    *,
    device: str,
    seq: int,
    transport: ReleasedFile,
    progress: Callable[[int, int], None] = lambda _done, _whole: None,
) -> Path:
    """Copy what `device` needs of a file whose metadata and assignment were verified, for the agent to take.

    Args:
        path: the file.
        state_dir: the agent's.
        device: whose assignment is copied.
        seq: of the verified assignment; the agent takes the highest first.
        transport: the verified released file that brings the bundle; its digest is verified here.
        progress: told bytes done and bytes in all, now and then.

    Raises:
        MediaError: media.*.
        TrustError: trust.digest.
        StorageError: storage.full, storage.unwritable; nothing is left behind.
    """
    with open_media(path) as media:
        _transport(media, transport)
        wanted = {assignment_name(device), target_name(transport.sha256)}
        names = [n for n in media.index.entries if n.startswith("metadata/") or n in wanted]
        folder = state_dir / FOLDER
        target = folder / f"{seq:010d}-{transport.sha256}{SUFFIX}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            sweep(folder)
            size = media_size(media.index.entries[name].length for name in names)
            _check_room(folder, size + transport.length)
            _copy(media, names, transport, target, lambda done: progress(done, size))
        except OSError as e:
            raise storage_error(e, target) from e
        return target


def prepare(state_dir: Path) -> None:
    """Make the folder, so that it is ours, and remove what a killed import left in it."""
    folder = state_dir / FOLDER
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        sweep(folder)
    except OSError as e:  # without it nothing can be imported; the rest goes on
        log.warning("media: %s", e)


def settled(path: Path) -> None:
    """Nothing more is to be done with a file that waited.

    Raises:
        StorageError: storage.unwritable.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as e:
        raise storage_error(e, path) from e


def spooled(state_dir: Path) -> list[Path]:
    """The files that wait, the newest assignment first: it raises the floor above those that are older."""
    try:
        return sorted(
            # A pipe of that name would hold us up for ever.
            (p for p in (state_dir / FOLDER).iterdir() if p.suffix == SUFFIX and p.name[0] != "." and p.is_file()),
            reverse=True,
        )
    except OSError:  # there is no such folder until the first import
        return []


def _copy(
    media: Media, names: list[str], transport: ReleasedFile, target: Path, progress: Callable[[int], None]
) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as out:
            fail_point("file-begun", target.name)
            writer = MediaWriter(out)
            for name in names:
                if name == FORMAT_MEMBER:
                    continue
                chunks = media.chunks(name)
                if name == target_name(transport.sha256):
                    chunks = _verified(chunks, transport, progress)
                writer.add(name, media.index.entries[name].length, chunks)
            writer.finish()
            out.flush()
            os.fsync(out.fileno())
        fail_point("file-written", target.name)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fail_point("file-renamed", target.name)
    sync_folder(target.parent)


def _verified(chunks: Iterator[bytes], file: ReleasedFile, progress: Callable[[int], None]) -> Iterator[bytes]:
    found, done = hashlib.sha256(), 0
    for chunk in chunks:
        found.update(chunk)
        done += len(chunk)
        progress(done)
        yield chunk
    if found.hexdigest() != file.sha256:
        message = f"{file.path}: the bytes in the file are not the released ones."
        raise TrustError(
            "trust.digest", message, remedy="The copy is damaged, or was altered: export and copy it anew."
        )


def _transport(media: Media, file: ReleasedFile) -> Entry:
    entry = media.index.entries.get(target_name(file.sha256))
    if entry is None:
        message = f"{file.path} is released and assigned, and not in the file."
        raise MediaError("media.incomplete", message, remedy="Export anew.")
    if entry.length != file.length:
        message = f"{file.path}: {file.length} bytes are released, {entry.length} are in the file."
        raise TrustError("trust.digest", message)
    return entry


def _check_room(folder: Path, needed: int) -> None:
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if free < needed + RESERVE:
        message = f"{folder}: expected {needed} bytes free and {RESERVE} in reserve, found {free}."
        raise StorageError("storage.full", message, remedy="Free space and try again.")


def _unreadable(path: Path, e: OSError) -> MediaError:
    return MediaError("media.unreadable", f"Can't read {path}: {e.strerror or e}.")
