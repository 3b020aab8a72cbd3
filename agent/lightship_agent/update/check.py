"""Update: the whole verification of an assignment, in a process of its own.

The TUF client, its signature library and the HTTP client cost the agent memory that it would never get back, for
something it does a few times a month; and they are what meets foreign bytes first. So a child does it, and ends.
docs/decisions/0009 has the figures.

Rules:
* `check` is the work, `check_in_child` the same with a process around it: the same arguments, reply and errors;
* the child gets its request on standard input, a bare environment and, as its only argument, how long it may live;
  keys it is told by path;
* address space, CPU, file size and wall time are bounded, and so is the one line of JSON that is its answer;
* a child that dies by any means is an error of the family update.*; an error it reports is raised here as itself;
* nothing here imports the TUF client: that happens in `check`, and so in the child.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from lightship_agent.contract.assignment import MODES, Assignment, Beside, check_assignment
from lightship_agent.contract.codes import CODES, LightshipError, TrustError, UpdateError
from lightship_agent.contract.transport import TRANSPORT_SUFFIX, delta_path
from lightship_agent.files import scratch

from .machine import floor_for
from .released import ReleasedFile

if TYPE_CHECKING:
    from tuf.ngclient.fetcher import FetcherInterface

    from .releases import Releases

METADATA_FOLDER: Final = "tuf"
_TIMEOUT: Final = 180.0  # wall seconds
_MAX_REPLY: Final = 256 * 1024  # bytes
_PASSED_ON: Final = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR")
_PROXIES: Final = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
_PACKAGE_ROOT: Final = Path(__file__).resolve().parents[2]


class ServerSource(msgspec.Struct, frozen=True, kw_only=True, tag="server"):
    """The control plane, over mutual TLS with the identity in the state directory."""

    metadata_url: str


class FileSource(msgspec.Struct, frozen=True, kw_only=True, tag="file"):
    """A file that somebody carried here.

    `opener` is the `module:function` of this package that opens it: a context manager from its path, the folder of the
    metadata that verified before, and the time, to a fetcher of the TUF client. The metadata is asked for under
    `metadata_url`.
    """

    path: str
    opener: str
    metadata_url: str = "file:///metadata/"


class CheckRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be verified, and for whom."""

    state_dir: str  # has the identity, and the metadata cache
    device: str
    envelope: bytes  # as it came: nothing in it is believed yet
    floor: int  # the highest assignment `seq` accepted so far,
    director: str = ""  # and the director's key set that signed it
    now: float  # Unix seconds, of the device's clock
    source: ServerSource | FileSource
    current_sha256: str = ""  # the bundle that a patch could start from
    held: tuple[tuple[str, str], ...] = ()  # path and sha256 of what the store holds


class CheckedBeside(msgspec.Struct, frozen=True, kw_only=True):
    """A companion that the assignment names: the released files that bring it, or why it is refused."""

    beside: Beside
    transport: ReleasedFile | None = None
    delta: ReleasedFile | None = None
    code: str = ""
    message: str = ""


class CheckReply(msgspec.Struct, frozen=True, kw_only=True):
    """What this device shall run, and the released files that bring it."""

    assignment: Assignment
    bundle: ReleasedFile
    transport: ReleasedFile
    delta: ReleasedFile | None = None
    beside: tuple[CheckedBeside, ...] = ()
    director: str = ""  # the key set that signed the assignment
    metadata_expires: dict[str, int] = {}  # Unix seconds by role
    revoked: tuple[str, ...] = ()  # the digests of what is held and no longer in the release list


class ChildRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the child reads: the request, and which proxies lead to the network (they may name a password)."""

    check: CheckRequest
    proxies: dict[str, str] = {}


class ChildReply(msgspec.Struct, frozen=True, kw_only=True):
    """The line the child prints: a reply, or what was refused and why."""

    reply: CheckReply | None = None
    code: str = ""
    message: str = ""
    remedy: str = ""


def check(request: CheckRequest) -> CheckReply:
    """Refresh the signed metadata, and verify the assignment against it.

    Raises:
        TrustError: trust.*.
        LinkError: link.unreachable, link.slow.
        StorageError: storage.full, storage.unwritable, storage.busy, storage.corrupt.
        EnrolError: enrol.not-enrolled.
        MediaError: media.*, of a file that was carried here.
    """
    from lightship_agent.link.identity import load_identity

    from .releases import Releases

    folder = Path(request.state_dir)
    identity = load_identity(folder)
    now = datetime.fromtimestamp(request.now, UTC)
    with _open_source(request) as (fetcher, url):
        releases = Releases(folder / METADATA_FOLDER, fetcher, url, identity.tuf_root, now=now)
        assignment = releases.open_assignment(request.envelope)
        director = releases.director
        floor = floor_for(request.floor, request.director, director)
        check_assignment(assignment, device=request.device, floor=floor, now=request.now)
        return CheckReply(
            assignment=assignment,
            bundle=releases.check_released(assignment),
            transport=releases.find(assignment.path + TRANSPORT_SUFFIX),
            delta=_find_delta(releases, assignment, request.current_sha256),
            beside=tuple(_check_beside(releases, b, request.current_sha256) for b in assignment.beside),
            director=director,
            metadata_expires={role: int(at.timestamp()) for role, at in releases.expires.items()},
            revoked=tuple(sha256 for path, sha256 in request.held if not _is_listed(releases, path, sha256)),
        )


def _is_listed(releases: Releases, path: str, sha256: str) -> bool:
    found = _find_optional(releases, path)
    return found is not None and found.sha256 == sha256


def _check_beside(releases: Releases, beside: Beside, current: str) -> CheckedBeside:
    """The companion, held to the same as what it runs beside; one that is refused costs the assignment nothing."""
    if beside.mode not in MODES:
        message = f"This agent knows no mode {beside.mode[:40]!r}."
        return CheckedBeside(beside=beside, code="update.beside", message=message)
    try:
        releases.check_released(beside)
        transport = releases.find(beside.path + TRANSPORT_SUFFIX)
        return CheckedBeside(beside=beside, transport=transport, delta=_find_delta(releases, beside, current))
    except TrustError as e:
        if e.code != "trust.not-released":
            raise
        return CheckedBeside(beside=beside, code=e.code, message=str(e))


def _find_delta(releases: Releases, assignment: Assignment | Beside, current: str) -> ReleasedFile | None:
    """The patch from what is here; that there is none is no error, for it is only a shorter way."""
    if not current or current == assignment.sha256:
        return None
    return _find_optional(releases, delta_path(assignment.model, current, assignment.sha256))


def _find_optional(releases: Releases, path: str) -> ReleasedFile | None:
    try:
        return releases.find(path)
    except TrustError as e:
        if e.code != "trust.not-released":
            raise
        return None


@contextlib.contextmanager
def _open_source(request: CheckRequest) -> Iterator[tuple[FetcherInterface, str]]:
    source, folder = request.source, Path(request.state_dir)
    if isinstance(source, FileSource):
        module, _, name = source.opener.partition(":")
        if not module.startswith("lightship_agent.") or not name.isidentifier():
            raise UpdateError("update.check-failed", f"{source.opener!r} does not name an opener of this package.")
        opener = getattr(importlib.import_module(module), name)
        with opener(Path(source.path), folder / METADATA_FOLDER, request.now) as fetcher:
            yield fetcher, source.metadata_url
        return
    from lightship_agent.link.client import open_client
    from lightship_agent.link.identity import load_identity

    from .metadata_fetcher import MetadataFetcher

    with open_client(load_identity(folder).tls_context()) as http:
        yield MetadataFetcher(http), source.metadata_url


def check_in_child(
    request: CheckRequest, timeout: float = _TIMEOUT, *, cancelled: Callable[[], bool] = lambda: False
) -> CheckReply:
    """`check`, in a process that ends with it.

    Args:
        request: what is to be verified.
        timeout: wall seconds.
        cancelled: asked several times a second; once it is true the child is stopped.

    Raises:
        UpdateError: update.check-failed, update.check-timeout, update.interrupted.
        LightshipError: whatever `check` raises, as the same class and code.
    """
    proxies = {name: value for name, value in os.environ.items() if name.lower() in _PROXIES}
    whole = msgspec.json.encode(ChildRequest(check=request, proxies=proxies))
    status, output, errors = _run_child(whole, timeout, cancelled)
    if status != 0:
        raise _death(status, errors)
    answer = _read_answer(output)
    if answer.code:
        raise _error(answer)
    if answer.reply is None:
        raise UpdateError("update.check-failed", "The checking process gave neither a reply nor an error.")
    return answer.reply


def child_environment() -> dict[str, str]:
    """The child's whole environment; the package's own folder is on the path, however it was installed."""
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {**passed_on, "PYTHONPATH": str(_PACKAGE_ROOT), "MALLOC_ARENA_MAX": "1"}


def _run_child(request: bytes, timeout: float, cancelled: Callable[[], bool]) -> tuple[int, bytes, bytes]:
    """Exit status (negative for a signal), and what the child wrote. Files, not pipes: nothing can fill or block."""
    with contextlib.ExitStack() as files:
        try:
            stdin, output, errors = (files.enter_context(scratch("check")) for _ in range(3))
            stdin.write(request)
            stdin.seek(0)
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "lightship_agent.update.check_child", str(math.ceil(timeout) + 5)],
                stdin=stdin,
                stdout=output,
                stderr=errors,
                env=child_environment(),
                cwd="/",
                start_new_session=True,
            )
        except OSError as e:
            raise UpdateError("update.check-failed", f"The checking process can't be started: {e}.") from e
        try:
            status = _wait(child, timeout, cancelled)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        output.seek(0)
        errors.seek(0)
        return status, output.read(_MAX_REPLY + 1), errors.read(_MAX_REPLY)


def _wait(child: subprocess.Popen[bytes], timeout: float, cancelled: Callable[[], bool]) -> int:
    end = time.monotonic() + timeout
    while True:
        try:
            return child.wait(timeout=max(0.01, min(0.2, end - time.monotonic())))
        except subprocess.TimeoutExpired as e:
            if cancelled():
                raise UpdateError("update.interrupted", "The agent was stopped while an assignment was checked.") from e
            if time.monotonic() >= end:
                message = f"The check did not finish within {timeout:g} s and was stopped."
                raise UpdateError("update.check-timeout", message) from e


def _death(status: int, errors: bytes) -> UpdateError:
    if status in (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGALRM):
        return UpdateError("update.check-timeout", f"The checking process died of {signal.Signals(-status).name}.")
    lines = errors.decode(errors="replace").strip().splitlines()
    words = lines[-1][:300] if lines else "it said nothing"
    cause = f"died of {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"
    return UpdateError("update.check-failed", f"The checking process {cause}: {words}.")


def _read_answer(output: bytes) -> ChildReply:
    if len(output) > _MAX_REPLY:
        raise UpdateError("update.check-failed", f"The checking process said more than {_MAX_REPLY} bytes.")
    lines = output.strip().splitlines()
    try:
        return msgspec.json.decode(lines[-1] if lines else b"", type=ChildReply)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise UpdateError("update.check-failed", f"The checking process gave no answer: {e}.") from e


def _error(answer: ChildReply) -> LightshipError:
    """The error that the child reported, as the class its code belongs to."""
    kinds = {kind.family: kind for kind in LightshipError.__subclasses__()}
    kind = kinds.get(answer.code.partition(".")[0] + ".")
    if kind is None or answer.code not in CODES:
        return UpdateError("update.check-failed", f"The checking process gave an unknown code {answer.code[:60]!r}.")
    return kind(answer.code, answer.message, remedy=answer.remedy)


def read_request(data: bytes) -> ChildRequest:
    """The request as the child gets it.

    Raises:
        UpdateError: update.check-failed.
    """
    try:
        return msgspec.json.decode(data, type=ChildRequest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise UpdateError("update.check-failed", f"The request can't be read: {e}.") from e
