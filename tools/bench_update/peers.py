"""Bench update: the clients that are compared, each in a process of its own that does one thing when told, and says
what it cost.

    ours     the agent's `Releases` and `download` over its HTTP client
    stock    python-tuf's own `Updater` with its own fetcher and downloader

Rules: both see the same repository over the same plain HTTP, look up the same two targets, and end with the same
verified bytes on disk; a line of JSON in, a line out; CPU is that of the whole process, imports done before.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from lightship_agent.contract.transport import TRANSPORT_SUFFIX
from lightship_agent.update.download import download
from lightship_agent.update.releases import Releases

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True)
class Job:
    """What a client is told: look, and also fetch what the list says, with the metadata cache in `folder`."""

    folder: str
    root: str
    metadata_url: str
    targets_url: str
    path: str
    fetch: bool = False


@dataclass(frozen=True)
class Cost:
    """Seconds."""

    cpu: float
    wall: float


def ours(job: Job) -> bytes:
    """The agent's client; the transport file, or nothing."""
    with _client() as http:
        releases = Releases(Path(job.folder), http, job.metadata_url, Path(job.root).read_bytes())
        releases.find(job.path)
        packed = releases.find(job.path + TRANSPORT_SUFFIX)
        if not job.fetch:
            return b""
        part = Path(job.folder) / "part"
        data = download(http, job.targets_url + packed.url_path, part, packed.length)
        if hashlib.sha256(data).hexdigest() != packed.sha256:
            raise ValueError("wrong bytes")
        return data


def stock(job: Job) -> bytes:
    """The same with what comes with python-tuf."""
    from tuf.ngclient import Updater

    target_folder = Path(job.folder) / "targets"
    target_folder.mkdir(exist_ok=True)
    updater = Updater(
        job.folder, job.metadata_url, str(target_folder), job.targets_url, bootstrap=Path(job.root).read_bytes()
    )
    updater.refresh()
    updater.get_targetinfo(job.path)
    packed = updater.get_targetinfo(job.path + TRANSPORT_SUFFIX)
    if packed is None:
        raise ValueError("not listed")
    return Path(updater.download_target(packed)).read_bytes() if job.fetch else b""


def _client() -> httpx.Client:
    """The agent's rules, without the certificates that plain HTTP has no use for."""
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    headers = {"Accept-Encoding": "identity"}
    return httpx.Client(verify=bare, timeout=15, follow_redirects=False, headers=headers, trust_env=False)


PEERS: dict[str, Callable[[Job], bytes]] = {"ours": ours, "stock": stock}


class Peer:
    """A client in a process of its own."""

    def __init__(self, name: str) -> None:
        """Start it."""
        command = [sys.executable, "-m", "bench_update.peers", name]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def does(self, job: Job) -> Cost:
        """Have it do a job; what that cost."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(vars(job)) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            message = "a client died; what it said is above"
            raise RuntimeError(message)
        return Cost(**json.loads(line))

    def close(self) -> None:
        """Let it end."""
        self._process.communicate()


@contextmanager
def both() -> Iterator[dict[str, Peer]]:
    """Both clients."""
    peers = {name: Peer(name) for name in PEERS}
    try:
        yield peers
    finally:
        for peer in peers.values():
            peer.close()


def copy_of(folder: Path, name: str) -> Path:
    """A fresh copy of a client's folder, for an attempt that changes it."""
    target = folder.parent / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target, symlinks=True)
    return target


def main(name: str) -> int:
    """Do what each line says."""
    act = PEERS[name]
    for line in sys.stdin:
        job = Job(**json.loads(line))
        cpu, wall = time.process_time(), time.perf_counter()
        act(job)
        cost: dict[str, Any] = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        print(json.dumps(cost), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
