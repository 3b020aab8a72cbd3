"""Release: the TUF repository.

Rules:
* written in the order bundle files → releases → snapshot → timestamp, each by temp file, fsync and rename, under one
  lock; a cut anywhere leaves the old repository in force;
* a path, once released, keeps its bytes; revocation is de-listing;
* snapshot and timestamp are re-signed at half of their life even when nothing changed;
* the uncompressed bundle is listed as a target of its own, so that an assignment can name it; what travels is the
  `.zst` beside it.

Source: The Update Framework specification 1.0, consistent snapshots.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, TypeVar

from securesystemslib.exceptions import StorageError as UnreadableFileError
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONSerializer

from lightship_agent.contract.assignment import DIRECTOR
from lightship_agent.contract.codes import ReleaseError
from lightship_agent.contract.transport import TRANSPORT_SUFFIX, pack_transport
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.files import storage_error, sweep, write_durably

from .keys import KeyFolder

LIFE: Final[dict[str, timedelta]] = {
    "root": timedelta(days=365),
    "targets": timedelta(days=365),
    "releases": timedelta(days=90),
    "snapshot": timedelta(days=7),
    "timestamp": timedelta(days=7),
}
RELEASES: Final = "releases"
_PATTERNS: Final = ["bundles/*/*", "deltas/*/*"]
_T = TypeVar("_T", Root, Targets, Snapshot, Timestamp)
_ONLINE: Final = (RELEASES, "snapshot", "timestamp")


@dataclass(frozen=True)
class Released:
    """A bundle in the release list."""

    path: str
    sha256: str
    length: int
    transport_length: int


class ReleaseRepository:
    """The repository under `<home>/tuf`."""

    def __init__(self, folder: Path, keys: KeyFolder) -> None:
        """Nothing is read yet."""
        self.metadata = folder / "metadata"
        self.targets = folder / "targets"
        self._keys = keys
        self._serializer = JSONSerializer(compact=True)

    @property
    def exists(self) -> bool:
        """Whether the repository was made; its timestamp is written last."""
        return (self.metadata / "timestamp.json").exists()

    def create(self) -> None:
        """Sign the first version of every role.

        Raises:
            ReleaseError: release.exists, release.keys.
            StorageError: storage.full, storage.unwritable.
        """
        if self.exists:
            raise ReleaseError("release.exists", f"There is a repository in {self.metadata} already.")
        try:
            self.metadata.mkdir(parents=True, exist_ok=True)
            self.targets.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise storage_error(e, self.metadata) from e
        with self._lock():
            self._write(_first_root(self._keys), "root")
            self._write(Metadata(Targets(expires=_expiry("targets"), delegations=self._delegations())), "targets")
            self._write(Metadata(Targets(expires=_expiry(RELEASES))), RELEASES)
            snapshot = Snapshot(expires=_expiry("snapshot"))
            snapshot.meta = {"targets.json": MetaFile(1), "releases.json": MetaFile(1)}
            self._write(Metadata(snapshot), "snapshot")
            self._write(Metadata(Timestamp(expires=_expiry("timestamp"), snapshot_meta=MetaFile(1))), "timestamp")

    def root_bytes(self) -> bytes:
        """The first root: what devices are given to trust at enrolment."""
        return (self.metadata / "1.root.json").read_bytes()

    def publish(self, path: str, bundle: bytes) -> Released:
        """Release the bundle at `path`; the same bytes again are no change.

        Raises:
            ReleaseError: release.exists for other bytes at the same path; release.keys.
            StorageError: storage.full, storage.unwritable; the release list stays as it was.
        """
        with self._lock():
            releases = self._load(RELEASES, Targets)
            found = releases.signed.targets.get(path)
            if found is not None:
                if found.hashes["sha256"] != sha256_hex(bundle):
                    raise ReleaseError("release.exists", f"{path} is released with other bytes.")
                return self._released(path, releases.signed)
            packed = pack_transport(bundle)
            self._store_target(path + TRANSPORT_SUFFIX, packed)
            for name, data in ((path, bundle), (path + TRANSPORT_SUFFIX, packed)):
                releases.signed.targets[name] = TargetFile.from_data(name, data, ["sha256"])
            self._commit(releases)
            return self._released(path, releases.signed)

    def revoke(self, path: str) -> None:
        """De-list the bundle at `path`: no device accepts it from its next refresh on.

        Raises:
            ReleaseError: release.unknown, release.keys.
        """
        with self._lock():
            releases = self._load(RELEASES, Targets)
            if path not in releases.signed.targets:
                raise ReleaseError("release.unknown", f"{path} is not released.")
            for name in (path, path + TRANSPORT_SUFFIX):
                releases.signed.targets.pop(name, None)
            self._commit(releases)

    def released(self) -> list[Released]:
        """Every released bundle."""
        releases = self._load(RELEASES, Targets).signed
        return [self._released(p, releases) for p in sorted(releases.targets) if not p.endswith(TRANSPORT_SUFFIX)]

    def renew(self, now: datetime) -> list[str]:
        """Re-sign every online role (and releases, where its key is here) past half of its life; the roles re-signed.

        Raises:
            ReleaseError: release.keys when an online key is missing; release.unknown.
            StorageError: storage.full, storage.unwritable; what was in force stays so.
        """
        with self._lock():
            # The releases key may be kept elsewhere: what is signed here must not lapse because of that.
            here = [role for role in _ONLINE if role != RELEASES or self._keys.has(RELEASES)]
            due = [role for role in here if self._past_half(role, now)]
            if RELEASES in due:
                self._commit(self._load(RELEASES, Targets))
            elif "snapshot" in due:
                self._commit_snapshot()
            elif due:
                self._commit_timestamp()
            return due

    def expiries(self) -> dict[str, datetime]:
        """When each role's metadata expires."""
        return {role: self._expires(role) for role in LIFE}

    def _past_half(self, role: str, now: datetime) -> bool:
        return self._expires(role) - now < LIFE[role] / 2

    def _expires(self, role: str) -> datetime:
        if role == "root":
            return self._load(role, Root).signed.expires
        if role == "snapshot":
            return self._load(role, Snapshot).signed.expires
        if role == "timestamp":
            return self._load(role, Timestamp).signed.expires
        return self._load(role, Targets).signed.expires

    def _commit(self, releases: Metadata[Targets]) -> None:
        self._write_next(releases, RELEASES)
        self._commit_snapshot(releases.signed.version)

    def _commit_snapshot(self, releases_version: int | None = None) -> None:
        snapshot = self._load("snapshot", Snapshot)
        if releases_version is not None:
            snapshot.signed.meta["releases.json"] = MetaFile(releases_version)
        self._write_next(snapshot, "snapshot")
        self._commit_timestamp(snapshot.signed.version)

    def _commit_timestamp(self, snapshot_version: int | None = None) -> None:
        timestamp = self._load("timestamp", Timestamp)
        if snapshot_version is not None:
            timestamp.signed.snapshot_meta = MetaFile(snapshot_version)
        self._write_next(timestamp, "timestamp")

    def _write_next(self, metadata: Metadata[_T], role: str) -> None:
        metadata.signed.version += 1
        metadata.signed.expires = _expiry(role)
        metadata.sign(self._keys.signer(role))
        # What no device would believe must not take the place of what it does.
        delegator = self._load("targets", Targets).signed if role == RELEASES else self._load("root", Root).signed
        try:
            delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        except UnsignedMetadataError as e:
            message = f"The {role} key is not the one that devices were told to trust."
            raise ReleaseError("release.keys", message, remedy="Restore <home>/keys from your backup.") from e
        self._write_signed(metadata, role)

    def _write(self, metadata: Metadata[_T], role: str) -> None:
        metadata.sign(self._keys.signer(role))
        self._write_signed(metadata, role)

    def _write_signed(self, metadata: Metadata[_T], role: str) -> None:
        name = "timestamp.json" if role == "timestamp" else f"{metadata.signed.version}.{role}.json"
        write_durably(self.metadata / name, metadata.to_bytes(self._serializer))

    def _load(self, role: str, _kind: type[_T]) -> Metadata[_T]:
        """The version in force: timestamp names the snapshot, the snapshot names the rest."""
        try:
            return Metadata[_T].from_file(str(self.metadata / self._name(role)))
        except (OSError, ValueError, KeyError, UnreadableFileError, DeserializationError) as e:
            message = f"No readable {role} metadata: {e}."
            raise ReleaseError("release.unknown", message, remedy="Restore <home>/tuf from your backup.") from e

    def _name(self, role: str) -> str:
        if role == "timestamp":
            return "timestamp.json"
        if role == "root":
            newest = max(int(p.name.partition(".")[0]) for p in self.metadata.glob("*.root.json"))
            return f"{newest}.root.json"
        if role == "snapshot":
            return f"{self._load('timestamp', Timestamp).signed.snapshot_meta.version}.snapshot.json"
        return f"{self._load('snapshot', Snapshot).signed.meta[f'{role}.json'].version}.{role}.json"

    def _store_target(self, path: str, data: bytes) -> None:
        folder, _, name = path.rpartition("/")
        home = self.targets / folder
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise storage_error(e, home) from e
        sweep(home)
        write_durably(home / f"{sha256_hex(data)}.{name}", data)

    def _delegations(self) -> Delegations:
        releases, director = self._keys.signer(RELEASES).public_key, self._keys.signer(DIRECTOR).public_key
        roles = {
            RELEASES: DelegatedRole(RELEASES, [releases.keyid], 1, terminating=True, paths=_PATTERNS),
            # A key holder only: it signs assignments, and no path is ever looked up in it.
            DIRECTOR: DelegatedRole(DIRECTOR, [director.keyid], 1, terminating=True, paths=["-director-/-/-"]),
        }
        return Delegations({releases.keyid: releases, director.keyid: director}, roles)

    def _released(self, path: str, releases: Targets) -> Released:
        target = releases.targets[path]
        transport = releases.targets[path + TRANSPORT_SUFFIX]
        return Released(path, target.hashes["sha256"], target.length, transport.length)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.metadata / ".lock").open("w") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            sweep(self.metadata)
            yield


def _first_root(keys: KeyFolder) -> Metadata[Root]:
    root = Root(expires=_expiry("root"), consistent_snapshot=True)
    for role in ("root", "targets", "snapshot", "timestamp"):
        root.add_key(keys.signer(role).public_key, role)
    return Metadata(root)


def _expiry(role: str) -> datetime:
    return datetime.now(UTC).replace(microsecond=0) + LIFE[role]
