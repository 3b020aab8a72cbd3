"""Release: signed metadata as files.

    <home>/tuf/metadata/timestamp.json             names the snapshot in force
    <home>/tuf/metadata/N.snapshot.json            names the targets and releases in force
    <home>/tuf/metadata/N.targets.json, N.releases.json, N.root.json

Rules: what is in force is what timestamp leads to, and the newest root; a version that nobody leads to was cut off and
is overwritten by the next one of its number; versions are never removed, for a client may still be walking to them.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, TypeVar

from securesystemslib.exceptions import StorageError as UnreadableFileError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONSerializer

from lightship_agent.contract.codes import ReleaseError

LIFE: Final[dict[str, timedelta]] = {
    "root": timedelta(days=365),
    "targets": timedelta(days=365),
    "releases": timedelta(days=90),
    "snapshot": timedelta(days=7),
    "timestamp": timedelta(days=7),
}
RELEASES: Final = "releases"
Signed = TypeVar("Signed", Root, Targets, Snapshot, Timestamp)
_SERIALIZER: Final = JSONSerializer(compact=True)


def expiry(role: str) -> datetime:
    """When metadata of `role` that is signed now will expire."""
    return datetime.now(UTC).replace(microsecond=0) + LIFE[role]


class MetadataFiles:
    """The folder of metadata."""

    def __init__(self, folder: Path) -> None:
        """Nothing is read yet."""
        self.folder = folder

    @property
    def complete(self) -> bool:
        """Whether a first set is in force; its timestamp is written last."""
        return (self.folder / "timestamp.json").exists()

    def root(self) -> Metadata[Root]:
        """The newest root.

        Raises:
            ReleaseError: release.unknown.
        """
        return self.load("root", Root)

    def targets(self) -> Metadata[Targets]:
        """The top-level targets in force.

        Raises:
            ReleaseError: release.unknown.
        """
        return self.load("targets", Targets)

    def releases(self) -> Metadata[Targets]:
        """The release list in force.

        Raises:
            ReleaseError: release.unknown.
        """
        return self.load(RELEASES, Targets)

    def load(self, role: str, _kind: type[Signed]) -> Metadata[Signed]:
        """The version in force.

        Raises:
            ReleaseError: release.unknown.
        """
        try:
            return Metadata[Signed].from_file(str(self.folder / self.name(role)))
        except (OSError, ValueError, KeyError, UnreadableFileError, DeserializationError) as e:
            message = f"No readable {role} metadata: {e}."
            raise ReleaseError("release.unknown", message, remedy="Restore <home>/tuf from your backup.") from e

    def name(self, role: str) -> str:
        """The file of the version in force."""
        if role == "timestamp":
            return "timestamp.json"
        if role == "root":
            newest = max(int(p.name.partition(".")[0]) for p in self.folder.glob("*.root.json"))
            return f"{newest}.root.json"
        if role == "snapshot":
            return f"{self.load('timestamp', Timestamp).signed.snapshot_meta.version}.snapshot.json"
        return f"{self.load('snapshot', Snapshot).signed.meta[f'{role}.json'].version}.{role}.json"

    def expires(self, role: str) -> datetime:
        """When the version in force expires.

        Raises:
            ReleaseError: release.unknown.
        """
        if role == "root":
            return self.root().signed.expires
        if role == "snapshot":
            return self.load(role, Snapshot).signed.expires
        if role == "timestamp":
            return self.load(role, Timestamp).signed.expires
        return self.load(role, Targets).signed.expires

    def encode(self, metadata: Metadata[Signed]) -> bytes:
        """As it is served."""
        return metadata.to_bytes(_SERIALIZER)
