"""Bench serving: the client (loadgen.c), and what it says."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .process import CpuMeter, on_one_cpu

SOURCE: Final = Path(__file__).with_name("loadgen.c")


class LoadError(Exception):
    """A client or a server did not do what it should."""


@dataclass(frozen=True)
class Target:
    """Somebody who answers: where, what is asked, and which processes the answer costs."""

    where: str
    request: Path
    pids: tuple[int, ...] = ()
    protocol: str = "http"


@dataclass(frozen=True)
class Burst:
    """What one run of the client saw: times in µs, CPU in µs of the server for each answer."""

    requests: int
    errors: int
    seconds: float
    cpu: float
    p50: float
    p90: float
    p99: float
    p999: float
    most: float
    mean: float

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.requests / self.seconds if self.seconds else 0.0


class Client:
    """The compiled client."""

    def __init__(self, folder: Path) -> None:
        """Compile it into `folder`, unless it is there."""
        self._folder = folder
        digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
        self.program = folder / f"loadgen-{digest}"
        if not self.program.exists():
            folder.mkdir(parents=True, exist_ok=True)
            command = ["cc", "-O2", "-Wall", "-Wextra", "-o", str(self.program), str(SOURCE)]
            subprocess.run(command, check=True)

    def request(self, name: str, data: bytes) -> Path:
        """A file with the bytes of a request."""
        path = self._folder / f"{name}.request"
        path.write_bytes(data)
        return path

    def ask(self, target: Target, *options: str | float, tolerant: bool = False) -> Burst:
        """Run the client with `options`.

        Args:
            target: who is asked.
            options: of the client: -c connections, -t seconds, -n requests, -r per second.
            tolerant: of refusals, which are then the figure.

        Raises:
            LoadError: there was no answer, or a wrong one.
        """
        meter = CpuMeter(target.pids)
        said = _figures(subprocess.run(self._command(target, options), check=False, capture_output=True))
        return _burst(said, meter.spent(), tolerant=tolerant)

    def ask_alone(self, target: Target, *options: str | float) -> Burst:
        """The same over one connection, client and server on one CPU.

        Raises:
            LoadError: there was no answer, or a wrong one.
        """
        with on_one_cpu(target.pids):
            return self.ask(target, "-c", 1, *options)

    def begin(self, target: Target, *options: str | float) -> Running:
        """Run it until it is told to stop."""
        return Running(self._command(target, options), target)

    def _command(self, target: Target, options: tuple[str | float, ...]) -> list[str]:
        what = [str(self.program), "ask", target.where, str(target.request), "-p", target.protocol]
        return what + [str(option) for option in options]


class Running:
    """A client that asks until it is told to stop."""

    def __init__(self, command: list[str], target: Target) -> None:
        self._meter = CpuMeter(target.pids)
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def stop(self, *, tolerant: bool = False) -> tuple[Burst, dict[str, Any]]:
        """What it saw, and all that it said."""
        os.kill(self._process.pid, signal.SIGTERM)
        out, err = self._process.communicate(timeout=60)
        said = _figures(subprocess.CompletedProcess([], self._process.returncode, out, err))
        return _burst(said, self._meter.spent(), tolerant=tolerant), said


def _figures(done: subprocess.CompletedProcess[bytes]) -> dict[str, Any]:
    if done.returncode or not done.stdout:
        message = f"The client ended with {done.returncode}: {done.stderr.decode(errors='replace')[-800:]}"
        raise LoadError(message)
    said: dict[str, Any] = json.loads(done.stdout)
    return said | {"complaint": done.stderr.decode(errors="replace")[-800:]}


def _burst(said: dict[str, Any], cpu: float, *, tolerant: bool) -> Burst:
    if (said["errors"] and not tolerant) or not said["requests"]:
        message = f"{said['errors']} of {said['requests']} requests failed: {said['complaint']}"
        raise LoadError(message)
    names = ("requests", "errors", "seconds", "p50", "p90", "p99", "p999", "most", "mean")
    return Burst(cpu=1e6 * cpu / said["requests"], **{name: said[name] for name in names})
