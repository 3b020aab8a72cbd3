"""Storage: artifacts by digest, behind an interface an object store can also fill.

Rules: put-if-absent by content, verified on every read, written whole or not at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from lightship_agent.contract.codes import StorageError
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.files import storage_error, sweep, write_durably


class ArtifactStore(Protocol):
    """Immutable bytes, named by their sha256."""

    def put(self, data: bytes) -> str:
        """Keep `data`; its digest."""

    def get(self, digest: str) -> bytes:
        """The bytes of that digest.

        Raises:
            StorageError: storage.corrupt.
        """


class FolderArtifacts:
    """Artifacts in a directory, `ab/abcdef…`."""

    def __init__(self, root: Path) -> None:
        """Keep artifacts under `root`."""
        self._root = root

    def put(self, data: bytes) -> str:
        """Keep `data`; its digest.

        Raises:
            StorageError: storage.full, storage.unwritable.
        """
        digest = sha256_hex(data)
        path = self._path(digest)
        if not path.exists():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise storage_error(e, path) from e
            sweep(path.parent)
            write_durably(path, data)
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes of that digest.

        Raises:
            StorageError: storage.corrupt when they are gone or altered.
        """
        try:
            data = self._path(digest).read_bytes()
        except OSError as e:
            raise StorageError("storage.corrupt", f"Artifact {digest[:12]} can't be read: {e}.") from e
        if sha256_hex(data) != digest:
            raise StorageError("storage.corrupt", f"Artifact {digest[:12]} was altered on disk.")
        return data

    def _path(self, digest: str) -> Path:
        return self._root / digest[:2] / digest
