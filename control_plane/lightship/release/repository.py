"""Release: the TUF repository.

Rules:
* written in the order bundle files → targets, releases → snapshot → timestamp, each by temp file, fsync and rename,
  under one lock; a cut anywhere leaves the old repository in force;
* nothing is written that devices would not believe: what is signed is verified first, with the keys they were told;
* a path, once released, keeps its bytes; revocation is de-listing;
* snapshot and timestamp are re-signed at half of their life even when nothing changed; so is every other role whose
  keys are here;
* the uncompressed bundle is listed as a target of its own, so that an assignment can name it; what travels is the
  `.zst` beside it;
* a change of keys is written from a journal, so that one that was cut is finished by whoever takes the lock next. Where
  the old keys are here, they sign along until the new root is out, and no device sees a gap.

Source: The Update Framework specification 1.0, consistent snapshots.
"""

from __future__ import annotations

import fcntl
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from securesystemslib.signer import Signer
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from lightship_agent.contract.codes import ReleaseError
from lightship_agent.contract.device_api import MAX_RELEASE_LIST
from lightship_agent.contract.transport import DELTA_SUFFIX, TRANSPORT_SUFFIX, pack_transport
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.files import storage_error, sweep, write_durably

from .changes import Documents, RoleKeys, check, first_documents
from .deltas import stale_patches
from .health import RoleHealth, judge
from .journal import Journal
from .keys import ROLES, KeyFolder
from .metadata import LIFE, RELEASES, MetadataFiles, Signed, expiry
from .signing import sign_with, verifies

