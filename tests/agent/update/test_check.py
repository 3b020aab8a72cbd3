"""An assignment is verified in a process of its own: what it tells, what it may use, and every way it may end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.agent.link.field import Device, Field
from tests.agent.update.ground import NEW, Ground, open_ground
from tests.conformance.simulator import Answer
from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient.fetcher import FetcherInterface

from lightship.storage.models import ModelVersion
from lightship_agent.contract.codes import CODES, LightshipError
from lightship_agent.contract.device_api import Paths
from lightship_agent.contract.transport import TRANSPORT_SUFFIX
from lightship_agent.update import check as checking
from lightship_agent.update.check import CheckRequest, FileSource, ServerSource, check, check_in_child


def request(field: Field, device: Device, **changes: Any) -> CheckRequest:
    """What the agent would ask: the assignment as the server hands it out."""
    made = CheckRequest(
        state_dir=str(device.folder),
        device=device.identity.device,
        envelope=field.envelope(device.identity.device),
        floor=0,
        now=time.time(),
        source=ServerSource(metadata_url=f"{field.url}{Paths.METADATA}"),
    )
    return msgspec.structs.replace(made, **changes)


def assigned(field: Field) -> tuple[Device, ModelVersion]:
    """A device with a released bundle assigned to it."""
    device, version = field.device(), field.release(1)
    field.assign("press-1", version)
    return device, version


def test_the_child_says_what_of_the_store_is_not_released_any_more(field: Field) -> None:
    device, version = assigned(field)
    held = (
        (version.path, version.digest),
        (version.path, "0" * 64),
        ("bundles/pump/9.tar", "9" * 64),
    )
    reply = check_in_child(request(field, device, held=held))
    assert reply.revoked == ("0" * 64, "9" * 64)


def test_the_child_says_what_shall_run_and_what_to_fetch_for_it(field: Field) -> None:
    device, version = assigned(field)

    reply = check_in_child(request(field, device))

    assert (reply.assignment.sha256, reply.assignment.seq) == (version.digest, 1)
    assert (reply.bundle.path, reply.bundle.sha256, reply.bundle.length) == (
        version.path,
        version.digest,
        version.length,
    )
    packed = field.published(version)
    assert reply.transport.path == version.path + TRANSPORT_SUFFIX
    assert packed.as_posix().endswith(reply.transport.url_path)
    assert reply.transport.length == packed.stat().st_size
    assert reply.delta is None
    assert {"root", "timestamp", "snapshot", "targets", "releases"} <= reply.metadata_expires.keys()
    assert min(reply.metadata_expires.values()) > time.time() + 3 * 86_400
    assert check(request(field, device)) == reply


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Ground]:
    with open_ground(tmp_path) as opened:
        opened.publish_new()
        yield opened


@pytest.fixture
def silent(ground: Ground) -> Iterator[Ground]:
    """The server takes the first request, and then says nothing until the test is over."""
    over = threading.Event()

    def wait(_: Any) -> None:
        over.wait(60)

    ground.repository.lie(r"2\.root\.json", Answer(stream=wait, headers={"Content-Length": "9"}))
    yield ground
    over.set()


def children() -> list[int]:
    """The processes that this one has started and that still are."""
    return [int(pid) for pid in Path("/proc/self/task").joinpath(str(os.getpid()), "children").read_text().split()]


def busy(ground: Ground) -> list[int]:
    """The child, once it has got as far as asking."""
    return children() if ground.repository.asked else []


def ended(request: CheckRequest, **how: Any) -> LightshipError:
    """How the check ended; nobody is left behind."""
    before = set(children())
    with pytest.raises(LightshipError) as end:
        check_in_child(request, **how)
    assert set(children()) <= before
    return end.value


# What it may use ------------------------------------------------------------------------------------------------------


def test_the_agent_never_loads_what_the_child_needs() -> None:
    program = (
        "import sys, lightship_agent.update.check\n"
        "heavy = {m.partition('.')[0] for m in sys.modules} & {'tuf', 'securesystemslib', 'httpx', 'cryptography'}\n"
        "print(sorted(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], env=checking.child_environment(), capture_output=True, check=True
    )
    assert done.stdout == b"[]\n"


def test_the_child_knows_no_secret_and_is_nobody_special(silent: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTSHIP_API_TOKEN", "very-secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("PYTHONSTARTUP", "/tmp/evil.py")
    seen: dict[str, str] = {}

    def look() -> bool:
        for pid in busy(silent):
            for name in ("environ", "cmdline", "limits", "stat"):
                seen[name] = Path(f"/proc/{pid}/{name}").read_bytes().replace(b"\0", b" ").decode()
        return bool(seen)

    assert ended(silent.request(), cancelled=look).code == "update.interrupted"

    assert not any(word in seen["environ"] for word in ("secret", "PROXY", "STARTUP"))
    arguments = seen["cmdline"].split()[1:]
    assert arguments == ["-P", "-m", "lightship_agent.update.check_child", "185"]
    limits = {line[:26].strip(): line[26:47].strip() for line in seen["limits"].splitlines()}
    assert limits["Max core file size"] == "0"
    assert limits["Max cpu time"] == "60"
    assert limits["Max file size"] == str(16 * 1024 * 1024)
    assert int(limits["Max address space"]) < 512 * 1024 * 1024
    assert int(seen["stat"].rpartition(")")[2].split()[16]) >= os.nice(0) + 10 or os.nice(0) > 9


def test_the_child_goes_through_the_agents_proxy_and_its_password_stays_hidden(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(20)
        port = proxy.getsockname()[1]
        monkeypatch.setenv("HTTP_PROXY", f"http://user:very-secret@127.0.0.1:{port}")
        environments: list[bytes] = []

        def look() -> bool:
            with suppress(ProcessLookupError, FileNotFoundError):  # it ends when it likes
                environments.extend(Path(f"/proc/{pid}/environ").read_bytes() for pid in children())
            return False

        def refuse() -> None:
            connection, _ = proxy.accept()
            with connection:
                asked.append(connection.recv(4_096))
                time.sleep(0.5)

        asked: list[bytes] = []
        server = threading.Thread(target=refuse)
        server.start()
        assert ended(ground.request(), cancelled=look).code == "link.unreachable"
        server.join()
    assert asked[0].startswith(f"GET {ground.url}2.root.json".encode())
    assert b"Proxy-Authorization" in asked[0]
    assert environments
    assert not any(b"secret" in environment for environment in environments)
    assert ground.repository.asked == []


def test_a_child_that_wants_too_much_memory_gets_none() -> None:
    program = (
        "from lightship_agent.update.check_child import limit_self\n"
        "limit_self(30)\n"
        "hoard = []\n"
        "try:\n"
        "    while True: hoard.append(bytearray(1 << 20))\n"
        "except MemoryError: print(len(hoard))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], env=checking.child_environment(), capture_output=True, check=True
    )
    assert 150 < int(done.stdout) < 300


# How it may end -------------------------------------------------------------------------------------------------------


def test_a_check_that_takes_too_long_is_stopped(silent: Ground) -> None:
    began = time.monotonic()
    assert ended(silent.request(), timeout=1.5).code == "update.check-timeout"
    assert time.monotonic() - began < 10


def test_a_check_is_stopped_when_the_agent_is(silent: Ground) -> None:
    assert ended(silent.request(), cancelled=lambda: bool(busy(silent))).code == "update.interrupted"


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGKILL, "update.check-timeout"),  # what the kernel does when memory is short
        (signal.SIGXCPU, "update.check-timeout"),
        (signal.SIGALRM, "update.check-timeout"),
        (signal.SIGSEGV, "update.check-failed"),
        (signal.SIGTERM, "update.check-failed"),
    ],
)
def test_a_child_that_is_killed_is_an_answer(silent: Ground, number: signal.Signals, code: str) -> None:
    def kill() -> bool:
        for pid in busy(silent):
            os.kill(pid, number)
        return False

    assert ended(silent.request(), cancelled=kill).code == code


def test_a_killed_check_leaves_nothing_that_disturbs_the_next(silent: Ground) -> None:
    ended(silent.request(), cancelled=lambda: bool(busy(silent)))
    silent.repository.lies.clear()
    assert check_in_child(silent.request()).bundle.path == NEW


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("", "no answer"),
        ("print('hello')", "no answer"),
        ("print('{}')", "neither"),
        ("print('[' * 10_000)", "no answer"),
        ("""print('{"code": "trust.invented", "message": "x"}')""", "unknown code"),
        ("""print('{"code": "nonsense", "message": "x"}')""", "unknown code"),
        ("""print('{"reply": {"assignment": 5}}')""", "no answer"),
        ("print('x' * 300_000)", "more than"),
        ("import sys; sys.stdout.buffer.write(bytes([255, 254]))", "no answer"),
        ("raise SystemExit(3)", "exited with 3"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_child_that_says_nonsense_is_not_believed(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    """Another program stands in the child's place."""
    package = tmp_path / "elsewhere" / "lightship_agent" / "update"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_bytes(b"")
    (package / "check_child.py").write_text(script)
    monkeypatch.setattr(checking, "_PACKAGE_ROOT", tmp_path / "elsewhere")
    error = ended(ground.request())
    assert error.code == "update.check-failed"
    assert words in str(error)


