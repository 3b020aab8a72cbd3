"""Degraded modes: each is said in health, in metrics and in the heartbeat, and the agent predicts in all but one."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from tests.agent.conftest import build
from tests.agent.link.field import FAR_FUTURE, Field

from lightship_agent.app import Agent
from lightship_agent.contract.bundle import read_bundle
from lightship_agent.contract.codes import TrustError
from lightship_agent.contract.messages import Application, Envelope
from lightship_agent.contract.wire import unpack
from lightship_agent.link.client import Acknowledged, Stored
from lightship_agent.link.quality import LinkQuality
from lightship_agent.monitor import health
from lightship_agent.settings import load_settings
from lightship_agent.update.clock import FILE as LATEST_TIME

Start = Callable[..., AbstractContextManager["Device"]]
RECORD = {"temperature": 0.5, "vibration": 0.5, "current": 0.5, "speed": 0.5}


class Device:
    """An agent that serves, on a machine made of files."""

    def __init__(self, agent: Agent, root: Path) -> None:
        self.agent, self.root = agent, root
        self.http = httpx.Client(base_url="http://{}:{}".format(*(agent.address or ())), timeout=60)

    def put(self, name: str, text: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)

    def predicts(self) -> int:
        return self.http.post("/v2/models/pump/predict", json=RECORD).status_code

    def modes(self) -> list[str]:
        """What it says, everywhere the same."""
        said: dict[str, Any] = self.http.get("/v2/health").json()
        codes: list[str] = said["degraded"]
        assert [m["code"] for m in said["modes"]] == codes
        assert all(set(m) == {"code", "since", "means"} and m["since"] > 1e12 and m["means"] for m in said["modes"])
        assert said["state"] == ("unhealthy" if "serving.no-model" in codes else "degraded" if codes else "ok")
        metrics = self.http.get("/metrics").text.splitlines()
        told = [line for line in metrics if line.startswith("lightship_agent_degraded{")]
        assert told == [f'lightship_agent_degraded{{code="{code}"}} 1' for code in codes]
        assert list(self.agent._view.heartbeat().degraded) == codes
        return codes


@pytest.fixture
def device(field: Field, tmp_path: Path) -> Start:
    @contextmanager
    def start(*, model: bool = True) -> Iterator[Device]:
        state, root = tmp_path / "press-1", tmp_path / "machine"
        if not state.exists():
            field.enrolled("press-1")
        given = {"state_dir": str(state), "http_port": "0", "poll_seconds": "600", "report_seconds": "600"}
        agent = Agent(load_settings({}, given), root=root)
        agent.start()
        made = Device(agent, root)
        try:
            if model:
                agent.serve(read_bundle(build(1)))
            yield made
        finally:
            made.http.close()
            agent.close()

    return start


def test_a_device_that_is_well_says_so(device: Start) -> None:
    with device() as well:
        assert well.modes() == []
        assert well.predicts() == 200


def test_the_heartbeat_says_how_the_agent_is_beside_the_device(device: Start) -> None:
    with device() as well:
        well.put("sys/class/thermal/cooling_device0/type", "cpufreq-cpu0")
        well.put("sys/class/thermal/cooling_device0/cur_state", "2")
        well.predicts()
        well.http.get("/nowhere")

        beat = well.agent._view.heartbeat()

        assert beat.errors == {"serving.not-found": 1}
        assert sum(beat.running[0].latencies) == 1
        mine = ("queue_depth", "outbox_dropped", "ring_dropped_rows", "throttled")
        assert [beat.health[name] for name in mine] == [0, 0, 0, 1]
        assert beat.health["outbox_records"] in (0, 1)  # the first report may be on its way
        assert beat.health["agent_uptime_s"] >= 0


def test_the_applications_own_numbers_travel_and_are_exposed_and_refusals_change_nothing(device: Start) -> None:
    with device() as well:
        told = [
            {"name": "parts_made", "kind": "counter", "value": 2},
            {"name": "oven_c", "kind": "gauge", "value": 181.5},
            {"name": "cycle", "kind": "histogram", "values": [0.4, 3], "edges": [1, 2]},
        ]
        assert well.http.post("/v2/lightship/metrics", json=told).json() == {"taken": 3}

        refused = well.http.post("/v2/lightship/metrics", json=[told[0], {**told[1], "kind": "counter"}])

        assert (refused.status_code, refused.json()["code"]) == (409, "serving.metric-kind")
        unknown = well.http.post("/v2/lightship/metrics", json={**told[0], "label": "x"})
        assert (unknown.status_code, unknown.json()["code"]) == (400, "serving.malformed")
        exposed = well.http.get("/metrics").text.splitlines()
        assert {line for line in exposed if line.startswith("lightship_app_")} == {
            "lightship_app_parts_made_total 2",
            "lightship_app_oven_c 181.5",
            'lightship_app_cycle_bucket{le="1"} 1',
            'lightship_app_cycle_bucket{le="2"} 1',
            'lightship_app_cycle_bucket{le="+Inf"} 2',
            "lightship_app_cycle_sum 3.4",
            "lightship_app_cycle_count 2",
        }
        (sent,) = [r for r in well.agent._counted() if isinstance(r, Application)]
        assert (sent.numbers.counters, sent.numbers.gauges) == ({"parts_made": 2.0}, {"oven_c": 181.5})
        assert not [r for r in well.agent._counted() if isinstance(r, Application)]  # nothing new was told


def test_without_a_model_it_lives_and_is_unhealthy_until_there_is_one(device: Start) -> None:
    with device(model=False) as bare:
        assert bare.modes() == ["serving.no-model"]
        assert bare.http.get("/v2/health/live").status_code == 200
        assert bare.http.get("/v2/health/ready").status_code == bare.predicts() == 503
        bare.agent.serve(read_bundle(build(1)))
        assert (bare.modes(), bare.predicts()) == ([], 200)


def test_with_expired_metadata_it_serves_on(device: Start) -> None:
    with device() as frozen:
        frozen.agent._updater.stop()  # or its first look, which is well, may come after this
        frozen.agent._updater._standstill(TrustError("trust.expired", "The list has expired."))
        assert (frozen.modes(), frozen.predicts()) == (["trust.expired"], 200)


def test_on_a_full_disk_it_serves_on(device: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with device() as full:
        monkeypatch.setattr(health, "_free_mb", lambda _: 3.0)
        assert (full.modes(), full.predicts()) == (["storage.full"], 200)


def test_with_reports_in_memory_it_serves_on(device: Start) -> None:
    with device() as full:
        full.agent._reports._go_to_memory(OSError(errno.ENOSPC, "no space left"))
        assert (full.modes(), full.predicts()) == (["storage.full"], 200)


def test_throttled_it_serves_on_and_forgets_it_when_it_is_cool_again(device: Start) -> None:
    with device() as hot:
        zone = "sys/class/thermal/thermal_zone0"
        for name, text in (("temp", "91000"), ("trip_point_0_type", "passive"), ("trip_point_0_temp", "90000")):
            hot.put(f"{zone}/{name}", text)
        assert (hot.modes(), hot.predicts()) == (["device.throttled"], 200)
        hot.put(f"{zone}/temp", "70000")
        assert hot.modes() == []


def test_short_of_memory_it_serves_on(device: Start) -> None:
    with device() as tight:
        tight.put("proc/meminfo", "MemTotal: 512000 kB\nMemAvailable: 9000 kB\n")
        assert (tight.modes(), tight.predicts()) == (["device.memory"], 200)


def test_with_a_clock_that_is_behind_it_serves_on(device: Start, field: Field, tmp_path: Path) -> None:
    field.enrolled("press-1")
    (tmp_path / "press-1" / LATEST_TIME).write_text(str(FAR_FUTURE))
    with device() as woken:
        assert (woken.modes(), woken.predicts()) == (["device.clock"], 200)


def test_with_a_challenger_that_was_refused_it_serves_on(device: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with device() as alone:
        refused = {"experiment": "e", "state": "out", "code": "update.golden"}
        monkeypatch.setattr(alone.agent._updater.companions, "view", lambda: [refused])
        assert (alone.modes(), alone.predicts()) == (["update.beside"], 200)


def test_several_at_once_are_all_said_each_since_when_it_began(device: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with device() as worn:
        worn.put("proc/meminfo", "MemTotal: 512000 kB\nMemAvailable: 9000 kB\n")
        first = worn.http.get("/v2/health").json()["modes"][0]
        monkeypatch.setattr(health, "_free_mb", lambda _: 3.0)
        assert worn.modes() == ["storage.full", "device.memory"]
        assert first in worn.http.get("/v2/health").json()["modes"]
        assert worn.predicts() == 200


def test_a_device_whose_broker_nobody_hears_says_so_over_https(device: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, posted = list[bytes](), list[bytes]()

    def post(packed: bytes) -> Stored:
        posted.append(packed)
        said = unpack(packed, Envelope)
        return Stored("", (), (Acknowledged(said.e, max(record.s for record in said.r)),))

    def publish(_kind: str, packed: bytes) -> int:
        taken.append(packed)
        return len(taken)

    deaf = SimpleNamespace(
        publish=publish, refusals=lambda: (), taken_over=False, connected=threading.Event(), quality=LinkQuality(),
        tell_home=lambda _values: None,
    )  # fmt: skip
    with device() as unheard, monkeypatch.context() as patch:
        agent = unheard.agent
        patch.setattr(agent, "_mqtt", deaf)
        patch.setattr(agent._control, "post_telemetry", post)
        agent._keep([agent._view.heartbeat()])
        agent._send()
        assert taken
        assert unheard.modes() == []

        sent = len(taken)
        patch.setattr(agent._updater, "reached_at", time.time())
        agent._sender.stalls = 3
        agent._keep([agent._view.heartbeat()])
        agent._send()
        assert unheard.modes() == ["link.unacknowledged"]
        agent._keep([agent._view.heartbeat()])
        agent._send()

        assert len(taken) == sent
        beats = [record.degraded for packed in posted for record in unpack(packed, Envelope).r]  # type: ignore[union-attr]
        assert ("link.unacknowledged",) in beats
        assert unheard.predicts() == 200
