"""Crash test: one device. Its agent is a process of its own; what it did is read from its traces, its log, its disk.

Rules:
* the state path is that of update.json: what the agent's own fail points note when it was made durable;
* what serves is asked over HTTP, with a row to predict;
* debris is what an undisturbed update does not leave, on disk or among the processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec

import lightship_agent
from lightship_agent.update import machine as m
from lightship_agent.update.store import BundleStore, StateFile

from . import bundles
from .door import Door
from .plane import Plane

PACKAGES = str(Path(lightship_agent.__file__).parents[1])
QUICK = {
    "SOAK_SECONDS": "0.3",
    "REACH_SECONDS": "3",
    "REPORT_SECONDS": "0.5",
    "WINDOW_MIN_SECONDS": "0",
    "POLL_SECONDS": "30",
    "HTTP_PORT": "0",
}
#: Between two processes in a state path: killed, and stopped.
CUT, STOPPED = "⚡", "⏹"
PATIENCE = 240.0
_SERVING = re.compile(r"serving \S+ version (\d+)")
_VARYING = re.compile(
    r"^(outbox/(events/)?[0-9a-f]{16}/(\d{20}\.seg|spare|acked)|tuf/root_history/\d+\.root\.json|bundles/[0-9a-f]{64}\.tar)$"
)


class RowError(Exception):
    """The row did not go as it should; the words say how."""


class Device:
    """One row's device."""

    def __init__(self, plane: Plane, name: str, folder: Path, sockets: Path, door: Door | None = None) -> None:
        """An enrolled device without a model, whose agent does not run."""
        self.plane = plane
        self.name = name
        self.folder = folder
        self.state = folder / "state"
        self.marks = folder / "marks"
        self._logs: list[Path] = []
        self._first: list[str] = []  # what each process should serve first, where that is known
        self._socket = sockets / name
        self._http = httpx.Client(transport=httpx.HTTPTransport(uds=str(self._socket)), base_url="http://agent")
        self._process: subprocess.Popen[bytes] | None = None
        self._pids: list[int] = []
        self._ends: dict[int, str] = {}  # how each process ended, by its id
        self.exits: list[int] = []
        folder.mkdir(parents=True)
        self._door = door
        self.at_end: list[Callable[[], object]] = []  # what `close` does last
        self.identity = plane.enrol(self.state, name, door.url if door else "")

    @property
    def gate(self) -> Door:
        """The door before the control plane."""
        assert self._door is not None, "the row has no door"
        return self._door

    # What there is to begin with ------------------------------------------------------------------------------------

    def target(self, version: int, seq: int = 0) -> m.Target:
        """That version, as update.json holds it."""
        row = self.plane.versions[version]
        return m.Target(
            model=row.model, version=version, path=row.path, sha256=row.digest, length=row.length, seq=seq, rollout=""
        )

    def commit(self, version: int, previous: int | None = None) -> None:
        """Put a version on disk as if it had been committed long ago."""
        store = BundleStore(self.state)
        store.put(self.plane.versions[version].digest, self.plane.data[version])
        state = m.UpdateState(current=self.target(version))
        if previous is not None:
            store.put(self.plane.versions[previous].digest, self.plane.data[previous])
            state = m.UpdateState(current=self.target(version), previous=self.target(previous))
        StateFile(self.state).save(state)

    def bundle(self, version: int) -> Path:
        """Where the store keeps that version."""
        return self.state / "bundles" / f"{self.plane.versions[version].digest}.tar"

    # The process ----------------------------------------------------------------------------------------------------

    def start(self, fail: str = "", *, environment: dict[str, str] | None = None, **settings: str) -> None:
        """Start the agent; `fail` is an order for its fail points, `settings` go by their short names."""
        given = {"STATE_DIR": str(self.state), "SOCKET": str(self._socket), **QUICK, **settings}
        env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": PACKAGES,
            "LIGHTSHIP_FAIL_POINT": fail,
            "LIGHTSHIP_FAIL_POINT_FOLDER": str(self.marks),
            **{f"LIGHTSHIP_AGENT_{k}": v for k, v in given.items()},
            **(environment or {}),
        }
        command = [sys.executable, "-m", "lightship_agent", "run"]
        self._logs.append(self.folder / f"agent-{len(self._logs) + 1}.log")
        self._first.append(self._committed())
        with self._logs[-1].open("ab") as log:
            self._process = subprocess.Popen(command, env=env, stderr=log, stdout=log, stdin=subprocess.DEVNULL)
        self._pids.append(self._process.pid)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The agent that was started last."""
        assert self._process is not None, "the agent was not started"
        return self._process

    def dies(self) -> None:
        """Wait for it to kill itself."""
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired as e:
            message = f"it was to die, and lived on in {self.status().get('update', {}).get('phase')}"
            raise RowError(message) from e
        self._ends[self.process.pid] = CUT
        if status != -signal.SIGKILL:
            message = f"it was to die of SIGKILL, and ended with {status}: {self.last_words()}"
            raise RowError(message)

    def ends(self) -> int:
        """Wait for it to end by itself; its exit status."""
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired as e:
            raise RowError("it was to end, and lives on") from e
        self._ends[self.process.pid] = STOPPED
        self.exits.append(status)
        return status

    def kill(self) -> None:
        """Kill it now."""
        self.process.kill()
        self.dies()

    def stop(self) -> int:
        """Ask it to stop, as a service manager does; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.ends()

    def limit_files(self, size: int) -> None:
        """Let it write no byte beyond `size` in any file (RLIMIT_FSIZE), or all with -1."""
        hard = resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (size if size >= 0 else hard, hard))

    def close(self) -> None:
        """Leave no process behind, also where the agent did."""
        self._http.close()
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for pid in children("lightship_agent", self.state):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._socket.unlink(missing_ok=True)
        if self._door is not None:
            self._door.shut()
        for undo in self.at_end:
            undo()

    # What it says ---------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """What it says of itself; empty while it does not answer."""
        with socket.socket(socket.AF_UNIX) as knock:
            if knock.connect_ex(str(self._socket)) != 0:
                return {}
        try:
            said: dict[str, Any] = self._http.get("/v2/health").json()
        except (httpx.HTTPError, json.JSONDecodeError):
            return {}
        return said

    def predicts(self) -> str:
        """Which version answers a row: `v2`, or the code of the refusal, or `nobody`."""
        return self.ask(0.0)

    def ask(self, first: float) -> str:
        """The same, for a row that begins with `first`."""
        row = [first, 0.0, 0.0, 0.0]
        tensor = {"name": "features", "shape": [1, 4], "datatype": "FP32", "data": row}
        try:
            reply = self._http.post(f"/v2/models/{bundles.NAME}/infer", json={"inputs": [tensor]})
            said = reply.json()
        except (httpx.HTTPError, json.JSONDecodeError):
            return "nobody"
        if reply.status_code != 200:
            return str(said.get("code") or f"{reply.status_code}: {said.get('error', '')}")
        version = round(said["outputs"][0]["data"][0] - 0.5 * first)
        running = [r["digest"] for r in self.status().get("running", [])]
        wanted = self.plane.versions[version].digest
        return f"v{version}" if running == [wanted] else f"v{version}, while it says {running}"

    def waits(self, happened: Callable[[], Any], what: str, seconds: float = PATIENCE) -> None:
        """Wait for something to happen, or fail the row."""
        end = time.monotonic() + seconds
        while not happened():
            if self.process.poll() is not None:
                self._ends[self.process.pid] = CUT
                message = f"waiting for {what}, it ended with {self.process.returncode}: {self.last_words()}"
                raise RowError(message)
            if time.monotonic() > end:
                message = f"{what} did not happen within {seconds:.0f} s; update: {self.status().get('update')}"
                raise RowError(message)
            time.sleep(0.05)

    def settles(self, version: int, seconds: float = PATIENCE) -> None:
        """Wait until it has committed that version and serves it, and has said so."""
        digest = self.plane.versions[version].digest

        def settled() -> bool:
            said = self.status()
            update = said.get("update", {})
            current = update.get("current") or {}
            running = [r["digest"] for r in said.get("running", [])]
            return (update.get("phase"), current.get("sha256"), running) == ("idle", digest, [digest])

        self.waits(settled, f"v{version} committed", seconds)

    def says(self, code: str, seconds: float = PATIENCE) -> None:
        """Wait until it is at rest with that code as its last."""

        def said() -> bool:
            update = self.status().get("update", {})
            return (update.get("phase"), update.get("last_code")) == ("idle", code)

        self.waits(said, f"at rest with {code}", seconds)

    def answers(self) -> None:
        """Wait until it serves HTTP."""
        self.waits(self.status, "an answer")

    def is_degraded(self, code: str) -> bool:
        """Whether it says so of itself."""
        return code in self.status().get("degraded", [])

    def comes_to(self, point: str, seconds: float = PATIENCE) -> None:
        """Wait until it has passed that fail point."""
        self.waits(lambda: any(p == point for _, p, _ in self.trace()), point, seconds)

    def expects(self, what: str, expected: Any, found: Any) -> None:
        """Fail the row unless they are the same."""
        if expected != found:
            message = f"{what}: expected {expected}, found {found}"
            raise RowError(message)

    # What it left ---------------------------------------------------------------------------------------------------

    def trace(self) -> list[tuple[int, str, str]]:
        """Every pass of a fail point: process id, name, subject; an action has the name `!`."""
        try:
            lines = (self.marks / "trace").read_text().splitlines()
        except FileNotFoundError:
            return []
        parts = [line.split(" ", 2) for line in lines if line.count(" ") >= 2]
        return [(int(pid), point, subject) for pid, point, subject in parts]

    def path(self) -> str:
        """The states that update.json went through; between processes, how the earlier one ended."""
        pids = self._pids
        runs = [" → ".join(_entered(self.trace(), pid)) for pid in pids]
        out = ""
        for pid, run in zip(pids, runs, strict=True):
            out += f" {run}" if run else ""
            if pid != pids[-1]:
                out += f" {self._ends.get(pid, CUT)}"
        return out.strip()

    def debris(self, clean: frozenset[str]) -> list[str]:
        """Files that an undisturbed update does not leave, bundles that are neither current nor previous, orphans."""
        found = self.names()
        wrong = sorted(n for n in found if n not in clean and not _VARYING.match(n))
        state = StateFile(self.state).load()
        kept = {t.sha256 for t in (state.current, state.previous) if t is not None}
        known = {row.digest: f"v{v}" for v, row in self.plane.versions.items()}
        extra = sorted({Path(n).stem for n in found if n.startswith("bundles/")} - kept)
        wrong += [f"bundle {known.get(digest, digest)}" for digest in extra if f"bundles/{digest}.tar" in found]
        wrong += [f"orphan {what}" for what in orphans(self.folder)]
        return wrong

    def wrongly_served(self) -> list[str]:
        """Processes that began to serve something else than what was committed when they were started."""
        wrong = []
        for number, (log, first) in enumerate(zip(self._logs, self._first, strict=True), start=1):
            served = _SERVING.findall(log.read_text(errors="replace"))
            if first and served and served[0] != first:
                wrong.append(f"start {number} served v{served[0]} first, and v{first} was committed")
        return wrong

    def _committed(self) -> str:
        """The version that is committed and whole on disk; "" where that can't be told. Reads, and changes nothing."""
        for name in ("update.json", "committed.json"):
            try:
                current = msgspec.json.decode((self.state / name).read_bytes(), type=m.UpdateState).current
            except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
                continue
            return str(current.version) if current and BundleStore(self.state).holds(current.sha256) else ""
        return ""

    def names(self) -> set[str]:
        """Every file under the state directory, by its name relative to it."""
        return {p.relative_to(self.state).as_posix() for p in self.state.rglob("*") if p.is_file() or p.is_symlink()}

    def last_words(self) -> str:
        """The end of its log."""
        lines = self._logs[-1].read_text(errors="replace").strip().splitlines() if self._logs else []
        return lines[-1][-300:] if lines else "it said nothing"


def _entered(trace: list[tuple[int, str, str]], pid: int) -> list[str]:
    """The states that a process put on disk: each is announced, and is there once update.json is renamed."""
    announced, entered = "", []
    for who, point, subject in trace:
        if who == pid and point.startswith("before-save-"):
            announced = point.removeprefix("before-save-")
        elif who == pid and (point, subject) == ("file-renamed", "update.json"):
            entered.append(announced)
    return entered


def processes() -> list[tuple[int, str]]:
    """Every process: id and command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            found.append((int(entry.name), words.strip()))
    return found


def children(name: str, folder: Path) -> list[int]:
    """The processes whose command line has both the name and the folder."""
    return [pid for pid, words in processes() if name in words and str(folder) in words]


def orphans(folder: Path, seconds: float = 15.0) -> list[str]:
    """What still runs on the device's files a moment after its agent has ended."""
    end = time.monotonic() + seconds
    while True:
        left = [words for _, words in processes() if str(folder / "state") in words]
        if not left or time.monotonic() > end:
            return [re.search(r"-m (\S+)", words)[1] if "-m " in words else words[:60] for words in left]  # type: ignore[index]
        time.sleep(0.1)
