"""A client under test for each story: the agent's own, or any other that has the same command line.

`TUF_CLIENT=path/to/client pytest tests/conformance` judges that executable; by default the command of this repository
runs in this process, which is the same code and saves some hundred starts.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.conformance.simulator import Repository, Server, running
from tuf.api.metadata import Metadata

from tuf_client.__main__ import main


class Client:
    """What can be seen of a client: its exit status, what it keeps, what it downloads, what it asks for."""

    def __init__(self, folder: Path, url: str, repository: Repository) -> None:
        self.metadata = folder / "metadata"
        self.downloads = folder / "downloads"
        self.repository = repository
        self._url = url
        self._root = folder / "initial-root"
        self.metadata.mkdir(parents=True)
        self.downloads.mkdir()

    def init(self, root: bytes = b"") -> int:
        self._root.write_bytes(root or self.repository.published["root"][0][1])
        return self._run(["--metadata-dir", str(self.metadata), "init", str(self._root)])

    def refresh(self) -> int:
        self.repository.asked.clear()
        return self._run([*self._where(), "refresh"])

    def download(self, *names: str) -> int:
        self.repository.asked.clear()
        wanted = [part for name in names for part in ("--target-name", name)]
        place = ["--target-dir", str(self.downloads), "--target-base-url", f"{self._url}/targets/"]
        return self._run([*self._where(), *wanted, *place, "download"])

    @property
    def asked(self) -> list[str]:
        """What the last command asked for."""
        return self.repository.asked

    @property
    def trusted(self) -> dict[str, int]:
        """The version of every role it keeps."""
        found = sorted(self.metadata.glob("*.json"))
        return {p.name.removesuffix(".json"): Metadata.from_file(str(p)).signed.version for p in found}

    @property
    def has(self) -> list[bytes]:
        """What it downloaded, in the order of time."""
        found = [p for p in self.downloads.rglob("*") if p.is_file() and not p.name.startswith(".")]
        return [p.read_bytes() for p in sorted(found, key=lambda p: p.stat().st_mtime_ns)]

    def _where(self) -> list[str]:
        return ["--metadata-dir", str(self.metadata), "--metadata-url", f"{self._url}/metadata/"]

    def _run(self, arguments: list[str]) -> int:
        other = os.environ.get("TUF_CLIENT")
        if other:
            return subprocess.run([str(Path(other).resolve()), *arguments], check=False).returncode
        try:
            return main(arguments)
        except SystemExit as e:
            return int(e.code or 0)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with running() as opened:
        yield opened


@pytest.fixture
def client_of(server: Server, tmp_path: Path) -> Callable[[Repository], Client]:
    """Makes a client of a repository, which trusts its first root."""

    def make(repository: Repository) -> Client:
        client = Client(tmp_path / "client", server.serve(repository), repository)
        assert client.init() == 0
        return client

    return make
