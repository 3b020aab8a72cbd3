"""The broker beside the control plane: how it starts, how it ends, and what a device may do on it."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest
from tests.control_plane.mqtt import Ear, ear
from tests.control_plane.things import Served, add_device, enrolled, settings_for, until

from lightship.fleet import enrolment
from lightship.fleet.broker import RunningBroker, control_plane_context, start_broker
from lightship.fleet.broker_guard import BrokerGuard
from lightship.fleet.ca import CertificateAuthority
from lightship.home import Home
from lightship.integrations import mosquitto, rumqttd
from lightship.integrations.mosquitto import CONTROL_PLANE_USER
from lightship.monitoring import ingest
from lightship.storage.models import AuditEvent, Cut
from lightship_agent.contract import topics
from lightship_agent.contract.codes import LinkError, SettingsError
from lightship_agent.link.identity import Identity

needs_mosquitto = pytest.mark.skipif(mosquitto.find() is None, reason="mosquitto is not installed")
TENANT = "default"


def start(home: Home, kind: str, **flags: object) -> RunningBroker:
    running = start_broker(settings_for(home.path, broker=kind, **flags), home.path / "broker", home.ca)
    assert running is not None
    return running


def children_of(folder: Path) -> list[int]:
    """Processes whose command line names the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in words and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


# Starting -------------------------------------------------------------------------------------------------------------


def test_no_broker_is_a_choice(home: Home) -> None:
    assert start_broker(settings_for(home.path, broker="none"), home.path / "broker", home.ca) is None
    assert not (home.path / "broker").exists()


@pytest.mark.parametrize("kind", [pytest.param("mosquitto", marks=needs_mosquitto), "embedded"])
def test_a_taken_port_is_an_error_at_once_and_leaves_no_process(home: Home, kind: str) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as stranger:
        began = time.monotonic()
        with pytest.raises(SettingsError, match="mqtt_port") as e:
            start(home, kind, mqtt_port=stranger.getsockname()[1])
    assert e.value.code == "settings.port-taken"
    assert time.monotonic() - began < 15
    assert children_of(home.path) == []


def test_where_there_is_no_broker_at_all_the_error_says_what_to_install(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mosquitto, "find", lambda: None)
    monkeypatch.setattr(rumqttd, "available", lambda: False)
    for kind, says in (("auto", "pip install"), ("embedded", "pip install"), ("mosquitto", "broker = embedded")):
        with pytest.raises(LinkError, match=says) as e:
            start(home, kind)
        assert e.value.code == "link.broker"


def test_without_mosquitto_the_embedded_one_is_taken(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosquitto, "find", lambda: None)
    running = start(home, "auto")
    try:
        assert (running.info.kind, running.info.auth) == ("embedded", "password")
        assert "no client certificates" in running.info.notice
    finally:
        running.stop()


