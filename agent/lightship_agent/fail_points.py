"""Fail points: named instructions at which a crash test may have this process fail, of either program.

    LIGHTSHIP_FAIL_POINT=soaking                                     die of SIGKILL there
    LIGHTSHIP_FAIL_POINT='before-save-trying>file-written(update.json)=enospc,soaking=hang/always'

One order is `[earlier[(glob)]>]point[(glob)][=action][@pass][/always]`, several are separated by commas:

    action     kill (the default) · hang · enospc · erofs · error:<code>, a code of contract.codes
    (glob)     only for things of such a name, where the point has a subject: a file, say
    earlier>   only once that other point was passed
    @pass      only at that pass of the point, counted from 1 in each process

Rules:
* without LIGHTSHIP_FAIL_POINT at the start of the process nothing here does anything, whatever is set later;
* with LIGHTSHIP_FAIL_POINT_FOLDER an order is carried out once, over all restarts, unless it says `/always`, and every
  pass is noted in `<folder>/trace`; without it, an order is carried out at every pass;
* every name in the code is listed in FAIL_POINTS, and the other way round; a test compares them.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
import re
import signal
import threading
import time
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from lightship_agent.contract.codes import CODES, LightshipError, SettingsError

#: Every fail point, and where it stands. `{phase}` is a phase of the update machine.
FAIL_POINTS: Final[dict[str, str]] = {
    "before-save-{phase}": "The machine has decided to enter the phase; update.json still holds the one before.",
    "after-save-{phase}": "update.json holds the phase; none of its actions has begun.",
    "checking": "An envelope has come; the process that verifies it is not yet started.",
    "fetching": "Before the bundle's transport file is looked up and downloaded.",
    "unpacking": "The transport file is downloaded whole, and not yet unpacked.",
    "before-store": "A bundle is downloaded, unpacked and verified, and not yet in the store.",
    "probing": "Before the probe process is started.",
    "standing-beside": "A companion is tried, and under trial; it is to be loaded beside what serves.",
    "soaking": "The new model serves, and begins to soak.",
    "reaching": "The new model has soaked; the control plane is to be reached.",
    "restoring": "At a start or after a failure, before what is committed serves again.",
    "file-begun": "The temporary file exists, and is empty. The subject is the file's name.",
    "file-written": "The temporary file is written and synced, and not yet renamed. The subject is the file's name.",
    "file-renamed": "The file is in its place; the folder is not yet synced. The subject is the file's name.",
    "collecting": "Before a bundle or a download that nobody needs is removed. The subject is its name.",
    "outbox-opened": "A segment of the outbox is open; the new records are not yet written.",
    "outbox-written": "The new records are written, and not yet synced.",
    "reporting": "A step of an update is to be reported, and not yet in the outbox. The subject is the step.",
    "reported": "The step is in the outbox, and not yet sent. The subject is the step.",
    "sending": "A batch of reports is about to be sent.",
    "sent": "The server has taken a batch of reports; that it did is not yet noted.",
    "enrol-answered": "The server has certified the new key; of it all only the key is on disk.",
    "before-commit": "Control plane: a transaction is complete, and not yet committed.",
    "after-commit": "Control plane: a transaction is committed.",
    "advancing": "Control plane: a rollout is to change; nothing of it is written. The subject is its next status.",
    "assigning": "Control plane: an assignment is to be signed, within a transaction. The subject is the device.",
    "alerting": "Control plane: a message is claimed, and not yet sent. The subject is its channel.",
    "alerted": "Control plane: a message is taken, and that is not yet noted. The subject is its channel.",
    "promoting": "Control plane: a version is to become the champion, within a transaction.",
}

_ORDER: Final = re.compile(
    r"(?:(?P<earlier>[a-z-]+)(?:\((?P<earlier_glob>[^()]*)\))?>)?(?P<point>[a-z-]+)(?:\((?P<glob>[^()]*)\))?"
    r"(?:=(?P<action>kill|hang|enospc|erofs|error:(?P<code>[a-z.-]+)))?(?:@(?P<pass>[1-9]\d*))?(?P<always>/always)?"
)


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to do at a fail point, and when."""

    point: str
    glob: str = "*"
    earlier: str = ""
    earlier_glob: str = "*"
    action: str = "kill"
    code: str = ""
    at_pass: int = 0  # 0: at any
    always: bool = False


