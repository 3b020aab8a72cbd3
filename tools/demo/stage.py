"""Demo: the processes. A control plane and five agents, each as an operator would start them.

Rules: every child is started so that it ends with us, even if we are killed; `close` stops all, gently and then not.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from lightship.fleet.broker import free_port

_PR_SET_PDEATHSIG = 1


class StageError(Exception):
    """A process did not do what it should."""


class Stage:
    """Home folder, processes, addresses."""

    def __init__(self, folder: Path) -> None:
        """Play in `folder`, which must be empty or absent."""
        self.folder = folder
        self.home = folder / "home"
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True)
        self._children: list[tuple[str, subprocess.Popen[bytes]]] = []
        self.addresses: dict[str, str] = {}
        self.agents: dict[str, str] = {}  # device -> URL
        self._http: httpx.Client | None = None

    def lightship(self, *arguments: str, check: bool = True) -> Any:
        """Run a `lightship` command; its JSON."""
        command = [sys.executable, "-m", "lightship", "--home", str(self.home), *arguments, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
        if done.returncode == 0:
            return json.loads(done.stdout) if done.stdout.strip() else None
        if check:
            msg = f"`lightship {' '.join(arguments)}` ended with {done.returncode}: {done.stderr[-1500:]}"
            raise StageError(msg)
        return json.loads(done.stderr.strip().splitlines()[-1])

    def start_control_plane(self, *flags: str) -> None:
        """Start `lightship up` and wait until it listens."""
        ready = self.folder / "ready.json"
        command = ["-m", "lightship", "--home", str(self.home), "up", "--ready-file", str(ready), *flags]
        child = self._spawn("control-plane", command)
        self._wait(lambda: ready.exists() and ready.read_text().endswith("}"), child, "control-plane", 120)
        self.addresses = json.loads(ready.read_text())
        self._http = httpx.Client(base_url=self.addresses["dashboard"], timeout=60.0)

    def enrol(self, device: str, group: str) -> None:
        """A one-use token from the operator, an identity for the device."""
        token = self.folder / f"{device}.token"
        self.lightship("device", "token", "--group", group, "--device", device, "--out", str(token))
        command = [
            sys.executable, "-m", "lightship_agent", "enrol", "--state-dir", str(self.folder / device),
            "--server", self.addresses["devices"], "--device", device, "--token-file", str(token),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
        token.unlink()
        if done.returncode != 0:
            msg = f"{device} could not enrol: {done.stderr[-800:]}"
            raise StageError(msg)

    def start_agent(self, device: str, *flags: str) -> None:
        """Start `lightship-agent run`; `wait_for_agents` waits for them all."""
        port = free_port("127.0.0.1")
        state = str(self.folder / device)
        command = ["-m", "lightship_agent", "run", "--state-dir", state, "--http-port", str(port), *flags]
        self._spawn(device, command)
        self.agents[device] = f"http://127.0.0.1:{port}"

    def wait_for_agents(self, seconds: float = 120) -> None:
        """Until every agent answers."""
        children = dict(self._children)
        for device, url in self.agents.items():
            self._wait(lambda url=url: _answers(f"{url}/v2/health/live"), children[device], device, seconds)

    def api(self, path: str) -> Any:
        """What the operator API says."""
        assert self._http is not None
        reply = self._http.get(f"/api/v1/{path}")
        reply.raise_for_status()
        return reply.json()

    def alive(self) -> list[str]:
        """Names of children that have died."""
        return [name for name, child in self._children if child.poll() is not None]

    def close(self) -> None:
        """Stop every process: ask, wait, then insist."""
        if self._http is not None:
            self._http.close()
        for _, child in reversed(self._children):
            if child.poll() is None:
                with suppress(ProcessLookupError):
                    child.terminate()
        deadline = time.monotonic() + 20
        for _, child in reversed(self._children):
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=max(0.1, deadline - time.monotonic()))
            # Whatever the child itself had started is in its process group.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()

    def _spawn(self, name: str, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        with (self.logs / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent,  # noqa: PLW1509 - a single prctl call, before any thread
                env=_environment(),
            )
        self._children.append((name, child))
        return child

    def _wait(self, ready: Any, child: subprocess.Popen[bytes], name: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not ready():
            if child.poll() is not None or time.monotonic() > end:
                said = (self.logs / f"{name}.log").read_text(errors="replace")[-1500:]
                msg = f"{name} did not start: {said}"
                raise StageError(msg)
            time.sleep(0.1)


def _environment() -> dict[str, str]:
    kept = ("PATH", "HOME", "LANG", "VIRTUAL_ENV", "TMPDIR", "PYTHONPATH", "LIGHTSHIP_BROKER")
    return {**{k: v for k, v in os.environ.items() if k in kept}, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2.0).status_code == 200
    except httpx.HTTPError:
        return False
