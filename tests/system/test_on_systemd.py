"""System: the agent's unit on a real systemd, in a container that boots.

Run with LIGHTSHIP_SYSTEM_TESTS=1, as root, where debootstrap and systemd-nspawn are installed. The first run makes a
Debian root (2 to 5 minutes, 320 MB, kept outside the repository); the container writes to memory only. It shares the
host's network, so that the agent inside reaches the control plane on the host's loopback.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from demo.stage import Stage

REPO = Path(__file__).parents[2]
ROOT = Path(os.environ.get("LIGHTSHIP_SYSTEM_ROOT", "/var/tmp/lightship-system-root"))
NSPAWN_RUN = Path("/run/systemd/nspawn")
PACKAGES = "systemd,systemd-sysv,dbus,python3,python3-venv"
UNIT = "lightship-agent"
AGENT = "/opt/lightship-agent/bin/lightship-agent"
STATE = "/var/lib/lightship-agent"
with socket.socket() as _free:  # the container shares the host's ports
    _free.bind(("127.0.0.1", 0))
    PORT = _free.getsockname()[1]
#: The unit waits two minutes for a sign of life; a test doesn't. Nothing else of the unit is changed.
FASTER = "[Service]\nWatchdogSec=6\nRestartSec=1\nTimeoutAbortSec=2\n"
SETTINGS = f"LIGHTSHIP_AGENT_HTTP_PORT={PORT}\nLIGHTSHIP_AGENT_POLL_SECONDS=1\nLIGHTSHIP_AGENT_SOAK_SECONDS=1\n"


def reason_to_skip() -> str:
    if os.environ.get("LIGHTSHIP_SYSTEM_TESTS") != "1":
        return "boots a container: set LIGHTSHIP_SYSTEM_TESTS=1 to run"
    if os.geteuid() != 0:
        return "needs root"
    missing = [p for p in ("systemd-nspawn", "nsenter", "debootstrap") if shutil.which(p) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


pytestmark = [
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip()),
]


class Guest:
    """A booted container."""

    def __init__(self, nspawn: subprocess.Popen[bytes]) -> None:
        self._nspawn = nspawn

    def run(self, *command: str, check: bool = True, said: str | None = None, seconds: float = 180) -> str:
        """Run a command inside, with `said` on its standard input; what it printed."""
        inside = ["nsenter", "--target", str(self._init()), "--mount", "--uts", "--ipc", "--pid", "--cgroup", "--"]
        done = subprocess.run(
            [*inside, *command], input=said, capture_output=True, text=True, timeout=seconds, check=False
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def show(self, name: str) -> str:
        """A property of the agent's unit."""
        return self.run("systemctl", "show", UNIT, "--property", name, "--value")

    def write(self, path: str, text: str) -> None:
        self.run("sh", "-c", f"mkdir -p $(dirname {path}) && cat > {path}", said=text)

    def journal(self) -> str:
        return self.run("journalctl", "--unit", UNIT, "--no-pager", "--output=cat")

    def _init(self) -> int:
        pid = self._nspawn.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def until(happened: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"waited {seconds:g} s for: {what}"
        time.sleep(0.2)


def answers(path: str) -> httpx.Response | None:
    try:
        return httpx.get(f"http://127.0.0.1:{PORT}{path}", timeout=2.0)
    except httpx.HTTPError:
        return None


def serves(model: str) -> bool:
    reply = answers("/v2/health")
    if reply is None:
        return False
    said = reply.json()
    return said["update"]["phase"] == "idle" and [r["model"] for r in said["running"]] == [model]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent of the working tree, and its dependencies by the hashed lock, for the Python of the root."""
    folder = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    version = subprocess.check_output(
        ["chroot", str(ROOT), "python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], text=True
    ).strip()
    machine = os.uname().machine
    platforms = [f"--platform=manylinux{tag}_{machine}" for tag in ("_2_28", "_2_27", "_2_17", "2014")]
    lock = REPO / "agent/requirements.lock"
    download = ["download", "--only-binary=:all:", "--require-hashes", f"--python-version={version}", *platforms]
    subprocess.run([*pip, *download, "-r", str(lock), "-d", str(folder)], check=True, timeout=600)
    wheel = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(folder), str(REPO / "agent")]
    subprocess.run([*pip, *wheel], check=True, timeout=120)
    shutil.copy(lock, folder)
    return folder


@pytest.fixture(scope="module")
def root() -> Path:
    """A Debian with systemd and Python."""
    if not (ROOT / "usr/bin/python3").exists():
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(ROOT)]
        subprocess.run(command, check=True, timeout=1_800)
    return ROOT


@pytest.fixture(scope="module")
def guest(root: Path, wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A machine with the agent installed as its README says, and no identity yet."""
    binds = {
        wheels: "/mnt/wheels",
        REPO / "systemd/lightship-agent.service": "/etc/systemd/system/lightship-agent.service",
        REPO / "systemd/sysusers.d/lightship.conf": "/etc/sysusers.d/lightship.conf",
        REPO / "systemd/tmpfiles.d/lightship.conf": "/etc/tmpfiles.d/lightship.conf",
    }
    command = ["systemd-nspawn", "--quiet", "--directory", str(root), "--boot", "--volatile=overlay"]
    command += ["--register=no", "--keep-unit", "--console=pipe"]
    command += [f"--bind-ro={host}:{inside}" for host, inside in binds.items()]
    with ExitStack() as stack:
        NSPAWN_RUN.mkdir(parents=True, exist_ok=True)
        if not NSPAWN_RUN.is_mount():  # nspawn wants it in memory
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(NSPAWN_RUN)], check=True)
            stack.callback(subprocess.run, ["umount", str(NSPAWN_RUN)], check=False)
        log = stack.enter_context((tmp_path_factory.mktemp("nspawn") / "console.log").open("wb"))
        nspawn = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        stack.callback(shut_down, nspawn)
        machine = Guest(nspawn)
        until(lambda: booted(machine, nspawn), 60, "the container to boot")
        install(machine)
        yield machine