@pytest.mark.parametrize("code", [code for code in CODES if code.startswith(("trust.", "link.", "storage.", "enrol."))])
def test_an_error_of_the_child_is_the_same_error_here(code: str) -> None:
    error = checking._error(checking.ChildReply(code=code, message="said", remedy="do"))
    assert (error.code, error.message, error.remedy) == (code, "said", "do")
    assert code.startswith(error.family)
    assert error.family


def test_a_device_without_an_identity_says_so(ground: Ground, tmp_path: Path) -> None:
    assert ended(ground.request(state_dir=str(tmp_path / "nobody"))).code == "enrol.not-enrolled"


# A file in place of the server ----------------------------------------------------------------------------------------


class FolderFetcher(FetcherInterface):
    """Metadata from a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = self._folder / url.rpartition("/")[2]
        if not path.exists():
            raise DownloadHTTPError(url, 404)
        return iter([path.read_bytes()])


@contextmanager
def open_folder(path: Path, _cache: Path, _now: float) -> Iterator[FolderFetcher]:
    yield FolderFetcher(path)


def carried(ground: Ground, folder: Path) -> Path:
    """The repository's metadata as files."""
    folder.mkdir()
    for role, versions in ground.repository.published.items():
        for version, data in versions:
            (folder / ("timestamp.json" if role == "timestamp" else f"{version}.{role}.json")).write_bytes(data)
    return folder


def test_metadata_may_come_from_a_file_as_well(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = carried(ground, tmp_path / "usb")
    monkeypatch.setattr(checking, "open_folder", open_folder, raising=False)
    source = FileSource(path=str(folder), opener="lightship_agent.update.check:open_folder")
    assert check(ground.request(source=source)).bundle.path == NEW
    assert ground.repository.asked == []


@pytest.mark.parametrize("opener", ["", "os:system", "lightship_agent.update.check", "lightship_agent.files:a b"])
def test_only_this_package_opens_files(ground: Ground, opener: str) -> None:
    code = ended(ground.request(source=FileSource(path="/tmp", opener=opener))).code
    assert code == "update.check-failed"