@needs_mosquitto
def test_a_broker_that_does_not_come_up_is_quoted(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(CertificateAuthority):
        def issue_server(self, hosts: list[str]) -> tuple[bytes, bytes]:
            return b"not a key", b"not a certificate"

    with pytest.raises(LinkError, match="certificate") as e:
        start_broker(settings_for(home.path, broker="mosquitto"), home.path / "broker", Broken(home.ca.folder))
    assert e.value.code == "link.broker"
    assert children_of(home.path) == []


@pytest.mark.parametrize("kind", [pytest.param("mosquitto", marks=needs_mosquitto), "embedded"])
def test_a_control_plane_that_is_killed_takes_its_broker_along(home: Home, kind: str) -> None:
    program = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from lightship.fleet.broker import start_broker
        from lightship.home import Home
        from lightship.settings import load_settings
        home = Home.open(Path(sys.argv[1]))
        settings = load_settings({}, {"home": sys.argv[1], "mqtt_port": 0, "broker": sys.argv[2]})
        print(start_broker(settings, home.path / "broker", home.ca).process.pid, flush=True)
        time.sleep(60)
    """)
    with subprocess.Popen(
        [sys.executable, "-c", program, str(home.path), kind], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        broker = int(parent.stdout.readline())
        os.kill(broker, 0)
        parent.kill()
        parent.wait()
    until(lambda: not _alive(broker))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_secrets_beside_the_broker_are_the_owners_alone(home: Home) -> None:
    running = start(home, "embedded")
    try:
        control_plane_context(home.path / "broker", home.ca)
        secret = ("rumqttd.toml", "device-password", "control-password", "server.key", "control-plane.key")
        assert {stat.S_IMODE((home.path / "broker" / n).stat().st_mode) for n in secret} == {0o600}
        assert stat.S_IMODE((home.path / "broker").stat().st_mode) == 0o700
    finally:
        running.stop()


# Mosquitto: who may say and hear what ---------------------------------------------------------------------------------


class Site:
    """A mosquitto, two devices enrolled over HTTPS, and the control plane's own TLS."""

    def __init__(self, running: RunningBroker, one: Identity, two: Identity, control: ssl.SSLContext) -> None:
        self.port = running.info.port
        self.one, self.two, self._control = one, two, control

    def control(self) -> AbstractContextManager[Ear]:
        return ear(self.port, CONTROL_PLANE_USER, self._control)

    def device(self, identity: Identity) -> AbstractContextManager[Ear]:
        return ear(self.port, identity.device, identity.tls_context())


@pytest.fixture
def site(served: Served, tmp_path: Path) -> Iterator[Site]:
    if mosquitto.find() is None:
        pytest.skip("mosquitto is not installed")
    home = served.home
    one, two = (enrolled(home, served.url, tmp_path, d) for d in ("pump-1", "pump-2"))
    running = start(home, "mosquitto")
    try:
        yield Site(running, one, two, control_plane_context(home.path / "broker", home.ca))
    finally:
        running.stop()


def test_a_device_speaks_only_below_its_own_name(site: Site) -> None:
    with (
        site.control() as control,
        site.device(site.one) as one,
    ):
        control.subscribe("lightship/v1/#", "#")
        for forbidden in (
            topics.telemetry(TENANT, "pump-2"),
            topics.state(TENANT, "pump-2"),
            topics.event(TENANT, "pump-2"),
            topics.command(TENANT, "pump-2", "check"),
            topics.command(TENANT, "pump-1", "check"),
            topics.notify(TENANT),
            "lightship/v1/default/pump-1",
            "lightship/v1/default/pump-1/tele/more",
            "elsewhere",
        ):
            one.publish(forbidden, b"forged", retain=True)
        allowed = [f(TENANT, "pump-1") for f in (topics.state, topics.event, topics.telemetry)]
        for topic in allowed:
            one.publish(topic, b"honest")
        until(lambda: any(topic == allowed[-1] for topic, _ in control.heard))
        assert {topic for topic, _ in control.heard} == set(allowed)


def test_a_device_hears_only_its_own_commands_and_what_is_said_to_all(site: Site) -> None:
    with (
        site.control() as control,
        site.device(site.one) as one,
    ):
        one.subscribe("#", "lightship/v1/+/+/cmd/+", topics.command(TENANT, "pump-2", "+"), topics.notify(TENANT))
        one.subscribe(topics.telemetry(TENANT, "pump-2"), *topics.ingest_filters())
        control.publish(topics.command(TENANT, "pump-2", "check"), b"for two")
        control.publish(topics.telemetry(TENANT, "pump-2"), b"of two")
        control.publish(topics.command(TENANT, "pump-1", "check"), b"for one")
        control.publish(topics.notify(TENANT), b"for all")
        until(lambda: any(payload == b"for all" for _, payload in one.heard))
        assert {payload for _, payload in one.heard} == {b"for one", b"for all"}


def test_nobody_can_take_another_devices_session_by_its_client_id(site: Site) -> None:
    mine = topics.command(TENANT, "pump-2", "check")
    with (
        site.control() as control,
        site.device(site.two) as two,
    ):
        two.subscribe(mine)
        with ear(site.port, "pump-2", site.one.tls_context()) as thief:
            thief.subscribe(mine)
            control.publish(mine, b"secret")
            until(lambda: two.heard)
            assert (two.lost, thief.heard) == (0, [])


def test_a_device_called_control_plane_is_a_device_like_any_other(site: Site, served: Served, tmp_path: Path) -> None:
    namesake = enrolled(served.home, served.url, tmp_path, "control-plane")
    with (
        site.control() as control,
        site.device(namesake) as device,
    ):
        device.subscribe("lightship/v1/#")
        control.publish(topics.command(TENANT, "pump-1", "check"), b"for one")
        control.publish(topics.command(TENANT, "control-plane", "check"), b"for the namesake")
        until(lambda: device.heard)
        assert [payload for _, payload in device.heard] == [b"for the namesake"]


def test_who_shows_no_certificate_or_a_foreign_one_gets_no_connection(
    site: Site, served: Served, tmp_path: Path
) -> None:
    bare = ssl.create_default_context(cafile=str(served.home.ca.certificate_path))
    foreign = CertificateAuthority(tmp_path / "foreign")
    foreign.create()
    key, chain = foreign.issue_client("pump-1")
    (tmp_path / "key").write_bytes(key)
    (tmp_path / "chain").write_bytes(chain)
    stranger = ssl.create_default_context(cafile=str(served.home.ca.certificate_path))
    stranger.load_cert_chain(tmp_path / "chain", tmp_path / "key")
    for tls in (bare, stranger):
        with ear(site.port, "pump-1", tls, welcome=False) as refused:
            assert refused.said == []


# The embedded one -----------------------------------------------------------------------------------------------------


def test_the_embedded_broker_lets_in_only_who_knows_the_password(home: Home) -> None:
    running = start(home, "embedded")
    tls = ssl.create_default_context(cafile=str(home.ca.certificate_path))
    info = running.info
    topic = topics.telemetry(TENANT, "pump-1")
    try:
        control_user = (info.control_username, info.control_password)
        with ear(info.port, "ingest", tls, user=control_user) as control:
            control.subscribe(topic)
            with ear(info.port, "pump-1", tls, user=(info.device_username, info.device_password)) as device:
                device.publish(topic, b"hello")
                until(lambda: control.heard)
        for user in (None, (info.device_username, "wrong")):
            with ear(info.port, "pump-2", tls, user=user, welcome=False):
                pass
    finally:
        running.stop()
    assert not _alive(running.process.pid)


def test_what_the_embedded_broker_can_not_cut_is_not_claimed(home: Home) -> None:
    add_device(home, "pump-1")
    running = start(home, "embedded")
    try:
        with home.database.write() as session:
            enrolment.revoke(session, "pump-1", actor="user:test", reason="stolen")
        BrokerGuard(home.database, home.ca, running, home.path / "broker").tick()
    finally:
        running.stop()
    with home.database.write() as session:
        assert session.query(Cut).all() == []
        (said,) = [e.detail for e in session.query(AuditEvent) if e.verb == "device.cut"]
        letter = ingest.receive(session, "pump-1", "tele", b"", 1).code
    assert said == {"broker": "embedded", "cut": False}
    assert "not cut" in running.info.notice
    assert letter == "wire.malformed"  # whatever it says is thrown away


def test_a_polite_end_is_enough_for_the_broker(home: Home) -> None:
    running = start(home, "embedded")
    began = time.monotonic()
    running.stop()
    assert time.monotonic() - began < 15
    assert running.process.returncode in (0, -signal.SIGTERM)
