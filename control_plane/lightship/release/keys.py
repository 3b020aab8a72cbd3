"""Release: the signing keys of a home.

    root       may change every other key; offline in production, 2 of 3
    targets    only delegates; offline in production
    releases   says which bundles may run; the release engineers' keys
    snapshot, timestamp   online, say what is current
    director   online, says which device runs which released bundle

Rules: keys are files under `<home>/keys` that begin with their role: `snapshot.pem`, `releases-1a2b3c4d.pem`, or
`timestamp.key.json` for one behind a URI; private ones have mode 0600 and are read only when something is signed. Which
of them count is in the metadata, so a key that is not in force yet, or no longer, may lie here and signs nothing.
`create` makes all six, one each, threshold one: right for development, and said loudly there. `create_online` makes the
three that sign without a person: a production server never holds another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from securesystemslib.signer import CryptoSigner, Signer

from lightship_agent.contract.codes import ReleaseError
from lightship_agent.files import storage_error, sync_folder

from .keyfiles import PRIVATE_SUFFIX, REFERENCE_SUFFIX, open_key, private_pem, public_json, read_public, write_new

OFFLINE_ROLES: Final = ("root", "targets", "releases")
ONLINE_ROLES: Final = ("snapshot", "timestamp", "director")
ROLES: Final = (*OFFLINE_ROLES, *ONLINE_ROLES)
DEVELOPMENT_NOTICE: Final = (
    "Development keys: one key per role, threshold 1, all on this machine. "
    "Whoever can read <home>/keys can release models."
)
#: A home that holds this file never makes itself keys of the offline roles.
PRODUCTION: Final = "production"
_BACKUP: Final = "Restore it from your backup."


@dataclass(frozen=True)
class Held:
    """A key file of the home."""

    role: str
    path: Path
    keyid: str  # "" when it can't be opened as it is
    problem: str = ""


class KeyFolder:
    """The keys of one home."""

    def __init__(self, folder: Path) -> None:
        """Keys are (or will be) under `folder`."""
        self.folder = folder
        self._trusted: Callable[[str], Collection[str]] | None = None

    def ask(self, trusted: Callable[[str], Collection[str]]) -> None:
        """Where to ask which key ids devices trust for a role; needed only while several are here."""
        self._trusted = trusted

    @property
    def production(self) -> bool:
        """Whether this home was begun for keys that are kept elsewhere."""
        return (self.folder / PRODUCTION).exists()

    def create(self) -> None:
        """Make the development keys that are missing; never overwrite one.

        Raises:
            StorageError: storage.full, storage.unwritable.
        """
        self._make(ROLES)

    def create_online(self) -> None:
        """Make the online keys that are missing, in a home whose other keys are kept elsewhere.

        Raises:
            StorageError: storage.full, storage.unwritable.
        """
        self._make_folder()
        if not self.production:
            write_new(self.folder / PRODUCTION, b"The keys of root, targets and releases are kept elsewhere.\n")
        self._make(ONLINE_ROLES)

    def require_online(self) -> None:
        """See that the keys are here that sign without a person.

        Raises:
            ReleaseError: release.keys.
        """
        missing = [role for role in ONLINE_ROLES if not self.has(role)]
        if missing:
            message = f"Expected the keys of {', '.join(ONLINE_ROLES)} in {self.folder}; missing: {', '.join(missing)}."
            remedy = "Restore them from your backup; new ones would not be believed by any device."
            raise ReleaseError("release.keys", message, remedy=remedy)

    def has(self, role: str) -> bool:
        """Whether a key of `role` is kept here."""
        return bool(self.files(role))

    def files(self, role: str) -> list[Path]:
        """The key files of `role`."""
        patterns = [f"{role}{d}{s}" for s in (PRIVATE_SUFFIX, REFERENCE_SUFFIX) for d in ("", "-*")]
        return sorted({p for pattern in patterns for p in self.folder.glob(pattern)})

    def held(self) -> list[Held]:
        """Every key file of the home, with the id of its key."""
        found = []
        for role in ROLES:
            for path in self.files(role):
                try:
                    found.append(Held(role, path, _keyid(path)))
                except ReleaseError as e:
                    found.append(Held(role, path, "", e.message))
        return found

    def signer(self, role: str) -> Signer:
        """The signer of a role that one key signs for.

        Raises:
            ReleaseError: release.keys.
        """
        files = self.files(role) or [self.folder / f"{role}{PRIVATE_SUFFIX}"]
        if len(files) == 1 or self._trusted is None:
            return open_key(files[0])
        found, problem = self.signers(role, self._trusted(role))
        if not found:
            message = problem or f"None of the {role} keys here is one that devices were told to trust."
            raise ReleaseError("release.keys", message, remedy=_BACKUP)
        return found[0]

    def signers(self, role: str, keyids: Collection[str]) -> tuple[list[Signer], str]:
        """Those of these keys that are here under the name of `role`, and what is wrong with others, if anything is."""
        found, problem = {}, ""
        for path in self.files(role):
            try:
                signer = open_key(path)
            except ReleaseError as e:
                problem = problem or e.message
                continue
            if signer.public_key.keyid in keyids:
                found[signer.public_key.keyid] = signer
        return list(found.values()), problem

    def add(self, role: str) -> Signer:
        """Make one more key of `role`, beside those that are here; it counts once the metadata names it.

        Raises:
            StorageError: storage.full, storage.unwritable.
        """
        signer = CryptoSigner.generate_ed25519()
        self._make_folder()
        write_new(self.folder / f"{role}-{signer.public_key.keyid[:8]}{PRIVATE_SUFFIX}", private_pem(signer))
        return signer

    def adopt(self, role: str, source: Path) -> None:
        """Keep a copy of a `.key.json` as one of the keys of `role`; it counts once the metadata names it.

        Raises:
            ReleaseError: release.keys.
            StorageError: storage.full, storage.unwritable.
        """
        from .keyfiles import read_reference

        key, facts = read_reference(source)
        target = self.folder / f"{role}-{key.keyid[:8]}{REFERENCE_SUFFIX}"
        if not target.exists():
            self._make_folder()
            write_new(target, public_json(key, uri=facts.uri, pin_file=facts.pin_file))

    def retire(self, role: str, keyids: Collection[str]) -> None:
        """Remove these keys of `role`, where they are here: nobody believes them any more.

        Raises:
            StorageError: storage.unwritable.
        """
        try:
            for held in self.held():
                if held.role == role and held.keyid in keyids:
                    held.path.unlink(missing_ok=True)
            sync_folder(self.folder)
        except OSError as e:
            raise storage_error(e, self.folder) from e

    def _make(self, roles: Iterable[str]) -> None:
        self._make_folder()
        for role in roles:
            if not self.has(role):
                write_new(self.folder / f"{role}{PRIVATE_SUFFIX}", private_pem(CryptoSigner.generate_ed25519()))

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            raise storage_error(e, self.folder) from e


def _keyid(path: Path) -> str:
    """The id of the key in a file, without a need for its passphrase where its public half lies beside it."""
    if path.name.endswith(REFERENCE_SUFFIX):
        return read_public(path).keyid
    return open_key(path).public_key.keyid
