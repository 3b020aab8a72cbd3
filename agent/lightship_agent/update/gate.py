"""Update: the gate, whether this is the moment to download or to install.

Rules:
* "not now" is `update.deferred`: it blames nobody, says why, and until when where that is known;
* to download, the window must be open and the network of an allowed class; to install, the window must be open, and
  neither the veto file nor the veto command may object; what somebody carried here may be vetoed, at any hour;
* what can't be read is not a yes: an unknown network is not an allowed one, a veto file that can't be looked at and a
  veto command that fails, hangs or is missing say "later", with a warning in the log;
* the veto command is started without a shell, with no environment but paths and language, and is stopped after 30 s.
"""

from __future__ import annotations

import logging
import os
import select
import shlex
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

import msgspec

from lightship_agent.contract.codes import SettingsError, UpdateError
from lightship_agent.settings import Settings

from .windows import Windows, is_open, next_opening, parse_windows

log = logging.getLogger(__name__)

Kind = Literal["download", "install", "veto"]

#: The exit status that says "later": EX_TEMPFAIL of sysexits.h.
LATER: Final = 75
VETO_SECONDS: Final = 30.0
#: Of the environment, all that a veto command gets.
_ENVIRONMENT: Final = ("PATH", "LANG", "LC_ALL", "TZ")
_MAX_SAID: Final = 500  # bytes of a file or of an output that are read as a reason


class DeferredError(UpdateError):
    """Not now. `until` is the Unix time (seconds) at which the same question may be answered otherwise, if known."""

    def __init__(self, code: str, message: str, *, remedy: str = "", until: float | None = None) -> None:
        """As every error, and an `until` for whoever plans the next look."""
        super().__init__(code, message, remedy=remedy)
        self.until = until


class Rules(msgspec.Struct, frozen=True):
    """What the settings say about when."""

    download_window: Windows = ()
    install_window: Windows = ()
    network_class_file: Path | None = None
    network_classes: frozenset[str] = frozenset()
    veto_file: Path | None = None
    veto_command: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: Settings) -> Rules:
        """The rules in the settings.

        Raises:
            SettingsError: settings.invalid.
        """
        classes = frozenset(word.strip().lower() for word in settings.download_network_classes.split(","))
        rules = cls(
            download_window=parse_windows(settings.download_window, "download_window"),
            install_window=parse_windows(settings.install_window, "install_window"),
            network_class_file=_path(settings.network_class_file),
            network_classes=classes - {""},
            veto_file=_path(settings.veto_file),
            veto_command=_command(settings.veto_command),
        )
        if rules.network_classes and rules.network_class_file is None:
            message = "download_network_classes: expected network_class_file to be set as well, found nothing."
            raise SettingsError("settings.invalid", message, remedy="Name the file that tells the network's class.")
        return rules


def local_now() -> datetime:
    """The wall clock of this site, without a zone."""
    return datetime.now(UTC).astimezone().replace(tzinfo=None)


