"""Link: what Home Assistant is told of this device, where the operator asks for it.

Rules:
* off by default; what it is told is what a heartbeat says, and nothing of the data;
* one retained message describes the device and all its sensors, in the words of Home Assistant's MQTT discovery; turned
  off, it is removed, by whoever wrote it: which ones were written is remembered until the broker has taken them back;
* whether the device is there says the state that the control plane reads too. It is MessagePack, and so Home Assistant
  is told to decode nothing, and to look at the one byte that says so: its values are JSON, which it reads undecoded;
* pure, but for that memory.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from lightship_agent.contract import topics
from lightship_agent.contract.codes import StorageError
from lightship_agent.contract.messages import Heartbeat
from lightship_agent.files import write_durably

log = logging.getLogger(__name__)

FILE: Final = "home-assistant"
#: A device that reports so often less than it should has its values withdrawn.
MISSED: Final = 3
#: `State` is a map of which `on` is the first: 0x8n, 0xa2, "o", "n", and then 0xc3 for true.
AVAILABLE: Final = "{{ 'online' if value[4] == 195 else 'offline' }}"
_MEASURED: Final = "measurement"
_DIAGNOSTIC: Final = "diagnostic"


class Announcement(NamedTuple):
    """A retained message; an empty one removes what was there."""

    topic: str
    payload: bytes


#: Each sensor as Home Assistant describes one; what all have in common is added to it.
_SENSORS: Final[dict[str, dict[str, Any]]] = {
    "model": {"name": "Model", "icon": "mdi:brain"},
    "health": {"name": "Health", "icon": "mdi:heart-pulse", "entity_category": _DIAGNOSTIC},
    "data": {"name": "Data", "icon": "mdi:chart-bell-curve", "entity_category": _DIAGNOSTIC},
    "requests": {
        "name": "Predictions",
        "icon": "mdi:counter",
        "unit_of_measurement": "1/s",
        "state_class": _MEASURED,
        "suggested_display_precision": 1,
    },
    "latency": {
        "name": "Latency, p95",
        "device_class": "duration",
        "unit_of_measurement": "ms",
        "state_class": _MEASURED,
        "suggested_display_precision": 2,
    },
    "temperature": {
        "name": "Temperature",
        "device_class": "temperature",
        "unit_of_measurement": "°C",
        "state_class": _MEASURED,
        "entity_category": _DIAGNOSTIC,
    },
}


class HomeAssistant:
    """What one device says to Home Assistant.

    Args:
        prefix: of discovery; "" where nothing is to be said.
        folder: the state directory.
        tenant: of the device.
        device: its id.
        agent: the agent's version.
        report_seconds: how often it says something.
    """

    def __init__(
        self, prefix: str, folder: Path, *, tenant: str, device: str, agent: str, report_seconds: float
    ) -> None:
        """Nothing is said yet.

        Raises:
            SettingsError: settings.invalid.
        """
        topics.check_discovery_prefix(prefix)
        self._prefix, self._path = prefix, folder / FILE
        self._tenant, self._device, self._agent = tenant, device, agent
        self._expire = max(1, math.ceil(MISSED * report_seconds))
        self._last: tuple[int, float] | None = None  # rows predicted, and when that was read
        self._written = self._read()
        if prefix and prefix not in self._written:
            # First: what is remembered and was not written does no harm.
            self._keep([*self._written, prefix])

    @property
    def topic(self) -> str:
        """Of the values; "" where nothing is to be said."""
        return topics.home(self._tenant, self._device) if self._prefix else ""

    def announcements(self) -> list[Announcement]:
        """What is to be said, retained, whenever a session has begun."""
        mine = [self._prefix] if self._prefix else []
        gone = [p for p in self._written if p not in mine]
        said = [Announcement(topics.discovery(p, self._device), b"") for p in gone]
        return said + [Announcement(topics.discovery(p, self._device), self._discovery()) for p in mine]

    def taken(self, said: Announcement) -> None:
        """The broker has taken it."""
        if not said.payload:
            self._keep([p for p in self._written if topics.discovery(p, self._device) != said.topic])
            log.info("home assistant: removed from %s", said.topic)

    def refused(self, said: Announcement, reason: str) -> None:
        """The broker has not taken it."""
        log.warning(
            "home assistant: the broker does not take %s: %s. Set home_assistant in the control plane's settings too",
            said.topic,
            reason,
        )

    def values(self, beat: Heartbeat, faults: Sequence[str], now: float) -> bytes:
        """What the sensors show; `now`: monotonic seconds."""
        rows = sum(r.requests for r in beat.running)
        rate = None
        if self._last is not None and now > self._last[1] and rows >= self._last[0]:
            rate = round((rows - self._last[0]) / (now - self._last[1]), 3)
        self._last = (rows, now)
        latency = beat.running[0].latency_ms if beat.running else math.nan
        temperature = beat.health.get("temperature_c", math.nan)
        said = {
            "model": ", ".join(f"{r.model}@{r.version}" for r in beat.running) or "none",
            "health": ", ".join(beat.degraded) or "ok",
            "data": ", ".join(faults) or "ok",
            "requests": rate,
            "latency": round(latency, 4) if math.isfinite(latency) else None,
            "temperature": round(temperature, 1) if math.isfinite(temperature) else None,
        }
        # A state has at most 255 characters.
        cut = {name: value[:250] if isinstance(value, str) else value for name, value in said.items()}
        return json.dumps(cut, ensure_ascii=False).encode()

    def _discovery(self) -> bytes:
        stem = f"lightship_{self._device}"
        sensors = {
            name: {
                "platform": "sensor",
                "unique_id": f"{stem}_{name}",
                "value_template": f"{{{{ value_json.{name} }}}}",
                "expire_after": self._expire,
                # Undecoded: the state is not text.
                "encoding": "",
                **sensor,
            }
            for name, sensor in _SENSORS.items()
        }
        said = {
            "device": {
                "identifiers": [stem],
                "name": self._device,
                "manufacturer": "Lightship",
                "model": "lightship-agent",
                "sw_version": self._agent,
            },
            "origin": {"name": "lightship-agent", "sw_version": self._agent},
            "state_topic": self.topic,
            "availability": [
                {"topic": topics.state(self._tenant, self._device), "value_template": AVAILABLE},
            ],
            "qos": 1,
            "components": sensors,
        }
        return json.dumps(said, ensure_ascii=False).encode()

    def _read(self) -> list[str]:
        try:
            return [line for line in self._path.read_text().splitlines() if line]
        except (OSError, UnicodeDecodeError):
            return []

    def _keep(self, written: list[str]) -> None:
        self._written = written
        try:
            if written:
                write_durably(self._path, "\n".join(written).encode())
            else:
                self._path.unlink(missing_ok=True)
        except (OSError, StorageError) as e:  # it is said again at the next start
            log.warning("home assistant: can't remember what was announced: %s", e)
