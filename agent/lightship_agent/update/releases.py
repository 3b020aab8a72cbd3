"""Update: what may run (the TUF release plane) and what shall run (the signed assignment).

Rules:
* the TUF client is always bootstrapped with the root that enrolment pinned, never with what lies in the cache;
* an assignment counts only if the verified top-level targets name its key as `director`, and if the verified
  release list holds the same path, digest and length;
* expired metadata stops updates, never inference: errors here end an attempt and touch nothing that serves.

Source: The Update Framework specification 1.0; DSSE 1.0.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

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
from tuf.api.metadata import Metadata, TargetFile, Targets
from tuf.ngclient.config import UpdaterConfig
from tuf.ngclient.updater import Updater

from lightship_agent.contract.assignment import DIRECTOR, MAX_ENVELOPE, PAYLOAD_TYPE, Assignment, parse_assignment
from lightship_agent.contract.codes import LightshipError, LinkError, TrustError
from lightship_agent.files import storage_error

from .metadata_fetcher import MetadataFetcher


@dataclass(frozen=True)
class ReleasedFile:
    """A target of the verified release list."""

    path: str
    sha256: str
    length: int

    @property
    def url_path(self) -> str:
        """Where a consistent-snapshot repository keeps it."""
        folder, _, name = self.path.rpartition("/")
        return f"{folder}/{self.sha256}.{name}"


class Releases:
    """One refreshed view of the repository. Make a new one for every look."""

    def __init__(self, folder: Path, http: httpx.Client, metadata_url: str, root: bytes) -> None:
        """Refresh the metadata under `folder` from `metadata_url`, trusting `root`.

        Raises:
            TrustError: trust.signature, trust.expired, trust.rollback, trust.digest, trust.metadata.
            LinkError: link.unreachable, link.slow.
            StorageError: storage.full, storage.unwritable.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise storage_error(e, folder) from e
        self._folder = folder
        config = UpdaterConfig(
            max_root_rotations=32,
            max_delegations=8,
            root_max_length=64_000,
            timestamp_max_length=8_000,
            snapshot_max_length=200_000,
            targets_max_length=4_000_000,
        )
        try:
            self._updater = Updater(
                str(folder), metadata_url, fetcher=MetadataFetcher(http), config=config, bootstrap=root
            )
            self._updater.refresh()
        except (RepositoryError, DownloadError, OSError, ValueError) as e:
            raise _explain(e) from e

    def find(self, path: str) -> ReleasedFile:
        """The released file at `path`.

        Raises:
            TrustError: trust.not-released, and those of the constructor for the delegated role.
        """
        try:
            found: TargetFile | None = self._updater.get_targetinfo(path)
        except (RepositoryError, DownloadError, OSError, ValueError) as e:
            raise _explain(e) from e
        if found is None or "sha256" not in found.hashes:
            raise TrustError("trust.not-released", f"{path!r} is not in the signed release list.")
        return ReleasedFile(path=path, sha256=found.hashes["sha256"], length=found.length)

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
        targets = Metadata[Targets].from_file(str(self._folder / "targets.json")).signed
        try:
            targets.verify_delegate(DIRECTOR, envelope.pae(), envelope.signatures)
        except (UnsignedMetadataError, ValueError) as e:
            raise TrustError("trust.signature", f"The assignment is not signed by the director: {e}.") from e
        return parse_assignment(envelope.payload)

    def check_released(self, assignment: Assignment) -> ReleasedFile:
        """The release an assignment names, with the same digest and length.

        Raises:
            TrustError: trust.not-released.
        """
        release = self.find(assignment.path)
        if (release.sha256, release.length) != (assignment.sha256, assignment.length):
            message = f"{assignment.path!r}: the assignment's digest is not the released one."
            raise TrustError("trust.not-released", message)
        return release


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