class Gate:
    """Asked before each download and each installation."""

    def __init__(
        self, rules: Rules, *, now: Callable[[], datetime] = local_now, veto_seconds: float = VETO_SECONDS
    ) -> None:
        """Nothing is asked yet; `now` is the local wall clock, without a zone."""
        self._rules = rules
        self._now = now
        self._veto_seconds = veto_seconds

    def check(self, kind: Kind) -> None:
        """Return if it may be done now.

        Raises:
            DeferredError: update.deferred, with the reason.
        """
        if kind == "download":
            self._check_window("downloads", self._rules.download_window)
            self._check_network()
            return
        if kind == "install":
            self._check_window("installations", self._rules.install_window)
        self._check_veto_file()
        if self._rules.veto_command:
            _ask(self._rules.veto_command, self._veto_seconds)

    def watch(self, stopped: Callable[[], bool], *, every: float = 5.0) -> Callable[[], bool]:
        """`stopped`, for a download that goes on: every so many seconds it also checks whether it still may go on.

        Raises:
            DeferredError: update.deferred, out of what is returned.
        """
        due = time.monotonic() + every

        def still() -> bool:
            nonlocal due
            if time.monotonic() >= due:
                self.check("download")
                due = time.monotonic() + every
            return stopped()

        return still

    def _check_window(self, what: str, windows: Windows) -> None:
        local = self._now()
        if not is_open(windows, local):
            opens = next_opening(windows, local)
            message = f"The window for {what} is closed until {opens:%a %Y-%m-%d %H:%M} local time."
            raise DeferredError("update.deferred", message, until=opens.timestamp())

    def _check_network(self) -> None:
        allowed, path = self._rules.network_classes, self._rules.network_class_file
        if not allowed or path is None:
            return
        try:
            found = _said(path).lower()
        except OSError as e:
            message = f"The network's class is not known ({path}: {e.strerror or e}), and only some are allowed."
            raise DeferredError("update.deferred", message) from e
        if found not in allowed:
            raise DeferredError(
                "update.deferred", f"The network is {found!r}; downloads are allowed on {', '.join(sorted(allowed))}."
            )

    def _check_veto_file(self) -> None:
        path = self._rules.veto_file
        if path is None:
            return
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as e:
            log.warning("gate: can't look at %s: %s", path, e)
            message = f"Whether {path} objects can't be seen: {e.strerror or e}."
            raise DeferredError("update.deferred", message) from e
        try:
            reason = _said(path)
        except OSError:
            reason = ""
        raise DeferredError("update.deferred", f"{path} objects: {reason or 'it gives no reason'}.")


def _path(text: str) -> Path | None:
    return Path(text) if text.strip() else None


def _command(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as e:
        message = f"veto_command: expected words as a shell would quote them, found {text[:200]!r}: {e}."
        raise SettingsError("settings.invalid", message) from e


def _said(path: Path) -> str:
    """The beginning of what is in a regular file; what else has that name (a pipe, say) must not hold us up."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "not a regular file")
        return _readable(os.read(descriptor, _MAX_SAID))
    finally:
        os.close(descriptor)


def _readable(data: bytes) -> str:
    """One line that may stand in a log and in a report."""
    text = data[:_MAX_SAID].decode(errors="replace")
    return "".join(c if c.isprintable() else " " for c in text).strip()


def _ask(command: tuple[str, ...], seconds: float) -> None:
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    except (OSError, ValueError) as e:
        log.warning("gate: the veto command can't be started, which counts as later: %s", e)
        message = f"The veto command {command[0]!r} can't be started: {e}."
        raise DeferredError("update.deferred", message) from e
    with process:
        status, said = _outcome(process, time.monotonic() + seconds)
    if status == 0:
        return
    if status == LATER:
        raise DeferredError("update.deferred", f"The veto command says later: {said or 'it gives no reason'}.")
    how = f"did not end within {seconds:g} s" if status is None else f"ended with status {status}"
    log.warning("gate: the veto command %s, which counts as later: %s", how, said)
    raise DeferredError(
        "update.deferred", f"The veto command {how}, which counts as later: {said or 'it said nothing'}."
    )


def _outcome(process: subprocess.Popen[bytes], end: float) -> tuple[int | None, str]:
    """Its exit status, None if it had to be stopped at `end`, and the beginning of what it said.

    All it says is read, so that it never waits for us, and little of it kept.
    """
    assert process.stdout is not None
    pipe, head, open_ = process.stdout.fileno(), b"", True
    while process.poll() is None and time.monotonic() < end:
        if not open_:
            time.sleep(0.02)
            continue
        data = _read(pipe, 0.1)
        open_ = data != b""
        head = (head + (data or b""))[:_MAX_SAID]
    status = process.poll()
    if status is None:
        # Its whole session: what it started has no business here either. It is not reaped yet, so the id is its own.
        os.killpg(process.pid, signal.SIGKILL)
    elif open_:
        head = (head + (_read(pipe, 0.0) or b""))[:_MAX_SAID]
    return status, _readable(head)


def _read(pipe: int, seconds: float) -> bytes | None:
    """What is in the pipe: None if nothing came in time, nothing at all once it is closed."""
    ready, _, _ = select.select([pipe], [], [], seconds)
    return os.read(pipe, 65_536) if ready else None
