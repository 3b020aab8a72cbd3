"""Monitor: the modes in which the agent does less than all its work, since when, and what that means.

Rules:
* pure: what is wrong comes in as codes, the time as an argument;
* every mode but one leaves the agent answering: without a model it is unhealthy, with anything else degraded;
* a mode has begun when it was first seen, and is over when it is not seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

from lightship_agent.contract.codes import CODES

State = Literal["ok", "degraded", "unhealthy"]

_UPDATES: Final = "Serving goes on with the model that is committed; updates stand still until this is settled."
#: What a mode means for whoever asks the agent; other codes say it themselves.
MEANS: Final[dict[str, str]] = {
    "serving.no-model": "No prediction is possible until a model is assigned and tried.",
    "trust.expired": _UPDATES,
    "storage.full": "Serving goes on; reports are kept in memory and end with the process, and no bundle is fetched.",
    "link.taken-over": "Serving goes on; reports go over HTTPS, and another program under this device's name is heard.",
    "link.unacknowledged": "Serving goes on; reports go over HTTPS. Look at the broker: `lightship broker check`.",
    "device.throttled": "Serving goes on, slower: the processor is held back by heat or power.",
    "device.memory": "Serving goes on; another model may find no room, and the kernel may end the agent.",
    "device.clock": "Serving goes on; the time is that of the last authenticated statement, and not the system's.",
    "update.beside": "Serving goes on; a version that shall run beside it does not.",
}
_UNHEALTHY: Final = "serving.no-model"


class Mode(NamedTuple):
    """One mode."""

    code: str
    since: int  # Unix milliseconds
    means: str


class Degraded:
    """Remembers since when."""

    def __init__(self) -> None:
        """All is well."""
        self._since: dict[str, int] = {}

    def seen(self, codes: Iterable[str], now_ms: int) -> tuple[Mode, ...]:
        """The modes of these codes, each once, in their order."""
        self._since = {code: self._since.get(code, now_ms) for code in codes}
        return tuple(Mode(code, since, means(code)) for code, since in self._since.items())


def means(code: str) -> str:
    """What that code means for whoever asks."""
    if code in MEANS:
        return MEANS[code]
    return _UPDATES if code.startswith("trust.") else CODES[code]


def state_of(codes: Iterable[str]) -> State:
    """How the agent is, all in all."""
    found = set(codes)
    return "unhealthy" if _UNHEALTHY in found else "degraded" if found else "ok"