__all__ = ["LIFE", "RELEASES", "ReleaseRepository", "Released"]
_BUNDLES: Final = "bundles/"
_NO_TARGETS: Final[Mapping[str, bytes]] = {}


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
        self._files = MetadataFiles(self.metadata)
        self._keys = keys
        self._journal = Journal(folder / "changing.json", self.metadata, keys)
        keys.ask(self.trusted)

    # What is in force -------------------------------------------------------------------------------------------------

    @property
    def exists(self) -> bool:
        """Whether the repository was made; its timestamp is written last."""
        return self._files.complete

    def root_bytes(self) -> bytes:
        """The root in force: what devices are given to trust at enrolment.

        Raises:
            ReleaseError: release.not-begun.
        """
        self.require()
        return (self.metadata / self._files.name("root")).read_bytes()

    def require(self) -> None:
        """See that there is a repository.

        Raises:
            ReleaseError: release.not-begun.
        """
        if not self.exists:
            if self._broken:
                message = f"There is no readable timestamp metadata in {self.metadata}."
                raise ReleaseError("release.unknown", message, remedy="Restore <home>/tuf from your backup.")
            message = f"There is no release repository in {self.metadata} yet: nobody has signed its first root."
            remedy = "Finish the first ceremony: `lightship keys ceremony begin`, `sign`, `finish`."
            raise ReleaseError("release.not-begun", message, remedy=remedy)

    @property
    def _broken(self) -> bool:
        """Whether a repository that was begun has lost its head: the journal lies there until that is written."""
        return not self.exists and not self._journal.open and any(self.metadata.glob("*.root.json"))

    def in_force(self) -> Documents:
        """Root, targets and releases in force.

        Raises:
            ReleaseError: release.not-begun, release.unknown.
        """
        self.require()
        return Documents(self._files.root(), self._files.targets(), self._files.releases())

    def trusted(self, role: str) -> list[str]:
        """The ids of the keys that devices trust for a role.

        Raises:
            ReleaseError: release.not-begun, release.unknown.
        """
        return list(self.delegator(role).signed.get_delegated_role(role).keyids)

    def delegator(self, role: str) -> Metadata[Root] | Metadata[Targets]:
        """Whose metadata in force says who may sign for a role.

        Raises:
            ReleaseError: release.not-begun, release.unknown.
        """
        self.require()
        return self._files.targets() if role in (RELEASES, "director") else self._files.root()

    def released(self) -> list[Released]:
        """Every released bundle.

        Raises:
            ReleaseError: release.not-begun, release.unknown.
        """
        self.require()
        releases = self._files.releases().signed
        listed = (p for p in sorted(releases.targets) if p.startswith(_BUNDLES) and not p.endswith(TRANSPORT_SUFFIX))
        return [self._released(p, releases) for p in listed]

    def version(self, role: str) -> int | None:
        """The version of a role's metadata in force; None for the director, which has none of its own.

        Raises:
            ReleaseError: release.not-begun, release.unknown.
        """
        self.require()
        kinds: dict[str, type[Any]] = {"root": Root, "snapshot": Snapshot, "timestamp": Timestamp}
        if role == "director":
            return None
        return int(self._files.load(role, kinds.get(role, Targets)).signed.version)

    def expiries(self) -> dict[str, datetime]:
        """When each role's metadata expires.

        Raises:
            ReleaseError: release.not-begun, release.unknown.
        """
        self.require()
        return {role: self._files.expires(role) for role in LIFE}

    # Changes ----------------------------------------------------------------------------------------------------------

    def create(self) -> None:
        """Sign the first version of every role with keys that are all here, one each.

        Raises:
            ReleaseError: release.exists, release.keys.
            StorageError: storage.full, storage.unwritable.
        """
        if self.exists:
            raise ReleaseError("release.exists", f"There is a repository in {self.metadata} already.")
        self._make_folders()
        with self._lock(begun=False):
            pass  # which finishes what was cut, if anything was
        if self._files.complete:
            return
        signers = {role: self._keys.signer(role) for role in ROLES}
        documents = first_documents({role: RoleKeys.of([s.public_key]) for role, s in signers.items()})
        for role, document in documents.items():
            sign_with(document, [signers[role]])
        self.change(documents)

    def publish(
        self,
        path: str,
        bundle: bytes,
        *,
        packed: bytes | None = None,
        extra: Mapping[str, bytes] = _NO_TARGETS,
        signers: Sequence[Signer] = (),
    ) -> Released:
        """Release the bundle at `path`; the same bytes again are no change. Patches to old versions are de-listed.

        Args:
            path: of the bundle.
            bundle: its uncompressed bytes.
            packed: the same as it travels, where the caller has made that already.
            extra: further targets that go with it in the same commit, by path; e.g. deltas.
            signers: keys of the releases role that are not in the home.

        Raises:
            ReleaseError: release.exists for other bytes at the same path; release.keys.
            StorageError: storage.full, storage.unwritable; the release list stays as it was.
        """
        with self._lock():
            releases = self._files.releases()
            transports = _NO_TARGETS if packed is None else {path: packed}
            if self._list(releases, {path: bundle}, extra, transports):
                self._commit(releases, signers)
            return self._released(path, releases.signed)

    def revoke(self, path: str, *, signers: Sequence[Signer] = ()) -> None:
        """De-list the bundle at `path` with what goes with it: no device accepts it from its next refresh on.

        Raises:
            ReleaseError: release.unknown, release.keys.
            StorageError: storage.full, storage.unwritable; the release list stays as it was.
        """
        with self._lock():
            releases = self._files.releases()
            delist(releases.signed, path)
            self._commit(releases, signers)

    def draft(
        self,
        *,
        add: Mapping[str, bytes] = _NO_TARGETS,
        packed: Mapping[str, bytes] = _NO_TARGETS,
        extra: Mapping[str, bytes] = _NO_TARGETS,
        remove: Collection[str] = (),
    ) -> Metadata[Targets]:
        """The next release list, with nobody's signature yet; the files of what it adds are stored already.

        Args:
            add: bundles by path.
            packed: the same as they travel, where the caller has made that already.
            extra: further targets that go with them; e.g. deltas.
            remove: paths of bundles that are de-listed.

        Raises:
            ReleaseError: release.exists, release.unknown, release.not-begun.
            StorageError: storage.full, storage.unwritable.
        """
        with self._lock():
            releases = self._files.releases()
            self._list(releases, add, extra, packed)
            for path in remove:
                delist(releases.signed, path)
            releases.signed.version += 1
            releases.signed.expires = expiry(RELEASES)
            releases.signatures.clear()
            self._require_readable(releases)
            return releases

    def health(self, now: datetime) -> list[RoleHealth]:
        """Whether each role's metadata is renewed in time.

        Raises:
            ReleaseError: release.not-begun, release.unknown.
        """
        return judge(self.expiries(), {role: self.lacking(role) for role in LIFE}, now)

    def lacking(self, role: str, signers: Sequence[Signer] = ()) -> int:
        """How many signatures of `role` can't be made here.

        Raises:
            ReleaseError: release.not-begun, release.unknown.
        """
        spec = self.delegator(role).signed.get_delegated_role(role)
        here, _ = self._signers(role, spec.keyids, signers)
        return max(0, spec.threshold - len(here))

    def change(self, documents: Documents) -> list[str]:
        """Put signed documents into force together, with the snapshot and timestamp that list them; their roles.

        Where they are in force already, nothing is done.

        Raises:
            ReleaseError: release.stale, release.threshold, release.ceremony, release.keys; nothing has changed.
            StorageError: storage.full, storage.unwritable; who takes the lock next finishes it.
        """
        self._make_folders()
        with self._lock(begun=False):
            if self._broken:
                self.require()
            before = self.in_force() if self.exists else Documents()
            if documents.same_as(before):
                return []
            check(documents, before)
            self._check_stored(before, documents)
            self._journal.begin(self._files_of(before, documents), _retired(before, documents))
            self._journal.carry_out()
            return [role for role, _ in documents.items()]

    def renew(self, now: datetime) -> list[str]:
        """Re-sign every role past half of its life whose keys are here; the roles re-signed.

        Raises:
            ReleaseError: release.keys when an online key is missing; release.unknown, release.not-begun.
            StorageError: storage.full, storage.unwritable; what was in force stays so.
        """
        self.require()
        with self._lock():
            # Keys may be kept elsewhere: what is signed here must not lapse because of that.
            online = ("snapshot", "timestamp")
            here = [role for role in LIFE if role in online or not self.lacking(role)]
            due = [role for role in here if self._past_half(role, now)]
            if "root" in due:
                self._write_next(self._files.root(), "root")
            versions = {
                role: self._write_next(self._files.load(role, Targets), role)
                for role in ("targets", RELEASES)
                if role in due
            }
            if versions or "snapshot" in due:
                self._commit_snapshot(**versions)
            elif "timestamp" in due:
                self._commit_timestamp()
            return due

    def sign_apart(self, expires: datetime) -> dict[str, bytes]:
        """A snapshot and a timestamp of what is in force that live until `expires`, by file name, to be carried away.

        What is online goes beyond their versions first, so that a device that was given them finds its way back.

        Raises:
            ReleaseError: release.keys, release.unknown, release.not-begun.
            StorageError: storage.full, storage.unwritable; what was in force stays so.
        """
        with self._lock():
            snapshot, timestamp = self._files.load("snapshot", Snapshot), self._files.load("timestamp", Timestamp)
            self._sign_next(snapshot, "snapshot", expires)
            timestamp.signed.snapshot_meta = MetaFile(snapshot.signed.version)
            self._sign_next(timestamp, "timestamp", expires)
            self._commit_snapshot(ahead=1)
            name = f"{snapshot.signed.version}.snapshot.json"
            return {name: self._files.encode(snapshot), "timestamp.json": self._files.encode(timestamp)}

    # Signing and writing, under the lock ------------------------------------------------------------------------------

    def _load(self, role: str, kind: type[Signed]) -> Metadata[Signed]:
        return self._files.load(role, kind)

    def _past_half(self, role: str, now: datetime) -> bool:
        return self._files.expires(role) - now < LIFE[role] / 2

    def _list(
        self,
        releases: Metadata[Targets],
        bundles: Mapping[str, bytes],
        extra: Mapping[str, bytes],
        transports: Mapping[str, bytes],
    ) -> bool:
        """Store and list what is new, and drop the patches that lead to old versions; whether anything was new."""
        if not self._add(releases, bundles, extra, transports):
            return False
        listed = {p: target.hashes["sha256"] for p, target in releases.signed.targets.items()}
        for model in {path.split("/")[1] for path in bundles}:
            for stale in stale_patches(listed, model):
                releases.signed.targets.pop(stale, None)
        return True

    def _add(
        self,
        releases: Metadata[Targets],
        bundles: Mapping[str, bytes],
        extra: Mapping[str, bytes],
        transports: Mapping[str, bytes],
    ) -> bool:
        """Store and list what is not listed yet; whether anything was. `transports` are bundles packed already."""
        listed = releases.signed.targets
        wanted = {**bundles, **extra}
        for path, data in wanted.items():
            if path in listed and listed[path].hashes["sha256"] != sha256_hex(data):
                raise ReleaseError("release.exists", f"{path} is released with other bytes.")
        fresh = {path: data for path, data in wanted.items() if path not in listed}
        for path, data in fresh.items():
            stored = {path: data}
            if path in bundles:
                # A bundle is listed as itself, and travels packed.
                stored = {path + TRANSPORT_SUFFIX: transports.get(path) or pack_transport(data)}
                listed[path] = TargetFile.from_data(path, data, ["sha256"])
            for name, packed in stored.items():
                self._store_target(name, packed)
                listed[name] = TargetFile.from_data(name, packed, ["sha256"])
        return bool(fresh)

    def _commit(self, releases: Metadata[Targets], signers: Sequence[Signer] = ()) -> None:
        self._commit_snapshot(releases=self._write_next(releases, RELEASES, signers))

    def _commit_snapshot(self, releases: int | None = None, targets: int | None = None, *, ahead: int = 0) -> None:
        """Sign a snapshot of these versions, and a timestamp for it; `ahead` of them by that many versions."""
        snapshot = self._files.load("snapshot", Snapshot)
        for role, version in ((RELEASES, releases), ("targets", targets)):
            if version is not None:
                snapshot.signed.meta[f"{role}.json"] = MetaFile(version)
        snapshot.signed.version += ahead
        self._commit_timestamp(self._write_next(snapshot, "snapshot"), ahead=ahead)

    def _commit_timestamp(self, snapshot_version: int | None = None, *, ahead: int = 0) -> None:
        timestamp = self._files.load("timestamp", Timestamp)
        if snapshot_version is not None:
            timestamp.signed.snapshot_meta = MetaFile(snapshot_version)
        timestamp.signed.version += ahead
        self._write_next(timestamp, "timestamp")

    def _write_next(self, metadata: Metadata[Signed], role: str, signers: Sequence[Signer] = ()) -> int:
        self._sign_next(metadata, role, expiry(role), signers)
        self._require_readable(metadata)
        self._write_signed(metadata, role)
        return int(metadata.signed.version)

    def _require_readable(self, metadata: Metadata[Signed]) -> None:
        """See that devices will read it: one list that is too long would end all updates, its own repair included."""
        length = len(self._files.encode(metadata))
        if length > MAX_RELEASE_LIST:
            message = f"The list would be {length:,} bytes long; devices read {MAX_RELEASE_LIST:,}."
            raise ReleaseError("release.too-long", message, remedy="De-list old ones: `lightship release revoke`.")

    def _sign_next(
        self, metadata: Metadata[Signed], role: str, expires: datetime, signers: Sequence[Signer] = ()
    ) -> None:
        """Make it the next version, signed by the keys of its role that are here or given."""
        delegator = self.delegator(role).signed
        metadata.signed.version += 1
        metadata.signed.expires = expires
        metadata.signatures.clear()
        spec = delegator.get_delegated_role(role)
        here, problem = self._signers(role, spec.keyids, signers)
        sign_with(metadata, here)
        # What no device would believe must not take the place of what it does.
        if not verifies(delegator, role, metadata):
            raise self._short(role, spec.keyids, spec.threshold, len(here), problem)

    def _signers(self, role: str, keyids: Collection[str], given: Sequence[Signer]) -> tuple[list[Signer], str]:
        """The signers of these keys: those given, and those in the home."""
        found = {s.public_key.keyid: s for s in given if s.public_key.keyid in keyids}
        here, problem = self._keys.signers(role, keyids)
        found.update({s.public_key.keyid: s for s in here if s.public_key.keyid not in found})
        return list(found.values()), problem

    def _short(self, role: str, keyids: Collection[str], threshold: int, have: int, problem: str) -> ReleaseError:
        if problem:
            return ReleaseError("release.keys", problem, remedy="Restore it from your backup.")
        ids = ", ".join(k[:8] for k in keyids)
        message = f"Expected {threshold} of the {role} keys {ids}; {have} of them can sign here."
        if self._keys.has(role) and not have:
            message = f"The {role} key is not the one that devices were told to trust."
        return ReleaseError(
            "release.keys", message, remedy="Restore <home>/keys from your backup, or sign where the key is."
        )

    def _write_signed(self, metadata: Metadata[Signed], role: str) -> None:
        write_durably(self.metadata / self._file_name(role, metadata), self._files.encode(metadata))

    # Changes of keys, from a journal ----------------------------------------------------------------------------------

    def _files_of(self, before: Documents, documents: Documents) -> list[tuple[str, str]]:
        """The files that put documents into force, in the order in which they are written."""
        after = documents.over(before)
        root, targets = after.root, after.targets
        assert root is not None
        assert targets is not None
        self._require_director(targets)
        roots = [r.signed for r in (root, before.root) if r is not None]
        new: dict[str, Metadata[Any]] = {role: m for role, m in documents.items() if role != "root"}
        snapshot, timestamp = self._current("snapshot", Snapshot), self._current("timestamp", Timestamp)
        if new or not verifies(root.signed, "snapshot", snapshot):
            listed = {"targets.json": after.version("targets"), "releases.json": after.version(RELEASES)}
            snapshot.signed.meta.update({name: MetaFile(version) for name, version in listed.items()})
            new["snapshot"] = self._online_next(snapshot, "snapshot", roots)
        if "snapshot" in new or not verifies(root.signed, "timestamp", timestamp):
            timestamp.signed.snapshot_meta = MetaFile(snapshot.signed.version)
            new["timestamp"] = self._online_next(timestamp, "timestamp", roots)
        if documents.root is not None:
            # With the old keys' signatures beside the new ones', the old root leads to the same as the new.
            seamless = before.root is not None and all(
                verifies(before.root.signed, role, m) for role, m in new.items() if role != RELEASES
            )
            new = {**new, "root": root} if seamless else {"root": root, **new}
        return [(self._file_name(role, m), self._files.encode(m).decode()) for role, m in new.items()]

    def _check_stored(self, before: Documents, documents: Documents) -> None:
        """See that what would be listed can be fetched here, and that no path changes its bytes."""
        old = before.releases.signed.targets if before.releases is not None else {}
        new = documents.releases.signed.targets if documents.releases is not None else {}
        for path, target in new.items():
            digest = target.hashes.get("sha256", "")
            if path in old and old[path].hashes.get("sha256") != digest:
                raise ReleaseError("release.exists", f"{path} is released with other bytes.")
            # A bundle travels as the packed file beside it, which is listed too.
            travels = path + TRANSPORT_SUFFIX not in new
            if path not in old and travels and not self._stored(path, digest).exists():
                message = f"{path} with digest {digest[:16]} would be listed, and its file is not here."
                raise ReleaseError("release.ceremony", message, remedy="Begin with `lightship release` on this server.")

    def _current(self, role: str, kind: type[Signed]) -> Metadata[Signed]:
        """What is in force, or a version 0 for the first one to follow."""
        if self.exists:
            return self._files.load(role, kind)
        first = Metadata(kind(expires=expiry(role)))
        first.signed.version = 0
        return first

    def _online_next(self, metadata: Metadata[Signed], role: str, roots: Sequence[Root]) -> Metadata[Signed]:
        """The next version of an online role, signed for the new root (the first) and, if it can be, the old one."""
        metadata.signed.version += 1
        metadata.signed.expires = expiry(role)
        metadata.signatures.clear()
        here, problem = self._keys.signers(role, {k for root in roots for k in root.roles[role].keyids})
        sign_with(metadata, here)
        if not verifies(roots[0], role, metadata):
            spec = roots[0].roles[role]
            raise self._short(role, spec.keyids, spec.threshold, len(here), problem)
        return metadata

    def _require_director(self, targets: Metadata[Targets]) -> None:
        keyids = targets.signed.get_delegated_role("director").keyids
        if not self._keys.signers("director", keyids)[0]:
            message = "The new director key is not here, and devices could not be told anything any more."
            raise ReleaseError("release.keys", message, remedy="Begin with `lightship keys rotate director`.")

    # Files ------------------------------------------------------------------------------------------------------------

    def _file_name(self, role: str, metadata: Metadata[Any]) -> str:
        return "timestamp.json" if role == "timestamp" else f"{metadata.signed.version}.{role}.json"

    def _make_folders(self) -> None:
        try:
            self.metadata.mkdir(parents=True, exist_ok=True)
            self.targets.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise storage_error(e, self.metadata) from e

    def _store_target(self, path: str, data: bytes) -> None:
        file = self._stored(path, sha256_hex(data))
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise storage_error(e, file.parent) from e
        sweep(file.parent)
        write_durably(file, data)

    def _stored(self, path: str, digest: str) -> Path:
        folder, _, name = path.rpartition("/")
        return self.targets / folder / f"{digest}.{name}"

    def _released(self, path: str, releases: Targets) -> Released:
        target = releases.targets[path]
        transport = releases.targets[path + TRANSPORT_SUFFIX]
        return Released(path, target.hashes["sha256"], target.length, transport.length)

    @contextmanager
    def _lock(self, *, begun: bool = True) -> Iterator[None]:
        """One writer at a time; who gets the lock finishes what the last one could not."""
        if begun:
            self.require()
        with (self.metadata / ".lock").open("w") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            if self._journal.open:
                self._journal.carry_out()
            for folder in (self.metadata, self._journal.path.parent, self._keys.folder):
                sweep(folder)
            yield


def _retired(before: Documents, documents: Documents) -> dict[str, list[str]]:
    """The keys that are believed before a change and not after it, by role."""
    if before.root is None:
        return {}
    after = documents.over(before)
    gone = {role: before.role_keys(role).keyids - after.role_keys(role).keyids for role in ROLES}
    return {role: sorted(keyids) for role, keyids in gone.items() if keyids}


def delist(releases: Targets, path: str) -> None:
    """Take a bundle, its transport file and every patch from or to it off the list.

    Raises:
        ReleaseError: release.unknown.
    """
    if path not in releases.targets:
        raise ReleaseError("release.unknown", f"{path} is not released.")
    short, model = releases.targets[path].hashes["sha256"][:16], path.split("/")[1]
    ends = {p: p.rpartition("/")[2].removesuffix(DELTA_SUFFIX).split("-") for p in releases.targets}
    patches = [p for p, digests in ends.items() if p.startswith(f"deltas/{model}/") and short in digests]
    for name in (path, path + TRANSPORT_SUFFIX, *patches):
        releases.targets.pop(name, None)
