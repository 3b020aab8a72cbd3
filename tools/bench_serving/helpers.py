"""Bench serving: programs of ours (servers/*.py) that are told by lines what to do."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path
from typing import Any, Final

from .cast import base_environment
from .load import LoadError
from .process import end
from .venvs import Environment

_SERVERS: Final = Path(__file__).with_name("servers")


class Helper:
    """A program that says `ready`, and then answers a line with a line; a context manager."""

    def __init__(self, environment: Environment, script: str, *arguments: str) -> None:
        """Start it, and wait until it is ready."""
        command = [str(environment.python), str(_SERVERS / script), *arguments]
        self.process = subprocess.Popen(
            command, env=base_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._script = script
        if self.line() != "ready":
            end(self.process)
            message = f"{script} did not start."
            raise LoadError(message)

    def __enter__(self) -> Helper:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        end(self.process)
        self.process.stdout.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid

    def tell(self, line: str = "") -> None:
        """Say something to it."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()

    def line(self) -> str:
        """Its next line."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def answer(self) -> dict[str, Any]:
        """Its next line, which is JSON.

        Raises:
            LoadError: it ended instead.
        """
        said = self.line()
        if not said:
            message = f"{self._script} ended."
            raise LoadError(message)
        found: dict[str, Any] = json.loads(said)
        return found
