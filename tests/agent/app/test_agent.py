"""The composition root: one model at a time, no silence on a full disk, a certificate renewed while it runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from tests.agent.conftest import build
from tests.agent.link.field import Field, until

from lightship.fleet.broker import free_port
from lightship.storage.models import Device, DeviceEpoch
from lightship_agent import app
from lightship_agent.app import Agent
from lightship_agent.client import Client
from lightship_agent.contract.bundle import read_bundle
from lightship_agent.contract.codes import BundleError, LightshipError, SettingsError, StorageError
from lightship_agent.contract.messages import Heartbeat
from lightship_agent.link import renewal
from lightship_agent.settings import load_settings

Start = Callable[..., Agent]


@pytest.fixture
def make_agent(field: Field, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """`make_agent(name="press-1", start=False, **settings)`: an agent in this process; those started are closed."""
    monkeypatch.setattr(app, "TICK_SECONDS", 0.1)
    made: list[tuple[Agent, bool]] = []

    def make(name: str = "press-1", *, start: bool = False, **settings: str) -> Agent:
        folder = tmp_path / name
        if not folder.exists():
            field.enrolled(name)
        given = {
            "state_dir": str(folder),
            "http_port": "0",
            "report_seconds": "0.2",
            "window_min_seconds": "0",
            **settings,
        }
        agent = Agent(load_settings({}, given))
        made.append((agent, start))
        if start:
            agent.start()
        return agent

    yield make
    for agent, started in made:
        if started and agent._http.is_running:
            agent.close()
        elif not started:
            agent._http.stop()
            agent._control.close()


def served(agent: Agent) -> list[str]:
    return sorted(f"{r.model}@{r.version}" for r in agent._plane.running())


def test_a_device_runs_the_one_model_it_was_told_to_run(make_agent: Start) -> None:
    agent = make_agent()
    agent.serve(read_bundle(build(1)))
    agent.serve(read_bundle(build(1, name="fan")))
    assert served(agent) == ["fan@1"]

    # Taking it back is taking it away, whatever its name.
    agent.serve(read_bundle(build(1)))

    assert served(agent) == ["pump@1"]
    agent.serve_nothing()
    assert served(agent) == []


def test_a_model_that_cannot_be_loaded_leaves_the_one_that_serves(make_agent: Start) -> None:
    agent = make_agent()
    good = read_bundle(build(1))
    agent.serve(good)

    with pytest.raises(BundleError):
        agent.serve(msgspec.structs.replace(read_bundle(build(2)), model=b"not a graph", digest="f" * 64))

    assert served(agent) == ["pump@1"]


def test_going_back_is_at_once_because_the_model_is_still_in_memory(
    make_agent: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = make_agent()
    old = read_bundle(build(1))
    agent.serve(old)
    agent.serve(read_bundle(build(2, flip=True)))
    monkeypatch.setattr(agent._residents, "_load_model", lambda _: pytest.fail("loaded again"))

    agent.serve(old)

    assert served(agent) == ["pump@1"]
    assert agent.failures(old.digest) == 0


def test_what_failed_here_does_not_stay_in_memory(make_agent: Start) -> None:
    agent = make_agent()
    good, bad = read_bundle(build(1)), read_bundle(build(2, flip=True))
    agent.serve(good)
    agent.serve(bad)
    agent.serve(good)
    agent.settle([good.digest])
    assert [m.digest for m in agent._plane.resident()] == [good.digest]


def test_the_version_before_can_be_loaded_again_where_the_settings_allow_it_and_not_once_it_is_revoked(
    field: Field, make_agent: Start
) -> None:
    agent = make_agent(start=True, spare_models="0", model_control="explicit", soak_seconds="0.2")
    digests = []
    for row in (field.release(1), field.release(2, flip=True)):
        field.assign("press-1", row)
        agent._updater.poke()
        until(lambda row=row: _committed(agent) == row.digest)  # type: ignore[misc]
        digests.append(row.digest)
    host, port = agent.address or ("", 0)
    with httpx.Client(base_url=f"http://{host}:{port}", timeout=60) as client:
        index = client.post("/v2/repository/index").json()
        assert [(r["version"], r["state"]) for r in index] == [("2", "READY"), ("1", "UNAVAILABLE")]
        assert client.post("/v2/repository/models/pump/load", json={"parameters": {"version": "1"}}).status_code == 200
        assert [m.digest for m in agent._plane.resident()] == [digests[1], digests[0]]

        agent._updater.revoked = frozenset({digests[0]})
        agent.settle(digests)

        assert [m.digest for m in agent._plane.resident()] == [digests[1]]
        said = client.post("/v2/repository/models/pump/load", json={"parameters": {"version": "1"}})
    assert (said.status_code, said.json()["code"]) == (403, "serving.not-allowed")
    assert "it was revoked" in said.json()["error"]


def _committed(agent: Agent) -> str:
    state = agent._updater.state
    return state.current.sha256 if state.current and state.phase == "idle" else ""


# Full disks -----------------------------------------------------------------------------------------------------------


def full(*_: Any, **__: Any) -> None:
    raise StorageError("storage.full", "No space left.")


def test_a_full_disk_silences_nobody(make_agent: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make_agent()
    monkeypatch.setattr(app, "write_durably", full)

    agent._keep([Heartbeat(s=1, t=1)])

    assert agent._reports.depth == 1


def test_a_full_disk_does_not_keep_an_agent_from_starting(make_agent: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_agent()
    monkeypatch.setattr(app, "write_durably", full)

    second = make_agent()

    assert second._boot == first._boot + 1


@pytest.mark.parametrize("content", [b"", b"x", b"\xff", "²".encode(), b"9" * 400])
def test_a_boot_counter_of_noise_begins_again(make_agent: Start, tmp_path: Path, content: bytes) -> None:
    make_agent()
    (tmp_path / "press-1" / "boot").write_bytes(content)
    (tmp_path / "press-1" / "windows.json").write_bytes(content)

    assert make_agent()._boot == 1


# Reports --------------------------------------------------------------------------------------------------------------


def test_reports_over_https_are_acknowledged_in_the_same_breath(field: Field, make_agent: Start) -> None:
    agent = make_agent(start=True, poll_seconds="900")
    until(lambda: agent._reports.acked >= 3)

    until(lambda: agent._reports.depth == 0)
    posts = len(field.server.asked("/v1/telemetry"))
    with field.home.database.read() as session:
        (cursor,) = session.query(DeviceEpoch)
    # One POST per report, and none of them twice.
    assert posts <= cursor.next_seq
    assert len(field.server.asked("/v1/assignment")) == 1


def test_a_report_that_the_server_refuses_is_kept_and_sent_when_it_is_well_again(
    field: Field, make_agent: Start
) -> None:
    agent = make_agent(start=True)
    until(lambda: agent._reports.acked >= 1)
    field.fault("/v1/telemetry", status=500)
    acked = agent._reports.acked
    until(lambda: agent._reports.depth >= 3)
    assert agent._reports.acked <= acked + 1

    field.well_again()

    until(lambda: agent._reports.acked > acked + 3)


def test_closing_while_the_control_plane_is_gone_raises_nothing_and_loses_nothing(
    field: Field, make_agent: Start
) -> None:
    agent = make_agent(start=True)
    until(lambda: agent._reports.acked >= 1)
    field.fault(".", status=500)
    agent._reports.append([Heartbeat(s=1, t=1)])
    depth = agent._reports.depth

    agent.close()

    assert agent._reports.depth >= depth
    assert not agent._http.is_running


# The certificate ------------------------------------------------------------------------------------------------------


def test_a_certificate_past_two_thirds_of_its_life_is_renewed_while_the_agent_runs(
    field: Field, make_agent: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = make_agent(start=True)
    until(lambda: agent._reports.acked >= 1)
    before = agent._identity.certificate().serial_number
    answers = itertools.chain([True], itertools.repeat(False))
    monkeypatch.setattr(renewal, "renewal_due", lambda *_: next(answers))

    until(lambda: agent._identity.certificate().serial_number != before)
    acked = agent._reports.acked
    until(lambda: agent._reports.acked > acked + 1)
    with field.home.database.read() as session:
        device = session.get(Device, "press-1")
        assert device is not None
        assert device.spki_next == ""  # the new key has been seen
    assert agent._control.reachable()


def test_every_run_of_an_agent_has_a_name_of_its_own_that_the_control_plane_notes(
    field: Field, make_agent: Start
) -> None:
    from lightship.storage.models import DeviceInstance

    def runs() -> set[tuple[int, int]]:
        with field.home.database.read() as session:
            return {(r.boot, r.returns) for r in session.query(DeviceInstance)}

    for boot in (1, 2, 3):
        agent = make_agent(start=True)
        until(lambda boot=boot: len(runs()) == boot)  # type: ignore[misc]
        agent.close()

    assert runs() == {(1, 0), (2, 0), (3, 0)}
    with field.home.database.read() as session:
        device = session.get(Device, "press-1")
        assert device is not None
        assert device.cloned_at == 0


def test_a_renewal_that_fails_stops_neither_reports_nor_the_agent(
    field: Field, make_agent: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    field.fault("/v1/renew", status=500)
    monkeypatch.setattr(renewal, "renewal_due", lambda *_: True)
    agent = make_agent(start=True)

    until(lambda: agent._reports.acked >= 3)

    with pytest.raises(LightshipError):
        agent._certificate._fetch(due=True, expired=False)


# systemd --------------------------------------------------------------------------------------------------------------


def test_systemd_is_told_where_it_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        app.notify_systemd("READY=1")
        assert manager.recv(100) == b"READY=1"
    app.notify_systemd("WATCHDOG=1")  # nobody listens any more: no reason to fail
    monkeypatch.delenv("NOTIFY_SOCKET")
    app.notify_systemd("STOPPING=1")


# The faces ------------------------------------------------------------------------------------------------------------


def test_frames_and_topics_are_served_where_the_settings_say_so(make_agent: Start, tmp_path: Path) -> None:
    bindings = tmp_path / "bindings.toml"
    bindings.write_text('[broker]\nport = 1\n[[requests]]\nmodel = "pump"\n')  # nobody is there, and nobody minds
    agent = make_agent(start=True, frames_socket=str(tmp_path / "frames.sock"), bindings=str(bindings))
    agent.serve(read_bundle(build(1)))

    with Client(f"frames:{tmp_path / 'frames.sock'}") as client:
        answer = client.predict([[0.0, 0.0, 0.0, 0.0]])

    assert (answer.version, answer.digest) == (1, read_bundle(build(1)).digest)
    agent.close()
    assert not (tmp_path / "frames.sock").exists()


def test_bindings_that_can_not_work_stop_the_agent_before_it_takes_its_port(make_agent: Start, tmp_path: Path) -> None:
    bindings = tmp_path / "bindings.toml"
    bindings.write_text("[[sensors]]\n")
    port = str(free_port("127.0.0.1"))

    with pytest.raises(SettingsError, match=r"bindings.toml") as found:
        make_agent(bindings=str(bindings), http_port=port)

    assert found.value.code == "settings.invalid"
    assert make_agent(http_port=port).address == ("127.0.0.1", int(port))
