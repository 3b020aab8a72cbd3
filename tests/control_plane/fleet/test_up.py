"""`lightship up` as a process: where it listens, and what a revocation from the command line does to a live session."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from tests.control_plane.mqtt import ear, let_in
from tests.control_plane.things import enrolled, until

from lightship.fleet import certificates
from lightship.home import Home
from lightship.integrations import mosquitto
from lightship.settings import SETTINGS, load_settings
from lightship_agent.contract import topics
from lightship_agent.settings import SETTINGS as AGENT_SETTINGS

needs_mosquitto = pytest.mark.skipif(mosquitto.find() is None, reason="mosquitto is not installed")
COMMAND = [sys.executable, "-c", "from lightship.cli.root import main; main()"]


def lightship(home: Path, *words: str) -> str:
    done = subprocess.run(
        [*COMMAND, "--home", str(home), *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def up(home: Path, broker: str) -> Iterator[subprocess.Popen[bytes]]:
    """A control plane on free ports, until the block ends."""
    ports = {"LIGHTSHIP_API_PORT": "0", "LIGHTSHIP_DEVICE_PORT": "0", "LIGHTSHIP_MQTT_PORT": "0"}
    environment = {**os.environ, **ports, "LIGHTSHIP_BROKER": broker, "LIGHTSHIP_RECONCILE_SECONDS": "0.2"}
    with (home.parent / "up.log").open("wb") as log:
        process = subprocess.Popen([*COMMAND, "--home", str(home), "up"], env=environment, stdout=log, stderr=log)
    try:
        until(lambda: b"https://" in (home.parent / "up.log").read_bytes() or process.poll() is not None, 180)
        assert process.poll() is None, (home.parent / "up.log").read_text()
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def family(root: int) -> set[int]:
    """The process and its descendants."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = {root}
    while more := {p for p, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def listeners(processes: set[int]) -> set[str]:
    """The addresses on which these processes listen, as the kernel writes them."""
    inodes = set()
    for pid in processes:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes |= set(re.findall(r"socket:\[(\d+)\]", str(link.readlink())))
            except OSError:
                continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:
                found.add(words[1].rpartition(":")[0])
    return found


@pytest.mark.parametrize("broker", [pytest.param("mosquitto", marks=needs_mosquitto), "embedded", "none"])
def test_nothing_listens_but_on_loopback_unless_it_is_told_to(fresh_home: Path, tmp_path: Path, broker: str) -> None:
    shutil.copytree(fresh_home, tmp_path / "home")
    with up(tmp_path / "home", broker) as process:
        found = listeners(family(process.pid))
    assert found == {"0100007F"}  # 127.0.0.1


def test_every_address_setting_defaults_to_loopback() -> None:
    defaults = {**{s.name: s.default for s in SETTINGS}, **{s.name: s.default for s in AGENT_SETTINGS}}
    hosts = {name: default for name, default in defaults.items() if name.endswith("_host")}
    assert hosts == {
        "api_host": "127.0.0.1",
        "device_host": "127.0.0.1",
        "public_host": "",
        "mqtt_host": "127.0.0.1",
        "http_host": "127.0.0.1",
    }
    assert load_settings({}).reachable_host == "127.0.0.1"


@pytest.mark.slow
@needs_mosquitto
def test_a_revocation_from_the_command_line_cuts_the_session_of_a_running_device(
    fresh_home: Path, tmp_path: Path
) -> None:
    shutil.copytree(fresh_home, tmp_path / "home")
    with up(tmp_path / "home", "mosquitto"):
        said = (tmp_path / "up.log").read_text()
        url = re.findall(r"https://[0-9.:]+", said)[0]
        home = Home.open(tmp_path / "home")
        one, two = (enrolled(home, url, tmp_path, d) for d in ("pump-1", "pump-2"))
        home.close()
        assert one.info.broker is not None
        port = one.info.broker.port
        with ear(port, "pump-1", one.tls_context()) as session, ear(port, "pump-2", two.tls_context()) as other:
            lightship(tmp_path / "home", "device", "revoke", "pump-1", "--reason", "stolen")
            until(lambda: session.lost)
            until(lambda: not let_in(port, "pump-1", one.tls_context()))
            assert other.lost == 0
            other.publish(topics.state("default", "pump-2"), b"still here")
        log = lightship(tmp_path / "home", "audit", "--json")
    assert [v for v in ("device.revoke", "device.cut") if v in log] == ["device.revoke", "device.cut"]
    assert "pump-1" in lightship(tmp_path / "home", "device", "list")


@pytest.mark.slow
@needs_mosquitto
def test_a_device_that_was_revoked_while_nobody_ran_finds_the_door_closed(fresh_home: Path, tmp_path: Path) -> None:
    shutil.copytree(fresh_home, tmp_path / "home")
    with up(tmp_path / "home", "mosquitto"):
        url = re.findall(r"https://[0-9.:]+", (tmp_path / "up.log").read_text())[0]
        home = Home.open(tmp_path / "home")
        one = enrolled(home, url, tmp_path, "pump-1")
        home.close()
    lightship(tmp_path / "home", "device", "revoke", "pump-1", "--reason", "stolen")
    with up(tmp_path / "home", "mosquitto"):
        port = int(re.findall(r"(?m)^listener (\d+)", (tmp_path / "home/broker/mosquitto.conf").read_text())[0])
        with ear(port, "pump-1", one.tls_context(), welcome=False) as refused:
            assert refused.said == []


# The revocation list --------------------------------------------------------------------------------------------------


def test_the_list_is_signed_by_our_authority_good_for_a_month_and_numbered_upwards(home: Home) -> None:
    at = int(datetime(2026, 11, 1, tzinfo=UTC).timestamp() * 1_000)
    first = x509.load_pem_x509_crl(certificates.revocation_list(home.ca, []))
    second = x509.load_pem_x509_crl(certificates.revocation_list(home.ca, [("5eed", at), ("a", at)]))
    authority = x509.load_pem_x509_certificate(home.ca.certificate_pem())

    assert second.is_signature_valid(authority.public_key())  # type: ignore[arg-type]
    assert [entry.serial_number for entry in second] == [0xA, 0x5EED]
    assert second.get_revoked_certificate_by_serial_number(0x5EED).revocation_date_utc.year == 2026  # type: ignore[union-attr]
    assert second.next_update_utc is not None
    assert timedelta(days=29) < second.next_update_utc - datetime.now(UTC) <= timedelta(days=30)
    numbers = [c.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number for c in (first, second)]
    assert numbers[0] <= numbers[1]


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (None, -600),
        (-3_000, -600),
        (-600, -599),  # another list of the same second
        (-10, -9),
        (0, 0),
        (3_600, 0),  # the clock was set back: a list from the future is not believed, and this one is
    ],
)
def test_a_list_is_dated_after_the_one_before_and_never_in_the_future(before: int | None, expected: int) -> None:
    now = datetime(2026, 11, 25, tzinfo=UTC)
    earlier = None if before is None else now + timedelta(seconds=before)
    assert certificates.last_update(now, earlier) == now + timedelta(seconds=expected)


def test_what_ran_out_is_neither_listed_nor_kept(home: Home) -> None:
    from lightship.storage.audit import now_ms
    from lightship.storage.models import Certificate

    now, week = now_ms(), 7 * 86_400_000
    with home.database.write() as session:
        for serial, ends, revoked in (("a1", now + week, 1), ("b2", now - week, 1), ("c3", now + week, 0)):
            session.add(
                Certificate(serial=serial, device="d", spki="k", issued_at=1, not_after=ends, revoked_at=revoked)
            )
    with home.database.write() as session:
        assert certificates.revoked(session) == [("a1", 1)]
        certificates.forget_expired(session)
        assert sorted(c.serial for c in session.query(Certificate)) == ["a1", "c3"]