def parse_orders(text: str) -> tuple[Order, ...]:
    """The orders in `text`.

    Raises:
        SettingsError: settings.invalid.
    """
    return tuple(_parse_order(part.strip()) for part in text.split(",") if part.strip())


def _parse_order(text: str) -> Order:
    match = _ORDER.fullmatch(text)
    if match is None or (match["code"] and match["code"] not in CODES):
        message = (
            f"LIGHTSHIP_FAIL_POINT: expected [earlier[(glob)]>]point[(glob)][=action][@pass][/always], found {text!r}."
        )
        raise SettingsError("settings.invalid", message)
    return Order(
        point=match["point"],
        glob=match["glob"] or "*",
        earlier=match["earlier"] or "",
        earlier_glob=match["earlier_glob"] or "*",
        action=(match["action"] or "kill").partition(":")[0],
        code=match["code"] or "",
        at_pass=int(match["pass"] or 0),
        always=bool(match["always"]),
    )


class Saboteur:
    """Carries orders out in this process."""

    def __init__(self, orders: tuple[Order, ...], folder: Path | None) -> None:
        """Nothing was passed yet; `folder` remembers what was done over restarts."""
        self._orders = orders
        self._folder = folder
        self._lock = threading.Lock()
        self._earlier: set[int] = set()  # orders whose earlier point was passed
        self._counts: Counter[int] = Counter()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def passed(self, point: str, subject: str) -> None:
        """This thread is at `point`: fail there if that was ordered."""
        with self._lock:
            self._note(f"{os.getpid()} {point} {subject}")
            due = [i for i, order in enumerate(self._orders) if self._is_due(i, order, point, subject)]
            self._earlier |= {
                i for i, o in enumerate(self._orders) if _matches(o.earlier, o.earlier_glob, point, subject)
            }
            for i in due:
                self._note(f"{os.getpid()} ! {self._orders[i].action}")
        for i in due:
            _carry_out(self._orders[i])

    def _is_due(self, i: int, order: Order, point: str, subject: str) -> bool:
        if not _matches(order.point, order.glob, point, subject) or (order.earlier and i not in self._earlier):
            return False
        self._counts[i] += 1
        if order.at_pass not in (0, self._counts[i]):
            return False
        if self._folder is None or order.always:
            return True
        mark = self._folder / f"{zlib.crc32(msgspec.json.encode(order)):08x}.done"
        if mark.exists():
            return False
        mark.touch()
        return True

    def _note(self, line: str) -> None:
        if self._folder is None:
            return
        # One write of a whole line: nothing of it is lost when the process dies at the next instruction. A disk that
        # a test has filled must fail the agent where it writes, and not here.
        with contextlib.suppress(OSError):
            descriptor = os.open(self._folder / "trace", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                os.write(descriptor, f"{line}\n".encode())
            finally:
                os.close(descriptor)


def _matches(name: str, glob: str, point: str, subject: str) -> bool:
    return name == point and fnmatch.fnmatchcase(subject, glob)


def fail_point(point: str, subject: str = "") -> None:
    """Fail here, if a crash test ordered it when this process was started."""
    if _SABOTEUR is not None:
        _SABOTEUR.passed(point, subject)


def saboteur_for(environment: Mapping[str, str]) -> Saboteur | None:
    """Who carries out what `environment` orders; None where it orders nothing.

    Raises:
        SettingsError: settings.invalid.
    """
    text = environment.get("LIGHTSHIP_FAIL_POINT")
    if text is None:
        return None
    folder = environment.get("LIGHTSHIP_FAIL_POINT_FOLDER")
    return Saboteur(parse_orders(text), Path(folder) if folder else None)


def _carry_out(order: Order) -> None:
    if order.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if order.action == "hang":
        _hang()
    if order.action == "error":
        kind = next(k for k in LightshipError.__subclasses__() if order.code.startswith(k.family))
        raise kind(order.code, "A crash test ordered this error.")
    number = errno.EROFS if order.action == "erofs" else errno.ENOSPC
    raise OSError(number, os.strerror(number))


def _hang() -> NoReturn:
    while True:
        time.sleep(3_600)


_SABOTEUR: Final = saboteur_for(os.environ)
