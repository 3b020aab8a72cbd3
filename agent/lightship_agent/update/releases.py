"""Update: what may run (the TUF release plane) and what shall run (the signed assignment).

Rules:
* the TUF client is always bootstrapped with the root that enrolment pinned, never with what lies in the cache;
* an assignment counts only if the verified top-level targets name its key as `director`, and if the verified
  release list holds the same path, digest and length;
* what was once accepted is the floor of what will be, whatever becomes of the cache (`floors`); the cache itself is
  synced after a refresh, which the TUF client does not do;
* one look at a time per folder: a lock file keeps the agent and an operator's command apart;
* expired metadata stops updates, never inference: errors here end an attempt and touch nothing that serves.

Source: The Update Framework specification 1.0; DSSE 1.0.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Final

import httpx
from securesystemslib.dsse import Envelope
from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
    SlowRetrievalError,
    UnsignedMetadataError,
)
from tuf.api.metadata import Root, TargetFile
from tuf.ngclient.config import UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater

from lightship_agent.contract.assignment import (
    DIRECTOR,
    MAX_ENVELOPE,
    PAYLOAD_TYPE,
    Assignment,
    Beside,
    parse_assignment,
)
from lightship_agent.contract.codes import LightshipError, LinkError, StorageError, TrustError
from lightship_agent.contract.device_api import MAX_RELEASE_LIST
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.files import storage_error, sync_folder

from .floors import FloorFile, Floors, Stated, key_set
from .metadata_fetcher import MetadataFetcher
from .released import ReleasedFile

#: Largest metadata files, in bytes, and how far a search may go: targets → releases → one of its bins is three.
LIMITS: Final = UpdaterConfig(
    # Counted from the pinned root, not from the last one seen: a small number would end a device's life.
    max_root_rotations=256,
    max_delegations=32,
    root_max_length=128_000,
    timestamp_max_length=16_000,
    snapshot_max_length=200_000,
    targets_max_length=MAX_RELEASE_LIST,
)
_LOCK: Final = ".lock"
_HISTORY: Final = "root_history"
_Stamps = dict[Path, tuple[int, int]]


class Releases:
    """One refreshed view of the repository. Make a new one for every look."""

    def __init__(
        self,
        folder: Path,
        source: FetcherInterface | httpx.Client,
        metadata_url: str,
        root: bytes,
        *,
        now: datetime | None = None,
        lock_seconds: float = 30.0,
    ) -> None:
        """Refresh the metadata under `folder` from `metadata_url`, trusting `root`.

        Args:
            folder: the metadata cache and the version floors.
            source: where bytes come from: our HTTP client, or any fetcher of the TUF client.
            metadata_url: the address that `source` knows the metadata under.
            root: the pinned root metadata.
            now: the time that expiry is judged by; the system's when None.
            lock_seconds: how long to wait for another look at the same folder.

        Raises:
            TrustError: trust.signature, trust.expired, trust.rollback, trust.digest, trust.metadata.
            LinkError: link.unreachable, link.slow.
            StorageError: storage.full, storage.unwritable, storage.busy.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise storage_error(e, folder) from e
        self._folder = folder
        self._lock_seconds = lock_seconds
        fetcher = MetadataFetcher(source) if isinstance(source, httpx.Client) else source
        with self._exclusive():
            before = self._stamps()
            self._updater = Updater(str(folder), metadata_url, fetcher=fetcher, config=LIMITS, bootstrap=root)
            # The client offers no public way to tell it the time, nor to ask what it verified: reading that back
            # from the cache would trust the disk where we can trust memory.
            self._trusted = self._updater._trusted_set  # noqa: SLF001 - see above
            if now is not None:
                self._trusted.reference_time = now
            try:
                self._updater.refresh()
                FloorFile(folder).accept(self._seen(sha256_hex(root)))
            except BaseException:
                # What had verified before that went wrong shall outlive a cut as well.
                with suppress(OSError):
                    self._sync(before)
                raise
            self._sync(before)

    @property
    def expires(self) -> dict[str, datetime]:
        """When each role that was looked at so far expires."""
        trusted = self._trusted
        found = {"root": trusted.root.expires, "timestamp": trusted.timestamp.expires}
        found["snapshot"] = trusted.snapshot.expires
        for name in trusted.snapshot.meta:
            role = name.removesuffix(".json")
            if role in trusted:
                found[role] = trusted[role].expires
        return found

    @property
    def director(self) -> str:
        """The name of the key set that may sign assignments.

        Raises:
            TrustError: trust.signature where there is none.
        """
        try:
            found = self._trusted.targets.get_delegated_role(DIRECTOR)
        except ValueError as e:
            raise TrustError("trust.signature", f"Nobody may sign assignments: {e}.") from e
        return key_set(found.keyids, found.threshold)

    @property
    def consistent(self) -> bool:
        """Whether the repository keeps targets under names that hold their digest."""
        return bool(self._trusted.root.consistent_snapshot)

    def target(self, path: str) -> TargetFile | None:
        """The verified target at `path`, with whatever digests it is listed under; None where nobody lists it.

        Raises:
            TrustError: those of the constructor, for the delegated roles that were looked at.
            LinkError: link.unreachable, link.slow.
            StorageError: storage.full, storage.unwritable, storage.busy.
        """
        with self._exclusive():
            before = self._stamps()
            found = self._updater.get_targetinfo(path)
            self._sync(before)
            return found

    def find(self, path: str) -> ReleasedFile:
        """The released file at `path`.

        Raises:
            TrustError: trust.not-released, and those of `target`.
            LinkError: link.unreachable, link.slow.
            StorageError: storage.full, storage.unwritable, storage.busy.
        """
        found = self.target(path)
        if found is None or "sha256" not in found.hashes:
            raise TrustError("trust.not-released", f"{path!r} is not in the signed release list.")
        return ReleasedFile(path=path, sha256=found.hashes["sha256"], length=found.length, prefixed=self.consistent)

    def open_assignment(self, data: bytes) -> Assignment:
        """The assignment in a DSSE envelope that the director signed.

        Raises:
            TrustError: trust.signature, trust.metadata.
        """
        if len(data) > MAX_ENVELOPE:
            raise TrustError("trust.metadata", f"Assignment: expected at most {MAX_ENVELOPE} bytes.")
        try:
            envelope = Envelope.from_dict(json.loads(data))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise TrustError("trust.metadata", f"The assignment is not a DSSE envelope: {e}.") from e
        if envelope.payload_type != PAYLOAD_TYPE:
            raise TrustError("trust.metadata", f"Unexpected payload type {str(envelope.payload_type)[:80]!r}.")
        try:
            self._trusted.targets.verify_delegate(DIRECTOR, envelope.pae(), envelope.signatures)
        except (UnsignedMetadataError, ValueError) as e:
            raise TrustError("trust.signature", f"The assignment is not signed by the director: {e}.") from e
        return parse_assignment(envelope.payload)

    def check_released(self, assignment: Assignment | Beside) -> ReleasedFile:
        """The release an assignment or a companion in it names, with the same digest and length.

        Raises:
            TrustError: trust.not-released.
        """
        release = self.find(assignment.path)
        if (release.sha256, release.length) != (assignment.sha256, assignment.length):
            message = f"{assignment.path!r}: the assignment's digest is not the released one."
            raise TrustError("trust.not-released", message)
        return release

    def _seen(self, anchor: str) -> Floors:
        """The versions that this refresh verified, and the key sets that stated them."""
        root, timestamp, snapshot = self._trusted.root, self._trusted.timestamp, self._trusted.snapshot
        own = {"timestamp": timestamp.version, "snapshot": timestamp.snapshot_meta.version}
        listed = {name.removesuffix(".json"): meta.version for name, meta in snapshot.meta.items()}
        return Floors(
            anchor=anchor,
            root=root.version,
            by_timestamp=Stated(keys=_keys_of(root, "timestamp"), versions=own),
            by_snapshot=Stated(keys=_keys_of(root, "snapshot"), versions=listed),
        )

    def _stamps(self) -> _Stamps:
        """When each cached file was last written, and its size."""
        found: _Stamps = {}
        for path in (*self._folder.glob("*.json"), *(self._folder / _HISTORY).glob("*.json")):
            if not path.is_symlink():
                facts = path.stat()
                found[path] = (facts.st_mtime_ns, facts.st_size)
        return found

    def _sync(self, before: _Stamps) -> None:
        """Make durable what the client wrote: it renames without syncing, and a cut would leave empty files."""
        changed = [path for path, stamp in self._stamps().items() if before.get(path) != stamp]
        for path in changed:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        for folder in sorted({path.parent for path in changed}):
            sync_folder(folder)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Hold the folder's lock, and say what went wrong in our own words."""
        try:
            descriptor = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as e:
            raise storage_error(e, self._folder) from e
        try:
            self._wait(descriptor)
            try:
                yield
            except (RepositoryError, DownloadError, OSError, ValueError) as e:
                raise _explain(e) from e
        finally:
            os.close(descriptor)

    def _wait(self, descriptor: int) -> None:
        end = time.monotonic() + self._lock_seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as e:
                if not isinstance(e, BlockingIOError):
                    raise storage_error(e, self._folder) from e
                if time.monotonic() > end:
                    message = f"Another program has been at {self._folder} for {self._lock_seconds:g} s."
                    raise StorageError("storage.busy", message, remedy="Wait for it to end and try again.") from e
            time.sleep(0.02)


def _keys_of(root: Root, role: str) -> str:
    found = root.roles[role]
    return key_set(found.keyids, found.threshold)


def _explain(e: Exception) -> LightshipError:
    """Which attack, or which fault, an error of the TUF client stands for."""
    text = f"{type(e).__name__}: {e}."
    if isinstance(e, UnsignedMetadataError):
        return TrustError("trust.signature", text)
    if isinstance(e, ExpiredMetadataError):
        return TrustError("trust.expired", text, remedy="Updates stop until the server signs anew; serving goes on.")
    if isinstance(e, BadVersionNumberError):
        return TrustError("trust.rollback", text)
    if isinstance(e, LengthOrHashMismatchError | DownloadLengthMismatchError):
        return TrustError("trust.digest", text)
    if isinstance(e, RepositoryError):
        return TrustError("trust.metadata", text)
    if isinstance(e, SlowRetrievalError):
        return LinkError("link.slow", text)
    if isinstance(e, DownloadError):
        return LinkError("link.unreachable", text)
    if isinstance(e, OSError):
        return storage_error(e, Path(e.filename or "the metadata cache"))
    return TrustError("trust.metadata", text)
