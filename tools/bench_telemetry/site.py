"""Bench telemetry: a home with a fleet, a broker, and real `lightship ingest` processes that can be killed.

Rules: programs and configurations are those that ship; where one is changed (the default queue of mosquitto) its
function says so. CPU and memory are what the kernel says of a process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from lightship.fleet.broker import RunningBroker, free_port, start_broker
from lightship.home import Home
from lightship.integrations import mosquitto, rumqttd
from lightship.monitoring.history import open_history
from lightship.settings import load_settings
from lightship.storage.audit import now_ms
from lightship.storage.models import Device
from lightship_agent.contract.codes import StorageError

TENANT: Final = "default"
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_INITDB: Final = shutil.which("initdb") or shutil.which("initdb", path="/usr/lib/postgresql/15/bin")


class Site:
    """A home and what runs around it."""

    def __init__(self, folder: Path, *, history: str = "", protocol: str = "auto") -> None:
        """A new home under `folder`; nothing runs yet."""
        folder.mkdir(parents=True)
        self.home = Home.create(folder / "home")
        self.folder = self.home.path / "broker"
        self._history, self._protocol = history, protocol
        self.broker: RunningBroker | None = None
        self.workers: dict[int, subprocess.Popen[bytes]] = {}
        self.log = folder / "ingest.log"

    def add_devices(self, names: list[str]) -> None:
        """Active devices, as enrolment leaves them."""
        now = now_ms()
        with self.home.database.write() as session:
            session.add_all(
                Device(
                    id=name, tenant=TENANT, group="g", labels={}, state="active", spki="0" * 64, cert_serial="1",
                    cert_not_after=now, enrolled_at=now, running=[], health={}, degraded=[],
                )
                for name in names
            )  # fmt: skip

    def start_broker(self, kind: str, *, default_queue: bool = False) -> RunningBroker:
        """Start mosquitto or the embedded one; `default_queue`: with mosquitto's own limits instead of ours."""
        settings = load_settings({}, {"home": str(self.home.path), "broker": kind, "mqtt_port": 0})
        started = start_broker(settings, self.folder, self.home.ca)
        assert started is not None
        self.broker = started
        if default_queue and kind == "mosquitto":
            config = self.folder / "mosquitto.conf"
            ours = ("max_queued_", "max_inflight_messages")
            kept = [line for line in config.read_text().splitlines() if not line.startswith(ours)]
            config.write_text("\n".join([*kept, "log_type notice"]) + "\n")
            self.kill_broker()
            self.restart_broker()
        return started

    def kill_broker(self) -> None:
        """As a power cut would."""
        assert self.broker is not None
        process = self.broker.process
        process.kill()
        process.wait()
        if process.stdin is not None:  # what the embedded one watches, to end with us
            process.stdin.close()

    def restart_broker(self) -> None:
        """On the same port, with the configuration that is there."""
        assert self.broker is not None
        if self.broker.info.kind == "mosquitto":
            program = mosquitto.find()
            assert program is not None
            self.broker.process = mosquitto.start(program, self.folder / "mosquitto.conf")
        else:
            self.broker.process = rumqttd.start(self.folder / "rumqttd.toml")

    def start_worker(self, number: int = 0) -> subprocess.Popen[bytes]:
        """`lightship ingest`, as `lightship up` starts it."""
        words = [sys.executable, "-m", "lightship", "--home", str(self.home.path), "ingest", "--worker", str(number)]
        environment = {**os.environ, "LIGHTSHIP_HISTORY": self._history, "LIGHTSHIP_INGEST_MQTT": self._protocol}
        with self.log.open("ab") as log:
            process = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
        self.workers[number] = process
        return process

    def kill_worker(self, number: int = 0) -> None:
        """SIGKILL, in the middle of whatever it does."""
        process = self.workers.pop(number)
        process.kill()
        process.wait()

    def close(self) -> None:
        """End everything."""
        for process in self.workers.values():
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            process.kill()
            process.wait()
        if self.broker is not None:
            self.broker.stop()
        self.home.close()


@contextmanager
def site(folder: Path, *, history: str = "", protocol: str = "auto") -> Iterator[Site]:
    """A site that is gone afterwards."""
    made = Site(folder, history=history, protocol=protocol)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(folder)


@contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL of our own, with its own settings; its address, or "" where none is installed."""
    if _INITDB is None or find_spec("psycopg") is None:
        yield ""
        return
    # The server refuses to run as root.
    programs, folder = Path(_INITDB).parent, Path(tempfile.mkdtemp(prefix="lightship-pg-"))
    folder.chmod(0o777)
    port, data = free_port("127.0.0.1"), folder / "data"
    become = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
    made: list[str | Path] = [*become, programs / "initdb", "-D", data, "-U", "lightship", "-A", "trust"]
    subprocess.run(made, check=True, capture_output=True, cwd=folder)
    words: list[str | Path] = [*become, programs / "postgres", "-D", data, "-p", str(port), "-k", folder]
    process = subprocess.Popen([*words, "-c", "listen_addresses=127.0.0.1"], stderr=subprocess.DEVNULL, cwd=folder)
    try:
        url = f"postgresql://lightship@127.0.0.1:{port}/postgres"
        until(lambda: _answers(folder, url), 30)
        yield url
    finally:
        process.send_signal(signal.SIGINT)  # and it waits for nobody
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _answers(folder: Path, url: str) -> bool:
    try:
        open_history(folder, url).close()
    except StorageError:
        return False
    return True


def cpu(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def peak_mb(pid: int) -> float:
    """The most memory that was ever resident, in MB."""
    words = Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()
    return int(words[0]) * 1_024 / 1e6


def until(ready: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for `ready()`.

    Raises:
        TimeoutError: it did not come.
    """
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            message = f"waited for {seconds} s"
            raise TimeoutError(message)
        time.sleep(0.05)
