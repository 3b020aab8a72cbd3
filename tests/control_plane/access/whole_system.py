"""A control plane and a device as operators start them, at the most talkative log level, watched from outside.

Everything they write lies below one folder; every process of theirs is looked at, again and again, as any user of the
machine could: its arguments and its environment.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from tests.control_plane.things import until

ROOT = Path(__file__).resolve().parents[3]
SECRET_IN_OUR_ENVIRONMENT = "a-secret-of-the-shell-that-started-us"


class WholeSystem:
    """Processes and a folder."""

    def __init__(self, folder: Path, broker: str) -> None:
        self.folder, self.broker = folder, broker
        self.home = folder / "home"
        self.logs = folder / "logs"
        self.logs.mkdir()
        self.seen: dict[str, str] = {}  # program -> arguments and environment, of every process ever seen
        self.addresses: dict[str, str] = {}
        self._children: list[subprocess.Popen[bytes]] = []
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch)

    def __enter__(self) -> WholeSystem:
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        for child in reversed(self._children):
            child.send_signal(signal.SIGTERM)
        for child in self._children:
            try:
                child.wait(60)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._over.set()
        self._watcher.join()

    def lightship(self, *arguments: str) -> str:
        """A command, to its end."""
        return self._run("lightship", "--home", str(self.home), *arguments)

    def agent(self, *arguments: str, device: str) -> str:
        """A verb of the agent, to its end."""
        return self._run("lightship_agent", *arguments, "--state-dir", str(self.folder / device))

    def up(self) -> None:
        """Start the control plane."""
        ready = self.folder / "ready.json"
        ports = ("--api-port", "0", "--device-port", "0", "--mqtt-port", "0", "--reconcile-seconds", "0.2")
        flags = (*ports, "--broker", self.broker, "--log-level", "debug", "--ready-file", str(ready))
        self._start("control-plane", "lightship", "--home", str(self.home), "up", *flags)
        until(lambda: ready.exists() and self._alive(), 180)
        self.addresses = json.loads(ready.read_text())

    def start_device(self, device: str) -> None:
        """Start an agent that is enrolled."""
        seconds = (
            "--poll-seconds",
            "1",
            "--report-seconds",
            "0.5",
            "--soak-seconds",
            "0.2",
            "--window-min-seconds",
            "0",
        )
        flags = ("--state-dir", str(self.folder / device), "--http-port", "0", *seconds, "--log-level", "debug")
        self._start(device, "lightship_agent", "run", *flags)

    def client(self, shown: str = "") -> httpx.Client:
        """Somebody with a token."""
        headers = {"Authorization": f"Bearer {shown}"} if shown else {}
        return httpx.Client(base_url=self.addresses["dashboard"], headers=headers, timeout=20)

    def _run(self, *arguments: str) -> str:
        child = subprocess.Popen(
            [sys.executable, "-m", *arguments], env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        said, complained = child.communicate(timeout=120)
        with (self.logs / "commands.log").open("ab") as log:
            log.write(complained)
        assert child.returncode == 0, complained.decode()
        return said.decode().strip()

    def _start(self, name: str, *arguments: str) -> None:
        with (self.logs / f"{name}.log").open("ab") as log:
            command = [sys.executable, "-m", *arguments]
            self._children.append(subprocess.Popen(command, env=_environment(), stdout=log, stderr=log))

    def _alive(self) -> bool:
        logs = "\n".join(p.read_text(errors="replace")[-3_000:] for p in self.logs.iterdir())
        assert all(c.poll() is None for c in self._children), logs
        return True

    def _watch(self) -> None:
        ours = os.getpid()
        while not self._over.wait(0.01):
            for pid in descendants(ours):
                try:
                    arguments = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
                except OSError:
                    continue  # it is gone
                if arguments.strip():  # else it is about to become something: next time
                    self.seen[f"{pid} {arguments}"] = environment


def descendants(pid: int) -> Iterator[int]:
    """The processes below one, that there are now."""
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(c) for c in task.read_text().split()]
        except OSError:
            continue
        for child in children:
            yield child
            yield from descendants(child)


def key_material(pem: str) -> list[str]:
    """What tells a private key, of a PEM file: the lines of its body but the first, which names the kind."""
    found = []
    for body in re.findall(r"-----BEGIN [A-Z ]*PRIVATE KEY-----\n(.*?)-----END", pem, flags=re.DOTALL):
        lines = body.split()
        found += [line for line in lines[1:] if len(line) >= 24] or lines
    return found


def wait_for(ready: Any, seconds: float = 180.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"waited {seconds} s"
        time.sleep(0.1)


def _environment() -> dict[str, str]:
    """What a shell passes on; a secret in it that is none of ours, which no child of ours should inherit."""
    kept = ("PATH", "HOME", "LANG", "VIRTUAL_ENV", "TMPDIR")
    path = os.pathsep.join(str(ROOT / p) for p in ("agent", "control_plane"))
    return {
        **{k: os.environ[k] for k in kept if k in os.environ},
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "SOME_CLOUD_SECRET": SECRET_IN_OUR_ENVIRONMENT,
        "LIGHTSHIP_SOMETHING_SECRET": SECRET_IN_OUR_ENVIRONMENT,
    }