def booted(machine: Guest, nspawn: subprocess.Popen[bytes]) -> bool:
    assert nspawn.poll() is None, "systemd-nspawn ended"
    children = Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children").read_text()
    return bool(children) and machine.run("systemctl", "is-system-running", check=False) == "running"


def shut_down(nspawn: subprocess.Popen[bytes]) -> None:
    nspawn.send_signal(signal.SIGTERM)  # an orderly power-off
    try:
        nspawn.wait(timeout=60)
    except subprocess.TimeoutExpired:
        nspawn.kill()
        nspawn.wait()


def install(machine: Guest) -> None:
    pip = "/opt/lightship-agent/bin/pip install --quiet --no-index --find-links=/mnt/wheels"
    machine.run("python3", "-m", "venv", "/opt/lightship-agent")
    machine.run("sh", "-c", f"{pip} --require-hashes -r /mnt/wheels/requirements.lock")
    machine.run("sh", "-c", f"{pip} --no-deps /mnt/wheels/lightship_agent-*.whl")
    machine.write("/etc/lightship/agent.env", SETTINGS)
    machine.write(f"/run/systemd/system/{UNIT}.service.d/faster.conf", FASTER)
    machine.run("systemctl", "daemon-reload")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A control plane on the host, with a released model."""
    played = Stage(tmp_path_factory.mktemp("stage") / "stage")
    try:
        csv = played.folder / "wine.csv"
        played.lightship("init")
        played.lightship("data", "example", "wine", "--out", str(csv))
        played.lightship("data", "add", str(csv), "--name", "wine", "--target", "target")
        played.lightship("train", "wine", "--model", "wine", "--estimator", "random-forest")
        played.lightship("release", "publish", "wine@1")
        played.start_control_plane("--api-port=0", "--device-port=0", "--broker=none", "--reconcile-seconds=0.5")
        yield played
    finally:
        played.close()


@pytest.fixture(scope="module")
def device(guest: Guest, stage: Stage) -> Guest:
    """The machine, enrolled, its unit started, serving the model that was rolled out to it."""
    token = stage.folder / "token"
    stage.lightship("device", "token", "--device", "press-1", "--out", str(token))
    enrol = f"{AGENT} enrol --server {stage.addresses['devices']} --device press-1 --token-file -"
    guest.run("runuser", "-u", UNIT, "--", "sh", "-c", enrol, said=token.read_text())
    guest.run("systemctl", "reset-failed", UNIT, check=False)
    guest.run("systemctl", "start", UNIT)
    stage.lightship("rollout", "start", "wine@1", "--no-labels", "--reason", "system test")
    until(lambda: serves("wine"), 60, "the rollout to arrive")
    return guest


def test_without_an_identity_the_unit_stays_down_and_says_what_to_do(guest: Guest) -> None:
    guest.run("systemctl", "start", UNIT, check=False)
    assert guest.show("ActiveState") == "failed"
    assert guest.show("ExecMainStatus") == "21"
    assert guest.show("NRestarts") == "0"
    assert "lightship-agent enrol" in guest.journal()


def test_start_returns_when_the_agent_answers(device: Guest) -> None:
    device.run("systemctl", "restart", UNIT)
    live = answers("/v2/health/live")
    assert live is not None
    assert live.status_code == 200
    assert device.show("ActiveState") == "active"
    assert device.show("StatusErrno") == "0"


def test_a_model_was_probed_and_is_served_under_all_the_units_restrictions(device: Guest) -> None:
    until(lambda: serves("wine"), 20, "the model")
    pid = device.show("MainPID")
    status = dict(line.split(":", 1) for line in device.run("cat", f"/proc/{pid}/status").splitlines() if ":" in line)
    assert (status["Seccomp"].strip(), status["NoNewPrivs"].strip()) == ("2", "1")
    assert int(status["CapBnd"], 16) == 0
    row = {"name": "features", "shape": [1, 13], "datatype": "FP32", "data": [1.0] * 13}
    reply = httpx.post(f"http://127.0.0.1:{PORT}/v2/models/wine/infer", json={"inputs": [row]}, timeout=5.0)
    assert reply.status_code == 200, reply.text
    assert reply.json()["model_version"] == "1"


def test_state_is_private_and_only_what_the_readme_names(device: Guest) -> None:
    modes = device.run("stat", "--format=%a %U", STATE, f"{STATE}/identity", f"{STATE}/identity/key.pem")
    assert modes.splitlines() == ["700 lightship-agent", "700 lightship-agent", "600 lightship-agent"]
    table = (REPO / "agent/README.md").read_text().partition("## The state directory")[2].partition("\n## ")[0]
    named = set(re.findall(r"^\| `([^`/]+)/?` \|", table, flags=re.MULTILINE))
    unknown = set(device.run("ls", "-A", STATE).split()) - named
    assert unknown == set()


def test_an_agent_that_is_killed_comes_back_with_its_committed_model(device: Guest) -> None:
    before, restarts = device.show("MainPID"), int(device.show("NRestarts"))
    device.run("systemctl", "kill", "--signal=KILL", "--kill-who=main", UNIT)
    until(lambda: int(device.show("NRestarts")) > restarts, 20, "the restart")
    until(lambda: serves("wine"), 20, "the model to be served again")
    assert device.show("MainPID") != before


def test_an_agent_that_hangs_is_ended_by_the_watchdog_and_started_again(device: Guest) -> None:
    restarts = int(device.show("NRestarts"))
    device.run("systemctl", "kill", "--signal=STOP", "--kill-who=main", UNIT)
    until(lambda: int(device.show("NRestarts")) > restarts, 30, "the watchdog")
    assert "Watchdog timeout" in device.journal()
    until(lambda: serves("wine"), 20, "the model to be served again")


def test_a_healthy_agent_is_left_alone_by_the_watchdog(device: Guest) -> None:
    restarts = device.show("NRestarts")
    time.sleep(13)  # twice the watchdog's patience
    assert device.show("NRestarts") == restarts


def test_stop_is_orderly_and_is_no_failure(device: Guest) -> None:
    device.run("systemctl", "stop", UNIT)
    assert device.show("Result") == "success"
    assert device.show("ExecMainStatus") == "0"
    state = json.loads(device.run("cat", f"{STATE}/update.json"))
    assert state["current"]["model"] == "wine"
    device.run("systemctl", "start", UNIT)
