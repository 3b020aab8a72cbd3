"""The agent as a program of its own: started, asked over its Unix socket, stopped or killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
from tests.agent.link.field import until

import lightship_agent

PACKAGES = str(Path(lightship_agent.__file__).parents[1])
QUICK = {
    "SOAK_SECONDS": "0.2",
    "REACH_SECONDS": "5",
    "REPORT_SECONDS": "0.5",
    "POLL_SECONDS": "30",
    "HTTP_PORT": "0",
    "WINDOW_MIN_SECONDS": "0",
}


def environment(state: Path, **settings: str) -> dict[str, str]:
    """What a service manager would pass on: a path, and the agent's settings by their short names."""
    given = {"STATE_DIR": str(state), **QUICK, **settings}
    return {"PATH": os.environ["PATH"], "PYTHONPATH": PACKAGES, **{f"LIGHTSHIP_AGENT_{k}": v for k, v in given.items()}}


def command(
    *arguments: str, state: Path, told: str = "", within: tuple[str, ...] = (), **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run a verb to its end, `within` another program if that is named."""
    return subprocess.run(
        [*within, sys.executable, "-m", "lightship_agent", *arguments], env=environment(state, **settings), input=told,
        capture_output=True, text=True, check=False, timeout=180,
    )  # fmt: skip


class RunningAgent:
    """`lightship-agent run`, with its log beside the state directory."""

    def __init__(self, state: Path, *, fail_point: str = "", within: tuple[str, ...] = (), **settings: str) -> None:
        self.socket = state.parent / f"{state.name}.sock"
        self.log = state.parent / f"{state.name}.log"
        env = environment(state, SOCKET=str(self.socket), **settings)
        if fail_point:
            env["LIGHTSHIP_FAIL_POINT"] = fail_point
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(self.socket)), base_url="http://agent", timeout=60
        )
        with self.log.open("ab") as log:
            program = [*within, sys.executable, "-m", "lightship_agent", "run"]
            self.process = subprocess.Popen(program, env=env, stderr=log)

    def __enter__(self) -> RunningAgent:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def status(self) -> dict[str, Any]:
        """What it says of itself; empty while it does not answer."""
        with socket.socket(socket.AF_UNIX) as probe:  # the client leaks a socket where nobody listens
            if probe.connect_ex(str(self.socket)) != 0:
                return {}
        try:
            said: dict[str, Any] = self._http.get("/v2/health").json()
        except (httpx.HTTPError, json.JSONDecodeError):
            return {}
        return said

    def serving(self) -> list[str]:
        return [r["digest"] for r in self.status().get("running", [])]

    def wait_for(self, digest: str, seconds: float = 180.0) -> None:
        """Wait until it serves that digest and has committed it."""

        def settled() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            said = self.status()
            update = said.get("update", {})
            current = update.get("current") or {}
            return (update.get("phase"), current.get("sha256")) == ("idle", digest) and self.serving() == [digest]

        until(settled, seconds)

    def terminate(self) -> int:
        """Ask it to stop; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)
