"""The agent as others see it: its heartbeat, `/v2/health`, `/metrics`, and in which modes it is degraded.

Rules: it looks and tells; nothing is changed by it but what was seen of the modes, so that each has its beginning.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from . import __version__
from .contract.messages import Heartbeat
from .link.identity import Identity
from .link.outbox import Outbox
from .link.quality import LinkQuality
from .link.way import Way
from .monitor.application import ApplicationNumbers
from .monitor.degraded import Degraded, Mode, state_of
from .monitor.health import read_health
from .monitor.monitor import Monitor
from .monitor.sharing import Sharing
from .monitor.strain import HOT, Strain
from .runtime.ort import onnxruntime
from .serving.dataplane import DataPlane
from .serving.metrics import Sample, health_samples, plane_samples, render, render_application
from .serving.mirror import Mirror
from .serving.residents import Residents
from .serving.slot import most_frequent
from .settings import Settings
from .update.updater import Updater

if TYPE_CHECKING:
    from .link.mqtt import MqttLink

LOW_DISK_MB = 50.0


class Parts(NamedTuple):
    """What is looked at."""

    settings: Settings
    identity: Identity
    plane: DataPlane
    residents: Residents
    monitor: Monitor
    mirror: Mirror
    application: ApplicationNumbers
    sharing: Sharing
    updater: Updater
    events: Outbox
    reports: Outbox
    way: Way


class View:
    """Looks at one agent. Safe to use from several threads.

    Args:
        of: its parts.
        mqtt: its link to the broker, once there is one.
        started: monotonic seconds.
        root: where proc and sys are mounted.
    """

    def __init__(self, of: Parts, *, mqtt: Callable[[], MqttLink | None], started: float, root: Path) -> None:
        """Nothing was seen yet."""
        self._of, self._link, self._started, self._root = of, mqtt, started, root
        self._dir = of.settings.state_dir
        self._strain = Strain(root)
        self._seen, self._looking = Degraded(), threading.Lock()

    @property
    def _mqtt(self) -> MqttLink | None:
        return self._link()

    def heartbeat(self) -> Heartbeat:
        """What is reported of the agent and its device."""
        health = read_health(self._dir, root=self._root)
        modes = self._modes(health)
        return Heartbeat(
            s=1,
            t=now_ms(),
            running=self._of.plane.running(),
            update_state=self._of.updater.state.phase,
            assignment_seq=self._of.updater.state.floor,
            agent=__version__,
            onnxruntime=onnxruntime.__version__,
            machine=platform.machine(),
            health={**health, **self._vitals(modes)},
            degraded=tuple(mode.code for mode in modes),
            errors=most_frequent(self._of.plane.errors()),
        )

    def _vitals(self, modes: Sequence[Mode]) -> dict[str, float]:
        """How the agent itself is, beside the device's health; the names in docs/device-reports.md."""
        return {
            "agent_uptime_s": round(time.monotonic() - self._started, 1),
            "queue_depth": self._of.plane.admission.inside,
            "outbox_records": self._of.events.depth + self._of.reports.depth,
            "outbox_dropped": self._of.events.dropped + self._of.reports.dropped,
            "ring_dropped_rows": self._of.monitor.dropped_rows,
            "throttled": float(any(mode.code == HOT for mode in modes)),
            **(self._mqtt.quality.numbers() if self._mqtt is not None else {}),
            **(self._shared() if self._of.settings.share_labelled_rows else {}),
        }

    def _shared(self) -> dict[str, float]:
        return {"shared_rows_today": self._of.sharing.today.rows, "shared_rows_left": self._of.sharing.left(now_ms())}

    def status(self) -> dict[str, Any]:
        """How the agent is, in words that machines can use too."""
        state = self._of.updater.state
        health = read_health(self._dir, root=self._root)
        modes = self._modes(health)
        codes = [mode.code for mode in modes]
        return {
            "device": self._of.identity.device,
            "agent": __version__,
            "uptime_seconds": round(time.monotonic() - self._started, 1),
            "state": state_of(codes),
            "degraded": codes,
            "modes": [mode._asdict() for mode in modes],
            "running": [msgspec.to_builtins(r) for r in self._of.plane.running()],
            "beside": self._of.updater.companions.view(),
            "faults": [fault._asdict() for fault in self._of.monitor.faults()],
            "models": self._of.residents.view(),
            "update": {
                "phase": state.phase,
                "assignment_seq": state.floor,
                "current": msgspec.to_builtins(state.current),
                "previous": msgspec.to_builtins(state.previous),
                "candidate": msgspec.to_builtins(state.candidate),
                "penalties": {k: v.until for k, v in state.penalties.items()},
                "waiting": msgspec.to_builtins(state.waiting),
                "metadata_expires": dict(self._of.updater.metadata_expires),
                "last_code": state.last_code,
            },
            "sharing": {
                "rows_a_report": self._of.settings.share_labelled_rows,
                "rows_today": self._of.sharing.today.rows,
                "bytes_today": self._of.sharing.today.bytes,
            },
            "link": {
                "server": self._of.identity.info.server,
                "last_answer": self._of.updater.reached_at,
                "mqtt": "off" if self._mqtt is None else "up" if self._mqtt.connected.is_set() else "down",
                "outbox_records": self._of.events.depth + self._of.reports.depth,
                "outbox_dropped": self._of.events.dropped + self._of.reports.dropped,
            },
            "health": health,
        }

    def _modes(self, health: dict[str, float]) -> tuple[Mode, ...]:
        with self._looking:
            return self._seen.seen(self._degraded(health), now_ms())

    def _degraded(self, health: dict[str, float]) -> list[str]:
        reasons = []
        if not self._of.plane.models():
            reasons.append("serving.no-model")
        if self._of.updater.trust_code:
            reasons.append(self._of.updater.trust_code)
        if self._mqtt is not None and self._mqtt.taken_over:
            reasons.append("link.taken-over")
        if self._of.way.unheard(time.monotonic()):
            reasons.append("link.unacknowledged")
        if (
            self._of.events.in_memory
            or self._of.reports.in_memory
            or health.get("disk_free_mb", LOW_DISK_MB) < LOW_DISK_MB
        ):
            reasons.append("storage.full")
        if self._of.updater.clock.is_behind:
            reasons.append("device.clock")
        if any(beside["code"] and beside["state"] == "out" for beside in self._of.updater.companions.view()):
            reasons.append("update.beside")
        return [*reasons, *self._strain.codes(), *sorted({fault.code for fault in self._of.monitor.faults()})]

    def metrics(self) -> str:
        """In the text format of Prometheus."""
        health = read_health(self._dir, root=self._root)
        modes = self._modes(health)
        link = self._mqtt.quality if self._mqtt is not None else LinkQuality()
        values = {
            **plane_samples(self._of.plane.stats(), self._of.plane.errors()),
            **health_samples(health),
            "lightship_agent_degraded": [Sample(1, {"code": mode.code}) for mode in modes],
            "lightship_agent_throttled": [Sample(float(any(mode.code == HOT for mode in modes)))],
            "lightship_agent_queue_depth": [Sample(self._of.plane.admission.inside)],
            "lightship_agent_link_connections_total": [Sample(link.connections)],
            "lightship_agent_link_rtt_seconds": [Sample(link.rtt)] if link.rtt is not None else [],
            "lightship_agent_model_memory_bytes": [
                Sample(r.size, {"model": m.name, "version": str(m.version), "busy": str(int(r.busy))})
                for m, r in self._of.residents.loaded()
            ],
            "lightship_agent_info": [Sample(1, {"version": __version__})],
            "lightship_agent_uptime_seconds": [Sample(time.monotonic() - self._started)],
            "lightship_agent_ring_dropped_rows_total": [Sample(self._of.monitor.dropped_rows)],
            "lightship_agent_shadow_rows_total": [Sample(self._of.mirror.rows_total)],
            "lightship_agent_shadow_agreeing_rows_total": [Sample(self._of.mirror.same_total)],
            "lightship_agent_shadow_failures_total": [Sample(self._of.mirror.failures_total)],
            "lightship_agent_shadow_dropped_rows_total": [Sample(self._of.mirror.dropped_total)],
            "lightship_agent_data_fault": [Sample(1, fault._asdict()) for fault in self._of.monitor.faults()],
            "lightship_agent_outbox_records": [Sample(self._of.events.depth + self._of.reports.depth)],
            "lightship_agent_outbox_dropped_total": [Sample(self._of.events.dropped + self._of.reports.dropped)],
            "lightship_agent_update_state": [Sample(1, {"state": self._of.updater.state.phase})],
            "lightship_agent_update_waiting": [Sample(float(self._of.updater.state.waiting is not None))],
            "lightship_agent_update_penalties": [Sample(self._of.updater.penalised)],
            "lightship_agent_metadata_expiry_seconds": [
                Sample(at - self._of.updater.clock.now(), {"role": role})
                for role, at in sorted(self._of.updater.metadata_expires.items())
            ],
        }
        return render(values) + render_application(self._of.application.numbers)


def now_ms() -> int:
    """Wall-clock milliseconds."""
    return time.time_ns() // 1_000_000
