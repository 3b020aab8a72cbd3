"""Update: the content-addressed store of bundles, and the durable update state.

    <state>/bundles/<sha256>.tar     verified bundles, named by what they are
    <state>/staging/<sha256>.part    downloads under way; `.zpatch.part` of a patch
    <state>/update.json              the UpdateState
    <state>/committed.json           the same, as it was at the last time of rest: where a disk lost the other

Rules:
* a name is a promise, so a file enters `bundles/` only by rename of verified, synced bytes; whatever can't be read back
  as promised counts as absent;
* what the update state refers to (`machine.kept`) stays; all else is garbage, and goes when an update is committed,
  when an assignment wants nothing new, or when room is needed;
* the quota counts bundles and downloads, and is never kept by removing what is referred to.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Final

import msgspec

from lightship_agent.contract.codes import StorageError
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.fail_points import fail_point
from lightship_agent.files import storage_error, write_durably

from .machine import UpdateState

log = logging.getLogger(__name__)

#: Bytes that stay free on the disk, for the state, the outbox and everybody else.
RESERVE: Final = 16 << 20


class BundleStore:
    """Verified bundles by digest."""

    def __init__(self, state_dir: Path, quota: int = 0) -> None:
        """Create the folders where they are missing. `quota` is bytes; 0: none but the disk's own.

        Raises:
            StorageError: storage.full, storage.unwritable.
        """
        self._quota = quota
        self.bundles = state_dir / "bundles"
        self.staging = state_dir / "staging"
        try:
            self.bundles.mkdir(parents=True, exist_ok=True)
            self.staging.mkdir(exist_ok=True)
        except OSError as e:
            raise storage_error(e, state_dir) from e

    def path(self, digest: str) -> Path:
        """Where the bundle of that digest is, or would be."""
        return self.bundles / f"{digest}.tar"

    def part(self, digest: str, kind: str = "") -> Path:
        """Where the download that makes the bundle of that digest is kept until it is whole."""
        return self.staging / f"{digest}.{kind + '.' if kind else ''}part"

    def come_of(self, digest: str) -> int:
        """Bytes that the downloads of that bundle take."""
        sizes = 0
        for path in self.staging.glob(f"{digest}.*"):
            with contextlib.suppress(FileNotFoundError):
                sizes += path.stat().st_size
        return sizes

    def forget_parts(self, digest: str) -> None:
        """Remove the downloads of that bundle."""
        for path in self.staging.glob(f"{digest}.*"):
            path.unlink(missing_ok=True)

    def holds(self, digest: str) -> bool:
        """Whether the bundle is here and still is what its name says."""
        return self.read(digest) is not None

    def read(self, digest: str) -> bytes | None:
        """The bundle's bytes, or None if absent or no longer what its name says."""
        try:
            data = self.path(digest).read_bytes()
        except OSError:
            return None
        return data if sha256_hex(data) == digest else None

    def put(self, digest: str, data: bytes) -> Path:
        """Keep verified bytes.

        Raises:
            StorageError: storage.full, storage.unwritable.
        """
        write_durably(self.path(digest), data)
        return self.path(digest)

    def size(self) -> int:
        """Bytes that bundles and downloads take."""
        sizes = 0
        for folder in (self.bundles, self.staging):
            for path in folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    sizes += path.stat().st_size
        return sizes

    def make_room(self, needed: int, keep: tuple[str, ...]) -> None:
        """See that `needed` more bytes have room on the disk and within the quota; remove garbage where they have not.

        Raises:
            StorageError: storage.full, storage.quota, storage.unwritable; what is in `keep` is still there.
        """
        try:
            if self._lacking(needed):
                self.collect_garbage(keep)
                lacking = self._lacking(needed)
                if lacking is not None:
                    raise lacking
        except OSError as e:
            raise storage_error(e, self.bundles) from e

    def _lacking(self, needed: int) -> StorageError | None:
        taken = self.size()
        if self._quota and taken + needed > self._quota:
            message = f"The bundle needs {needed} bytes, and of {self._quota} bytes for bundles {taken} are taken."
            return StorageError(
                "storage.quota", message, remedy="Raise LIGHTSHIP_AGENT_STORE_MB, or use a smaller model."
            )
        disk = os.statvfs(self.bundles)
        free = disk.f_bavail * disk.f_frsize
        if free < needed + RESERVE:
            message = f"{self.bundles}: expected {needed} bytes free and {RESERVE} in reserve, found {free}."
            return StorageError("storage.full", message, remedy="Free space and try again.")
        return None

    def collect_garbage(self, keep: tuple[str, ...]) -> None:
        """Remove bundles and downloads that nobody refers to.

        Raises:
            StorageError: storage.unwritable.
        """
        for folder in (self.bundles, self.staging):
            try:
                for path in folder.iterdir():
                    digest = path.name.partition(".")[0]
                    # A download of what is in the store was cut between the two; nobody will go on with it.
                    if digest not in keep or (folder == self.staging and self.path(digest).exists()):
                        fail_point("collecting", path.name)
                        path.unlink(missing_ok=True)
            except OSError as e:
                raise storage_error(e, folder) from e


class StateFile:
    """update.json, and the copy of it at the last time of rest."""

    def __init__(self, state_dir: Path) -> None:
        """Nothing is read yet."""
        self.path = state_dir / "update.json"
        self._copy = state_dir / "committed.json"

    def load(self) -> UpdateState:
        """The stored state; the one at rest before it where a disk lost it; a first one where there is none.

        A file that can't be read is set aside as `update.json.broken`, for inspection. It must not keep the device
        from serving, for nobody may ever come by: at worst the assigned bundle is fetched anew.
        """
        for path in (self.path, self._copy):
            try:
                return msgspec.json.decode(path.read_bytes(), type=UpdateState)
            except FileNotFoundError:
                continue
            except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as e:
                log.warning("storage.corrupt: %s is not an update state, and is set aside: %s.", path, e)
                with contextlib.suppress(OSError):  # on a read-only disk it stays where it is
                    path.rename(path.with_name(f"{path.name}.broken"))
        return UpdateState()

    def save(self, state: UpdateState) -> None:
        """Make `state` durable.

        Raises:
            StorageError: storage.full, storage.unwritable.
        """
        data = msgspec.json.encode(state)
        write_durably(self.path, data)
        if state.phase == "idle":
            try:
                write_durably(self._copy, data)
            except StorageError as e:  # the state itself is durable, and the next rest brings another copy
                log.warning("update: no copy of the state: %s: %s", e.code, e)
