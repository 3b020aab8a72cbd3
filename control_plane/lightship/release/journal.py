"""Release: the journal of a change of keys: what is to be written, said before the first of it is written.

Rules:
* the journal is durable before any of its files is written, and gone after the last of them is;
* to carry it out a second time does no harm: whoever takes the repository's lock next finishes what was cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from lightship_agent.contract.codes import ReleaseError
from lightship_agent.files import storage_error, sync_folder, write_durably

from .keys import KeyFolder


class _Written(msgspec.Struct, frozen=True, kw_only=True):
    """A change under way: files in the order in which they are written, and the keys that count no more after it."""

    files: list[tuple[str, str]]
    retired: dict[str, list[str]]


class Journal:
    """Of changes to the files in a folder; the caller holds the repository's lock."""

    def __init__(self, path: Path, folder: Path, keys: KeyFolder) -> None:
        """Nothing is read yet."""
        self.path = path
        self._folder = folder
        self._keys = keys

    @property
    def open(self) -> bool:
        """Whether a change was begun and not finished."""
        return self.path.exists()

    def begin(self, files: Sequence[tuple[str, str]], retired: Mapping[str, list[str]]) -> None:
        """Note a change: names and texts of files, and keys, by role, that count no more after it.

        Raises:
            StorageError: storage.full, storage.unwritable; nothing was noted.
        """
        write_durably(self.path, msgspec.json.encode(_Written(files=list(files), retired=dict(retired))))

    def carry_out(self) -> None:
        """Write what it says; again from the start when that was cut.

        Raises:
            ReleaseError: release.unknown where it can't be read.
            StorageError: storage.full, storage.unwritable; who takes the lock next finishes it.
        """
        try:
            written = msgspec.json.decode(self.path.read_bytes(), type=_Written)
        except (OSError, msgspec.MsgspecError) as e:
            message = f"What was being changed can't be read from {self.path}: {e}."
            raise ReleaseError("release.unknown", message, remedy="Restore <home>/tuf from your backup.") from e
        for name, text in written.files:
            write_durably(self._folder / name, text.encode())
        for role, keyids in written.retired.items():
            self._keys.retire(role, keyids)
        try:
            self.path.unlink()
            sync_folder(self.path.parent)
        except OSError as e:
            raise storage_error(e, self.path) from e
