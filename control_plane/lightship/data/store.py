"""Data: datasets on disk, each under its digest.

Rules:
* a file appears whole or not at all: temp file, fsync, rename, fsync of the folder;
* what is there is never written again, and what is read is checked against its name;
* names are not kept here: who calls which digest what is the registry's matter.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from lightship_agent.contract.codes import DataError, StorageError
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.files import storage_error, write_durably

from .dataset import Dataset, canonical_bytes, parse_dataset

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class DatasetStore:
    """A folder of datasets named by digest. Several processes may use it at once.

    Args:
        root: the folder; made on first use.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, digest: str) -> Path:
        """Where the dataset of `digest` lies, or would lie.

        Raises:
            DataError: data.unknown when `digest` is not one.
        """
        if not _DIGEST.fullmatch(digest):
            raise DataError("data.unknown", f"{digest[:80]!r} is not a dataset digest: expected 64 hex digits.")
        return self._root / digest[:2] / f"{digest}.msgpack"

    def put(self, dataset: Dataset) -> str:
        """Keep `dataset`; the same one twice is kept once. A damaged copy is replaced.

        Returns:
            The digest.

        Raises:
            StorageError: storage.full, storage.unwritable; nothing half-written stays behind.
        """
        data = canonical_bytes(dataset)
        digest = sha256_hex(data)
        path = self.path(digest)
        try:
            if not (path.exists() and sha256_hex(path.read_bytes()) == digest):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_durably(path, data)
        except OSError as e:
            raise storage_error(e, path) from e
        return digest

    def get(self, digest: str) -> Dataset:
        """The dataset of `digest`.

        Raises:
            DataError: data.unknown.
            StorageError: storage.corrupt when the file is not what was written; storage.unwritable when it
                can't be read.
        """
        path = self.path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError as e:
            raise DataError("data.unknown", f"No dataset of digest {digest}.") from e
        except OSError as e:
            raise storage_error(e, path) from e
        found = sha256_hex(data)
        if found != digest:
            message = f"{path}: expected sha256 {digest}, found {found}."
            raise StorageError(
                "storage.corrupt", message, remedy="Restore the file from a backup, or add the data again."
            )
        return parse_dataset(data)

    def digests(self) -> tuple[str, ...]:
        """Every digest kept here, in order."""
        return tuple(sorted(p.stem for p in self._root.glob("??/*.msgpack") if _DIGEST.fullmatch(p.stem)))
