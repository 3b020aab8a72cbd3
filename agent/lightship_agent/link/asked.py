"""Link: what the control plane asks of this device, and the answers.

    rebirth     say again who we are, and how
    loglevel    log more, or less, for a while
    snapshot    how the agent is, without secrets, and its latest log lines

Rules:
* a command may come by MQTT, or with the answer to a poll, or by both: it is carried out once, and what comes again is
  dropped, also after a restart;
* what has expired by the device's own clock is dropped, and so is what would be valid for longer than a day: nobody may
  keep it for later;
* callbacks only put into a queue; the reporter's thread carries out and answers;
* no verb changes what is served, and none takes a path, a program or an address;
* everything that is asked is in the log, with its id and what became of it.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from lightship_agent.contract.codes import LightshipError, LinkError, SettingsError
from lightship_agent.contract.messages import MAX_ASK_SECONDS, Command, Reply
from lightship_agent.files import write_durably

log = logging.getLogger(__name__)

FILE: Final = "asked.json"
LEVELS: Final = ("debug", "info", "warning", "error")
LOG_SECONDS: Final = 900
MAX_LOG_SECONDS: Final = 86_400
_WAITING: Final = 32
_REMEMBERED: Final = 500

Act = Callable[[Command], dict[str, Any]]


class _Asked(NamedTuple):
    verb: str
    command: Command


class Asked:
    """The commands that want an answer.

    Args:
        state_dir: where the ids of what was carried out are kept.
        acts: what each verb does, by the verb; it returns what is to be answered.
        deliver: hands an answer over; False, or a LightshipError: later again.
        clock: seconds since 1970, the best this device has.
    """

    def __init__(
        self,
        state_dir: Path,
        acts: Mapping[str, Act],
        deliver: Callable[[Reply], bool],
        clock: Callable[[], float],
    ) -> None:
        self._path = state_dir / FILE
        self._acts = acts
        self._deliver = deliver
        self._clock = clock
        self._waiting: queue.Queue[_Asked] = queue.Queue(_WAITING)
        self._answers: deque[Reply] = deque(maxlen=_WAITING)
        self._done = self._read()

    def hear(self, verb: str, command: Command) -> bool:
        """Take a command in; whether there is something to do now. Never blocks."""
        try:
            self._waiting.put_nowait(_Asked(verb, command))
        except queue.Full:
            log.warning("asked: %s %s is dropped: too many are waiting", verb, command.id)
            return False
        return True

    def work(self) -> None:
        """Carry out what was asked, and hand over the answers that wait."""
        while not self._waiting.empty():
            asked = self._waiting.get_nowait()
            reply = self._answer(*asked)
            if reply is not None:
                self._answers.append(reply)
        while self._answers:
            if not self._deliver(self._answers[0]):
                return
            self._answers.popleft()

    def _answer(self, verb: str, command: Command) -> Reply | None:
        refusal = self._refusal(command)
        if refusal is not None:
            log.warning("asked: %s %s: %s: %s", verb[:40], command.id, refusal.code, refusal)
            return None
        try:
            self._remember(command)
            act = self._acts.get(verb)
            if act is None:
                raise LinkError("link.unknown-command", f"Expected {', '.join(self._acts)}, found {verb[:40]!r}.")
            body = msgspec.json.encode(act(command))
        except LightshipError as e:
            log.warning("asked: %s %s: %s: %s", verb[:40], command.id, e.code, e)
            return Reply(
                id=command.id, verb=verb[:40], at=int(self._clock() * 1_000), code=e.code, detail=str(e)[:2_000]
            )
        log.info("asked: %s %s is done", verb, command.id)
        return Reply(id=command.id, verb=verb, at=int(self._clock() * 1_000), body=body)

    def _refusal(self, command: Command) -> LinkError | None:
        now = self._clock()
        if not command.id or command.expires <= now:
            return LinkError("link.expired-command", f"It expired at {command.expires}, and it is {now:.0f} here.")
        if command.expires > now + MAX_ASK_SECONDS:
            return LinkError("link.expired-command", f"It would be valid for more than {MAX_ASK_SECONDS} s.")
        if command.id in self._done:
            return LinkError("link.replayed-command", "It was carried out before.")
        return None

    def _remember(self, command: Command) -> None:
        """Before it is carried out: a cut in between loses a command, and never does one twice."""
        now = self._clock()
        self._done = {name: until for name, until in self._done.items() if until > now}
        while len(self._done) >= _REMEMBERED:
            del self._done[min(self._done, key=self._done.__getitem__)]
        self._done[command.id] = command.expires
        write_durably(self._path, msgspec.json.encode(self._done))

    def _read(self) -> dict[str, int]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=dict[str, int])
        except (OSError, msgspec.MsgspecError):
            return {}


class LogLevel:
    """The level of this process's log, and when it is as before again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._before: int | None = None
        self._until = 0.0

    def change(self, command: Command) -> dict[str, Any]:
        """Another level, for a while.

        Raises:
            SettingsError: settings.invalid.
        """
        seconds = command.seconds or LOG_SECONDS
        if command.level not in LEVELS or seconds > MAX_LOG_SECONDS:
            message = (
                f"Expected one of {', '.join(LEVELS)} for at most {MAX_LOG_SECONDS} s, found {command.level!r} for "
            )
            raise SettingsError("settings.invalid", f"{message}{seconds} s.")
        root = logging.getLogger()
        if self._before is None:
            self._before = root.level
        root.setLevel(command.level.upper())
        self._until = self._clock() + seconds
        log.warning("the log's level is %s for %d s", command.level, seconds)
        return {"level": command.level, "seconds": seconds, "then": logging.getLevelName(self._before).lower()}

    def tick(self) -> None:
        """As before, once the time is up."""
        if self._before is not None and self._clock() >= self._until:
            logging.getLogger().setLevel(self._before)
            self._before = None
            log.warning("the log's level is as before")
