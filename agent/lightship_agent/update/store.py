"""Update: the content-addressed store of bundles, and the durable update state.

    <state>/bundles/<sha256>.tar     verified bundles, named by what they are
    <state>/staging/<sha256>.part    downloads under way
    <state>/update.json              the UpdateState
    <state>/committed.json           the same, as it was at the last time of rest: where a disk lost the other

Rules: a name is a promise, so a file enters `bundles/` only by rename of verified, synced bytes; whatever can't be
read back as promised counts as absent.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import msgspec

from lightship_agent.contract.codes import StorageError
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.fail_points import fail_point
from lightship_agent.files import storage_error, write_durably

from .machine import UpdateState

log = logging.getLogger(__name__)


class BundleStore:
    """Verified bundles by digest."""

    def __init__(self, state_dir: Path) -> None:
        """Create the folders where they are missing.

        Raises:
            StorageError: storage.full, storage.unwritable.
        """
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
