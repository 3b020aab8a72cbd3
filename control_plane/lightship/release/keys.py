"""Release: the signing keys, one Ed25519 key per role.

    root       may change every other key; offline in production
    targets    only delegates; offline in production
    releases   says which bundles may run; the release engineer's key
    snapshot, timestamp   online, say what is current
    director   online, says which device runs which released bundle

Rules: private keys are files with mode 0600 under `<home>/keys`, read only when something is signed. This layout
holds one key per role, threshold one: right for development, and said loudly there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner

from lightship_agent.contract.codes import ReleaseError
from lightship_agent.files import storage_error

ROLES: Final = ("root", "targets", "releases", "snapshot", "timestamp", "director")
ONLINE_ROLES: Final = ("snapshot", "timestamp", "director")
DEVELOPMENT_NOTICE: Final = (
    "Development keys: one key per role, threshold 1, all on this machine. "
    "Whoever can read <home>/keys can release models."
)


class KeyFolder:
    """The keys of one home."""

    def __init__(self, folder: Path) -> None:
        """Keys are (or will be) under `folder`."""
        self._folder = folder

    def create(self) -> None:
        """Make the keys that are missing; never overwrite one.

        Raises:
            StorageError: storage.full, storage.unwritable.
        """
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for role in ROLES:
                path = self._folder / f"{role}.pem"
                if not path.exists():
                    _write_new(path, CryptoSigner.generate_ed25519().private_bytes)
        except OSError as e:
            raise storage_error(e, self._folder) from e

    def require_online(self) -> None:
        """See that the keys are here that sign without a person.

        Raises:
            ReleaseError: release.keys.
        """
        missing = [role for role in ONLINE_ROLES if not self.has(role)]
        if missing:
            message = (
                f"Expected the keys of {', '.join(ONLINE_ROLES)} in {self._folder}; missing: {', '.join(missing)}."
            )
            remedy = "Restore them from your backup; new ones would not be believed by any device."
            raise ReleaseError("release.keys", message, remedy=remedy)

    def has(self, role: str) -> bool:
        """Whether the key of `role` is kept here."""
        return (self._folder / f"{role}.pem").exists()

    def signer(self, role: str) -> CryptoSigner:
        """The signer of `role`.

        Raises:
            ReleaseError: release.keys.
        """
        path = self._folder / f"{role}.pem"
        try:
            key = load_pem_private_key(path.read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as e:
            message = f"The {role} key {path} can't be read: {e}."
            raise ReleaseError("release.keys", message, remedy="Restore it from your backup.") from e
        if not isinstance(key, Ed25519PrivateKey):
            raise ReleaseError("release.keys", f"The {role} key is not an Ed25519 key.")
        return CryptoSigner(key)


def _write_new(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
