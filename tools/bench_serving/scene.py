"""Bench serving: a control plane with its broker, and real agents before it, each as an operator would start them.

Rules: the agent is the program of our own environment, started by its command with its defaults, but for its ports;
enrolled with a token, assigned a released model, and reporting over MQTT. What it answers is asked from outside only.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import numpy.typing as npt

from crash_test.plane import Faults, Plane
from demo.stage import Stage
from lightship.home import Home
from lightship.storage.models import ModelVersion
from lightship_agent.contract.wire import sha256_hex

from . import cast, models
from .load import Client, LoadError, Target
from .process import end
from .venvs import Environment

_PATIENCE: Final = 180.0


class Scene:
    """The control plane that runs, and the agents."""

    def __init__(self, stage: Stage, home: Home, ours: Environment, made: Path) -> None:
        self._stage = stage
        self._home = home
        self._ours = ours
        self._made = made
        self._plane = Plane(home, stage.addresses["devices"], Faults(_nobody))
        self._released: dict[tuple[str, int], ModelVersion] = {}

    def release(self, name: str, version: int) -> ModelVersion:
        """That version of that model, released; once."""
        key = (name, version)
        if key not in self._released:
            made = models.reversioned(self._made, name, version)
            row = ModelVersion(
                model=name, version=version, run_id="run", state="released", digest=sha256_hex(made.bundle),
                length=len(made.bundle), metrics={}, created_at=0, released_at=0,
            )  # fmt: skip
            self._home.artifacts.put(made.bundle)
            self._home.releases.publish(row.path, made.bundle)
            self._released[key] = row
        return self._released[key]

    def assign(self, device: str, name: str, version: int) -> str:
        """Have the director assign it; its digest."""
        row = self.release(name, version)
        self._plane.versions[version] = row
        self._plane.assign(device, version)
        return row.digest

    @contextmanager
    def agent(self, device: str, **settings: str) -> Iterator[Agent]:
        """An enrolled agent that runs until the end of the block; `settings` go by their short names."""
        folder = self._stage.folder / device
        if not folder.exists():
            self._plane.enrol(folder, device)
        agent = Agent(self._ours, device, folder)
        try:
            agent.start(**settings)
            yield agent
        finally:
            agent.stop()

    @contextmanager
    def serving(self, device: str, name: str, version: int = 1, **settings: str) -> Iterator[Agent]:
        """The same, and it has been assigned a model, and serves it."""
        with self.agent(device, **({"POLL_SECONDS": "1"} | settings)) as agent:
            digest = self.assign(device, name, version)
            agent.settles(digest)
            if "POLL_SECONDS" not in settings:  # it was to look soon, once
                agent.restart(**settings)
                agent.settles(digest)
            yield agent


async def _nobody(*_: Any) -> None:
    return


class Agent:
    """One agent."""

    def __init__(self, ours: Environment, device: str, folder: Path) -> None:
        self._ours = ours
        self.device = device
        self.state = folder
        self.port = cast.free_ports(1)
        self.socket = Path(f"/tmp/bench-{self.port}.sock")  # a path of a Unix socket is short
        self.frames = Path(f"/tmp/bench-{self.port}.frames")
        self.log = folder.with_name(f"{device}.log")
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30, trust_env=False)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process that was started last."""
        assert self._process is not None, "the agent was not started"
        return self._process

    def start(self, **settings: str) -> None:
        """Start it; nothing is waited for."""
        given = {
            "STATE_DIR": str(self.state), "HTTP_PORT": str(self.port), "SOCKET": str(self.socket),
            "FRAMES_SOCKET": str(self.frames), **settings,
        }  # fmt: skip
        env = cast.base_environment() | {f"LIGHTSHIP_AGENT_{k}": v for k, v in given.items()}
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                [str(self._ours.folder / "bin" / "lightship-agent"), "run"],
                env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def restart(self, **settings: str) -> None:
        """Stop it, and start it again."""
        end(self.process, 30)
        self.start(**settings)

    def stop(self) -> None:
        """Stop it, for good."""
        if self._process is not None:
            end(self._process, 30)
        self._http.close()

    def target(self, client: Client, request: bytes, what: str, face: str = "http") -> Target:
        """Itself, asked by one of its faces: http, unix or frames."""
        where = {"http": f"127.0.0.1:{self.port}", "unix": str(self.socket), "frames": str(self.frames)}[face]
        path = client.request(f"{self.device}-{what}-{face}", request)
        return Target(where, path, (self.process.pid,), "frames" if face == "frames" else "http")

    def first_answer(self, model: str, rows: npt.NDArray[np.float32]) -> bytes:
        """Ask until it answers."""
        where = ("127.0.0.1", self.port)
        return cast.first_answer(where, cast.oip(model, rows), self.process, self.log)

    def status(self) -> dict[str, Any]:
        """What it says of itself; empty while it does not answer."""
        with contextlib.suppress(httpx.HTTPError, json.JSONDecodeError):
            said: dict[str, Any] = self._http.get("/v2/health").json()
            return said
        return {}

    def metrics(self) -> str:
        """What a scraper gets."""
        return self._http.get("/metrics").text

    def settles(self, digest: str, step: float = 0.1) -> None:
        """Wait until it has committed that bundle and rests; it is asked every `step` seconds.

        Raises:
            LoadError: it does not, in time.
        """

        def settled() -> bool:
            update = self.status().get("update", {})
            current = update.get("current") or {}
            return (update.get("phase"), current.get("sha256")) == ("idle", digest)

        self.waits(settled, f"{digest[:12]} committed", step=step)

    def waits(self, happened: Callable[[], bool], what: str, seconds: float = _PATIENCE, step: float = 0.1) -> None:
        """Wait for something to happen.

        Raises:
            LoadError: it did not, in time.
        """
        deadline = time.monotonic() + seconds
        while not happened():
            if self.process.poll() is not None or time.monotonic() > deadline:
                words = self.log.read_text(errors="replace").strip().splitlines()[-3:]
                message = f"{self.device}: no {what}; {self.status().get('update')}; {words}"
                raise LoadError(message)
            time.sleep(step)


@contextmanager
def open_scene(folder: Path, ours: Environment, made: Path) -> Iterator[Scene]:
    """A new control plane under `folder`, with its broker, until the end of the block."""
    stage = Stage(folder)
    try:
        stage.lightship("init")
        stage.start_control_plane(*_FLAGS)
        home = Home.open(stage.home)
        try:
            yield Scene(stage, home, ours, made)
        finally:
            home.close()
    finally:
        stage.close()


_FLAGS: Final = ("--api-port", "0", "--device-port", "0", "--mqtt-port", "0")
