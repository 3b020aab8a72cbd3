"""Bench update: 120 MB over a link that dies every 5 MB: the bytes on the wire, and how often a 404 is asked for."""

from __future__ import annotations

import hashlib
import os
import ssl
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from lightship_agent.contract.codes import LinkError
from lightship_agent.link.client import open_client
from lightship_agent.update.download import download

from .wire import metered

SIZE: Final = 120_000_000
DIES_AFTER: Final = 5_000_000
ABSENT: Final = "absent"


@dataclass(frozen=True)
class Crossing:
    """What one download cost."""

    size: int
    wire: int
    connections: int
    wall: float
    cpu: float
    asked_for_absent: int

    @property
    def share(self) -> float:
        """Bytes on the wire, of the size of the file."""
        return self.wire / self.size

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "share": self.share}


def measure(folder: Path) -> Crossing:
    """Download it. The waits between attempts, which are random and up to 30 s, are left out."""
    folder.mkdir(parents=True)
    source = folder / "file"
    source.write_bytes(os.urandom(SIZE))
    asked: Counter[str] = Counter()

    async def answer(request: Request) -> Response:
        name = request.path_params["name"]
        asked[name] += 1
        return FileResponse(source) if name == source.name else Response(status_code=404)

    server = uvicorn.Server(uvicorn.Config(Starlette(routes=[Route("/{name}", answer)]), port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, name="files")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.02)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        with metered(url, DIES_AFTER) as link, open_client(ssl.create_default_context()) as http:
            wall, cpu = time.perf_counter(), time.process_time()
            data = download(http, f"{link.url}/file", folder / "part", SIZE, pause=lambda _seconds: None)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            assert hashlib.sha256(data).digest() == hashlib.sha256(source.read_bytes()).digest()
            found = Crossing(SIZE, link.total, link.connections, wall, cpu, 0)
            try:
                download(http, f"{link.url}/{ABSENT}", folder / "absent", SIZE, pause=lambda _seconds: None)
            except LinkError:
                return Crossing(**{**asdict(found), "asked_for_absent": asked[ABSENT]})
    finally:
        server.should_exit = True
        thread.join()
    raise AssertionError("an absent file was downloaded")
