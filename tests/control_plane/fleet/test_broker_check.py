"""`lightship broker check` against real mosquittos, well and badly configured, and the embedded broker."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests.control_plane.mqtt import ear
from tests.control_plane.things import settings_for, until

from lightship.cli import cli
from lightship.fleet.broker import control_plane_context, free_port, start_broker
from lightship.fleet.broker_contract import Facts, Finding, Level, judge
from lightship.fleet.broker_seat import Credential
from lightship.fleet.broker_trials import Target, check
from lightship.home import Home
from lightship.integrations import mosquitto, rumqttd
from lightship.integrations.mosquitto import CONTROL_PLANE_USER

pytestmark = pytest.mark.skipif(mosquitto.find() is None, reason="mosquitto is not installed")


@contextmanager
def running(folder: Path, config: str) -> Iterator[int]:
    """A mosquitto with that configuration and a free port."""
    program, port = mosquitto.find(), free_port("127.0.0.1")
    assert program is not None
    path = folder / "mosquitto.conf"
    path.write_text(f"user root\nlistener {port} 127.0.0.1\n{config}")
    with subprocess.Popen([program, "-c", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            until(lambda: _listens(port))
            yield port
        finally:
            process.terminate()


def _listens(port: int) -> bool:
    with closing(socket.socket()) as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def at(port: int, **more: Any) -> Target:
    return Target(host="127.0.0.1", port=port, main=Credential(), bare=Credential(), **more)


def rows(facts: Facts) -> dict[str, Finding]:
    return {f.name: f for f in judge(facts)}


def passwords(folder: Path, **users: str) -> str:
    """Lines of a configuration that knows these users."""
    path = folder / "passwords"
    path.touch()
    for name, password in users.items():
        subprocess.run(["mosquitto_passwd", "-b", str(path), name, password], check=True, capture_output=True)
        (folder / f"{name}.password").write_text(password + "\n")
    return f"allow_anonymous false\npassword_file {path}\n"


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, ["broker", "check", *words])


@pytest.mark.slow
def test_an_open_mosquitto_does_most_of_it_and_is_not_to_be_used(tmp_path: Path) -> None:
    with running(tmp_path, "allow_anonymous true\n") as port:
        result = run(f"mqtt://127.0.0.1:{port}", "--offline-messages", "1500", "--json")
        said = json.loads(result.output)

        levels = {f["name"]: f["level"] for f in said["findings"]}
        bad = {name for name, level in levels.items() if level in ("missing", "broken")}
        assert result.exit_code == 4, result.output
        assert {"no strangers", "a queue for who is away"} <= bad
        assert bad <= {
            "no strangers", "a queue for who is away", "receive maximum", "one connection for one name",
        }  # fmt: skip
        assert said["facts"]["queued"] == [1_000, 1_500]


@pytest.mark.slow
def test_the_one_we_configure_lacks_only_what_mosquitto_lacks_and_nobody_of_ours_is_cut_off(home: Home) -> None:
    broker = start_broker(settings_for(home.path, broker="mosquitto"), home.path / "broker", home.ca)
    assert broker is not None
    try:
        with ear(broker.info.port, CONTROL_PLANE_USER, control_plane_context(home.path / "broker", home.ca)) as ours:
            ours.subscribe("lightship/v1/+/+/tele")
            result = CliRunner().invoke(cli, ["--home", str(home.path), "broker", "check", "--json"])
            assert ours.lost == 0
    finally:
        broker.stop()
    # What ingest hears of it is not mistaken for a report.
    assert {payload for _, payload in ours.heard} == {b"lightship broker check: own"}
    said = json.loads(result.output)
    levels = {f["name"]: f["level"] for f in said["findings"]}
    bad = {name for name, level in levels.items() if level != "ok"}
    assert bad <= {"receive maximum", "one connection for one name"}, said
    assert said["facts"]["named_by_credential"]
    assert result.exit_code in (0, 3)


def test_a_tiny_queue_is_measured(tmp_path: Path) -> None:
    with running(tmp_path, "allow_anonymous true\nmax_queued_messages 40\nmax_inflight_messages 10\n") as port:
        facts = check(at(port, offline=200), only=["queue"])
    assert facts.queued is not None
    assert 40 <= facts.queued.got <= 50
    assert rows(facts)["a queue for who is away"].level == Level.MISSING


def test_a_small_packet_limit_is_found_out_by_sending_and_said(tmp_path: Path) -> None:
    with running(tmp_path, "allow_anonymous true\nmax_packet_size 100000\n") as port:
        facts = check(at(port), only=["packet"])
    row = rows(facts)["messages of 256 KiB"]
    assert (row.level, row.found) == (Level.MISSING, "65536 bytes; it says 100000 at most")


def test_a_broker_without_retained_messages_is_found_out(tmp_path: Path) -> None:
    with running(tmp_path, "allow_anonymous true\nretain_available false\n") as port:
        facts = check(at(port), only=["retained", "will"])
    assert rows(facts)["retained birth"].level in (Level.MISSING, Level.UNKNOWN)
    assert facts.retained is not True


def test_an_acl_that_lets_devices_speak_for_each_other_is_told_from_one_that_does_not(tmp_path: Path) -> None:
    known = passwords(tmp_path, ingest="a", press="b")
    main, device = Credential(None, "ingest", "a"), Credential(None, "press", "b")
    acl = tmp_path / "acl"
    acl.write_text("user ingest\ntopic readwrite lightship/v1/#\n\npattern write lightship/v1/+/%u/tele\n")
    found = []
    for config in (known, f"{known}acl_file {acl}\n"):
        with running(tmp_path, config) as port:
            target = Target(
                host="127.0.0.1", port=port, main=main, bare=Credential(), device=device, device_name="press"
            )
            found.append(rows(check(target, only=["acl", "anonymous"])))
    names = ("a device may report", "no device speaks in another's name", "no device hears another's commands")
    assert [found[0][n].level for n in names] == [Level.OK, Level.BROKEN, Level.BROKEN]
    assert [found[1][n].level for n in names] == [Level.OK] * 3
    assert found[1]["a refusal is said"].found == "said (0x87)"
    assert [f["no strangers"].level for f in found] == [Level.OK] * 2


def test_nothing_stays_behind(tmp_path: Path) -> None:
    config = f"allow_anonymous true\npersistence true\npersistence_location {tmp_path}/\n"
    trials = ["delivery", "retained", "will", "redelivery", "session", "queue"]
    with running(tmp_path, config) as port:
        check(at(port, offline=20), only=trials)
    stored = (tmp_path / "mosquitto.db").read_bytes()
    assert b"check-" not in stored  # no session
    assert b"lightship broker check" not in stored  # no retained message


def test_where_nobody_listens_or_nobody_is_let_in_the_command_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as nobody:
        _main("broker", "check", f"mqtt://127.0.0.1:{free_port('127.0.0.1')}")
    with running(tmp_path, passwords(tmp_path, ingest="a")) as port, pytest.raises(SystemExit) as refused:
        _main("broker", "check", f"mqtt://127.0.0.1:{port}")
    assert (nobody.value.code, refused.value.code) == (22, 22)


@pytest.mark.slow
def test_a_server_that_takes_the_connection_and_says_nothing_holds_nobody_up(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as mute:
        threading.Thread(target=_accept, args=(mute,), daemon=True).start()
        with pytest.raises(SystemExit) as e:
            _main("broker", "check", f"mqtt://127.0.0.1:{mute.getsockname()[1]}")
    assert e.value.code == 22


def _accept(mute: socket.socket) -> None:
    kept = []
    try:
        while True:
            kept.append(mute.accept())
    except OSError:  # the test is over
        for connection, _ in kept:
            connection.close()


def _main(*words: str) -> None:
    from lightship.cli import main

    main(list(words))


@pytest.mark.parametrize(
    "words",
    [
        ("http://example.org",),
        ("mqtt://user:secret@127.0.0.1",),
        ("mqtt://127.0.0.1:99999",),
        ("mqtts://127.0.0.1", "--cert", __file__),
        ("mqtts://127.0.0.1", "--ca", __file__),
    ],
)
def test_an_address_or_a_file_that_can_not_be_meant_is_refused_before_anybody_is_asked(words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as e:
        _main("broker", "check", *words)
    assert e.value.code == 12


@pytest.mark.skipif(not rumqttd.available(), reason="the broker extra is missing")
def test_of_the_embedded_one_it_says_that_devices_can_speak_for_each_other(home: Home) -> None:
    broker = start_broker(settings_for(home.path, broker="embedded"), home.path / "broker", home.ca)
    assert broker is not None
    info = broker.info
    tls = control_plane_context(home.path / "broker", home.ca)
    target = Target(
        host=info.host,
        port=info.port,
        main=Credential(tls, info.control_username, info.control_password),
        device=Credential(tls, info.device_username, info.device_password),
        device_name="press-1",
        bare=Credential(tls),
    )
    try:
        found = rows(check(target, only=["delivery", "shared-5", "acl", "anonymous", "tls", "plain"]))
    finally:
        broker.stop()
    assert found["no device speaks in another's name"].level == Level.BROKEN
    assert found["no strangers"].level == Level.OK
    assert found["TLS 1.2 or newer"].level == Level.OK
    assert found["MQTT 3.1.1"].level == Level.MISSING
    assert found["shared subscriptions"].level == Level.OK
