"""A device, as far as releases go: the agent's own client over real HTTPS, with one cache for all its looks."""

from __future__ import annotations

from pathlib import Path

from tests.control_plane.things import Served, enrolled

from lightship_agent.contract.codes import StorageError, TrustError
from lightship_agent.contract.device_api import Paths
from lightship_agent.files import write_durably
from lightship_agent.link.client import ControlPlane
from lightship_agent.update.releases import Releases


class Client:
    """It looks again and again."""

    def __init__(self, served: Served, folder: Path) -> None:
        self.identity = enrolled(served.home, served.url, folder, "pump-1")
        self.plane = ControlPlane(self.identity)
        self.cache = folder / "tuf"

    def look(self) -> Releases:
        url = f"{self.plane.server}{Paths.METADATA}"
        return Releases(self.cache, self.plane.http, url, self.identity.tuf_root)

    def sees(self, path: str) -> str:
        """The digest of the release at `path`, or the code of the refusal."""
        try:
            return self.look().find(path).sha256
        except TrustError as e:
            return e.code


class CuttableDisk:
    """Writes as ever, until as many writes were made as are allowed."""

    def __init__(self) -> None:
        self.honest = write_durably
        self.wrote, self.allowed = 0, -1

    def __call__(self, path: Path, data: bytes, *, mode: int = 0o644) -> None:
        if self.wrote == self.allowed:
            raise StorageError("storage.full", "No space left.")
        self.wrote += 1
        self.honest(path, data, mode=mode)

    def allow(self, writes: int) -> None:
        self.wrote, self.allowed = 0, writes
