"""Logs of both programs: words for people, or one JSON object a line for machines; the latest lines in memory.

    {"ts": "2026-11-25T20:00:00.123Z", "level": "warning", "program": "lightship-agent",
     "logger": "lightship_agent.app", "message": "report: link.unreachable: …", "code": "link.unreachable",
     "device": "press-12", …}

Rules:
* one event is one line, whatever is in it; field names are those of `FIELDS` and keep their meaning;
* `code` is there when the event has one of ours: given with `extra={"code": …}`, or the error's own, or the first that
  the message names;
* what is kept in memory is bounded, and what leaves with a snapshot has no secrets in it (`redacted`).
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections import deque
from typing import Final

from lightship_agent.contract.codes import CODES, LightshipError

#: What a line may hold, and what it means.
FIELDS: Final[dict[str, str]] = {
    "ts": "UTC, RFC 3339, milliseconds",
    "level": "debug, info, warning, error or critical",
    "program": "lightship-agent or lightship",
    "logger": "the module that says it",
    "message": "what happened, in words",
    "thread": "the thread's name",
    "pid": "the process",
    "code": "the code of docs/reference/errors.md, where it has one",
    "device": "the device's id; absent in the control plane, unless the event is about one",
    "error": "the traceback, where there is one",
}
FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
NOISY: Final = ("httpx", "httpcore", "tuf", "alembic", "uvicorn.error")
KEPT_LINES: Final = 200
_LONGEST: Final = 500  # characters of a line that is kept
_CODE: Final = re.compile(r"\b([a-z]+\.[a-z]+(?:-[a-z]+)*)\b")
_SECRETS: Final = (
    (re.compile(r"(://)[^/@\s]+@"), r"\1…@"),
    (re.compile(r"(?i)\b(bearer|password|secret|pin|token)([\s:=]+)[^\s,;]+"), r"\1\2…"),
    (re.compile(r"\b[\w-]+\.[\w-]+\.[0-9a-f]{64}\b"), "…"),  # a join token
    (re.compile(r"-----BEGIN [^-]+-----.*?(?:-----END [^-]+-----|$)", re.DOTALL), "…"),
)


class JsonLines(logging.Formatter):
    """One JSON object a line.

    Args:
        program: whose log it is.
        device: the device's id, if it is a device's.
    """

    def __init__(self, program: str, device: str = "") -> None:
        super().__init__()
        self._program = program
        self.device = device

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        message = record.getMessage()
        device = getattr(record, "device", "") or self.device
        code = code_of(record, message)
        error = self.formatException(record.exc_info) if record.exc_info and record.exc_info[0] else ""
        event = {
            "ts": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "program": self._program,
            "logger": record.name,
            "message": message,
            "thread": record.threadName,
            "pid": record.process,
            **({"code": code} if code else {}),
            **({"device": device} if device else {}),
            **({"error": error} if error else {}),
        }
        return json.dumps(event, ensure_ascii=False, default=str)


class RecentLines(logging.Handler):
    """Keeps the latest lines, for a snapshot."""

    def __init__(self, lines: int = KEPT_LINES) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(FORMAT))
        self._lines: deque[str] = deque(maxlen=lines)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        try:
            self._lines.append(self.format(record)[:_LONGEST])
        except Exception:  # noqa: BLE001 - a handler's rule: what can't be said must not stop who says it
            self.handleError(record)

    def lines(self) -> list[str]:
        """The latest, the oldest first, without secrets."""
        return [redacted(line) for line in list(self._lines)]


def configure(program: str, level: str, form: str) -> None:
    """Have this process log to standard error; `form` is text or json."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(program) if form == "json" else logging.Formatter(FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)


def speak_for(device: str) -> None:
    """From now on this process's lines are of that device."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, JsonLines):
            handler.formatter.device = device


def code_of(record: logging.LogRecord, message: str) -> str:
    """The code of an event, or ""."""
    given = getattr(record, "code", "")
    if given:
        return str(given)
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, LightshipError):
        return error.code
    return next((word for word in _CODE.findall(message) if word in CODES), "")


def redacted(text: str) -> str:
    """Without what might be a password, a token or a key."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text
