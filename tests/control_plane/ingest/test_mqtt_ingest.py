"""The ingest worker on a real broker: killed brokers, full disks and poison lose nothing that a device still holds."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select
from tests.control_plane.mqtt import ear
from tests.control_plane.things import Served, enrolled, envelope, heartbeat, settings_for, until

import lightship_agent.link.mqtt
import lightship_agent.link.sender
from lightship.api import metrics
from lightship.fleet.broker import RunningBroker, control_plane_context, start_broker
from lightship.home import Home
from lightship.integrations import mosquitto
from lightship.monitoring import ingest
from lightship.monitoring.history import open_history
from lightship.monitoring.mqtt_ingest import IngestWorker
from lightship.monitoring.workers import WorkerProcesses
from lightship.storage.database import Database
from lightship.storage.models import DeadLetter, Device, FeedbackRow
from lightship_agent.contract import topics
from lightship_agent.contract.codes import StorageError
from lightship_agent.contract.messages import Command, LabelledRows
from lightship_agent.contract.wire import pack
from lightship_agent.link.identity import Broker, Identity
from lightship_agent.link.mqtt import MqttLink
from lightship_agent.link.outbox import Outbox
from lightship_agent.link.sender import Sender

TENANT = "default"
pytestmark = pytest.mark.skipif(mosquitto.find() is None, reason="mosquitto is not installed")


class Site:
    """A mosquitto that can be killed, and one enrolled device."""

    def __init__(self, home: Home, identity: Identity) -> None:
        self.home, self.folder = home, home.path / "broker"
        started = start_broker(settings_for(home.path, broker="mosquitto"), self.folder, home.ca)
        assert started is not None
        self.running: RunningBroker = started
        broker = Broker(host="127.0.0.1", port=started.info.port)
        info = type(identity.info)(device=identity.device, tenant=TENANT, server=identity.info.server, broker=broker)
        self.identity = Identity(folder=identity.folder, info=info, tuf_root=identity.tuf_root)

    def kill_broker(self) -> None:
        """As a power cut would; whatever it had in memory is gone."""
        self.running.process.send_signal(signal.SIGKILL)
        self.running.process.wait()

    def restart_broker(self) -> None:
        program = mosquitto.find()
        assert program is not None
        self.running.process = mosquitto.start(program, self.folder / "mosquitto.conf")

    @contextmanager
    def worker(self, database: Database | None = None) -> Iterator[IngestWorker]:
        tls = control_plane_context(self.folder, self.home.ca)
        made = IngestWorker(database or self.home.database, self.running.info, tls, "lightship-ingest-0")
        made.start()
        try:
            until(made.connected.is_set)
            yield made
        finally:
            made.stop()
        assert not any(t.name == "ingest" and t.is_alive() for t in threading.enumerate())

    def send(self, *messages: bytes, kind: str = "tele") -> None:
        topic = {"tele": topics.telemetry, "event": topics.event, "state": topics.state}[kind](TENANT, "pump-1")
        with ear(self.running.info.port, "pump-1", self.identity.tls_context()) as device:
            for message in messages:
                device.publish(topic, message)


@pytest.fixture
def site(served: Served, tmp_path: Path) -> Iterator[Site]:
    made = Site(served.home, enrolled(served.home, served.url, tmp_path, "pump-1"))
    yield made
    made.running.stop()


def acked(home: Home) -> tuple[str, int]:
    with home.database.read() as session:
        epoch, _, seq = ingest.acknowledged(session, "pump-1").partition(":")
    return epoch, int(seq or 0)


def test_a_report_that_is_published_is_stored(site: Site) -> None:
    with site.worker() as worker:
        site.send(pack(envelope(heartbeat(1))))
        site.send(pack(envelope(heartbeat(2))), kind="event")
        until(lambda: acked(site.home)[1] == 2)
        assert worker.counts == {"stored": 2}


def test_a_worker_says_that_it_is_at_work_and_what_it_counted_outlives_it(site: Site) -> None:
    for n in (1, 2):
        with site.worker():
            site.send(pack(envelope(heartbeat(n))), pack(envelope(heartbeat(n))))
            until(lambda n=n: acked(site.home)[1] == n)

    said = metrics.render(site.home).decode()

    assert 'lightship_ingest_messages_total{kind="tele"} 4.0' in said
    assert 'lightship_ingest_records_total{kind="heartbeat"} 2.0' in said
    assert "lightship_ingest_duplicates_total 2.0" in said
    (seen,) = re.findall(
        r'^lightship_ingest_worker_seen_timestamp_seconds\{worker="lightship-ingest-0"\} (\S+)$', said, re.M
    )
    assert time.time() - float(seen) < 60


def test_poison_is_buried_and_the_worker_lives_on(site: Site) -> None:
    with site.worker() as worker:
        site.send(b"", b"\xff" * 50, pack(envelope(heartbeat(1, version=2**63))), pack(envelope(heartbeat(1))))
        until(lambda: acked(site.home)[1] == 1)
        assert worker.counts == {"dead": 3, "stored": 1}
    with site.home.database.read() as session:
        assert session.scalar(select(func.count()).select_from(DeadLetter)) == 3


def test_reports_of_a_revoked_device_are_not_believed(site: Site) -> None:
    with site.home.database.write() as session:
        session.get_one(Device, "pump-1").state = "revoked"
    with site.worker() as worker:
        site.send(pack(envelope(heartbeat(1))))
        until(lambda: worker.counts["dead"])
    assert acked(site.home) == ("", 0)


class Moody(Database):
    """A database that refuses its first writes."""

    def __init__(self, url: str, *errors: Exception) -> None:
        super().__init__(url)
        self.errors = list(errors)

    def write(self) -> Any:
        if self.errors:
            raise self.errors.pop(0)
        return super().write()


ERRORS: list[list[Exception]] = [
    [StorageError("storage.full", "No space left.")],
    [StorageError("storage.busy", "Locked."), StorageError("storage.busy", "Locked.")],
    [RuntimeError("nobody expected this")],
]


@pytest.mark.parametrize("errors", ERRORS, ids=["full", "busy twice", "unexpected"])
def test_while_the_database_refuses_the_broker_keeps_the_reports(site: Site, errors: list[Exception]) -> None:
    moody = Moody(site.home.database.url, *errors)
    with site.worker(moody):
        site.send(pack(envelope(heartbeat(1))))
        until(lambda: acked(site.home)[1] == 1, 180)
    assert moody.errors == []
    moody.close()


def test_what_arrives_while_no_worker_runs_waits_at_the_broker(site: Site) -> None:
    with site.worker():
        pass
    site.send(pack(envelope(heartbeat(1))))
    with site.worker():
        until(lambda: acked(site.home)[1] == 1)


def test_a_poke_reaches_the_device_it_is_meant_for(site: Site) -> None:
    heard: list[tuple[str, Command]] = []
    link = MqttLink(site.identity, boot=1, agent="test", on_command=lambda verb, c: heard.append((verb, c)))
    with site.worker() as worker:
        link.start()
        try:
            until(link.connected.is_set)
            until(lambda: _poked(worker, heard))
        finally:
            link.stop()
    verb, command = heard[0]
    assert verb == "check"
    assert command.expires > time.time()


def _poked(worker: IngestWorker, heard: list[tuple[str, Command]]) -> bool:
    worker.poke(TENANT, ("pump-1", "pump-2"))
    time.sleep(0.2)
    return bool(heard)


def test_a_lost_report_is_asked_for_again_as_soon_as_the_next_one_shows_the_gap(site: Site, tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox", limit_bytes=10_000_000)
    sender = Sender((("tele", outbox),), 1, time.monotonic(), patience=3_600)
    link = MqttLink(site.identity, boot=1, agent="test", on_command=lambda _, c: sender.missing(c.e, c.ranges))
    with site.worker() as worker:
        link.start()
        try:
            until(link.connected.is_set)
            outbox.append([heartbeat(1)])
            assert sender.next_batch() is not None
            sender.sent()  # and the broker lost it
            outbox.append([heartbeat(2)])
            until(lambda: _delivered(sender, link) and acked(site.home)[1] == 2)
            assert worker.counts["asked-again"] == 1
        finally:
            link.stop()


def _delivered(sender: Sender, link: MqttLink) -> bool:
    parcel = sender.next_batch()
    if parcel is not None and link.publish(*parcel):
        sender.sent()
    return True


@pytest.mark.slow
def test_a_broker_killed_twice_loses_nothing_that_the_device_still_holds(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is the agent's own outbox, sender and MQTT session; acknowledgements come as they do over HTTPS."""
    monkeypatch.setattr(lightship_agent.link.sender, "RESEND_SECONDS", 1.0)
    monkeypatch.setattr(lightship_agent.link.mqtt, "RETRY_CAP", 0.5)
    outbox = Outbox(tmp_path / "outbox", limit_bytes=10_000_000)
    sender = Sender((("tele", outbox),), 1, time.monotonic(), patience=1.0)
    link = MqttLink(site.identity, boot=1, agent="test", on_command=lambda *_: None)
    written = 0
    cuts = {60: site.kill_broker, 90: site.restart_broker, 140: site.kill_broker, 160: site.restart_broker}
    with site.worker():
        link.start()
        try:
            until(link.connected.is_set)
            end = time.monotonic() + 240
            while outbox.acked < 200:
                assert time.monotonic() < end, f"{outbox.acked} of {written} acknowledged"
                if written < 200:
                    written += 1
                    outbox.append([_row(written)])
                    cuts.get(written, lambda: None)()
                parcel = sender.next_batch()
                while parcel is not None and link.publish(*parcel):
                    sender.sent()
                    parcel = sender.next_batch()
                outbox.acknowledge(*acked(site.home))
                time.sleep(0.01)
        finally:
            link.stop()
    assert (outbox.dropped, outbox.depth) == (0, 0)
    with site.home.database.read() as session:
        stored = list(session.scalars(select(FeedbackRow.y).order_by(FeedbackRow.id)))
        assert session.scalars(select(DeadLetter)).all() == []
    assert stored == [str(n) for n in range(1, 201)]


def _row(n: int) -> LabelledRows:
    return LabelledRows(s=1, t=n, model="pump", digest="a" * 64, schema="b" * 64, x=((1.0,),), y=(str(n),))


@pytest.mark.slow
def test_two_workers_in_processes_of_their_own_share_the_reports_and_one_that_is_killed_comes_back(site: Site) -> None:
    first = [pack(envelope(heartbeat(s))) for s in range(1, 101)]
    processes = WorkerProcesses(site.home.path, 2, "info")
    processes.start()
    try:
        until(lambda: len(_workers(site)) == 2, 180)
        # Until they listen nobody keeps what is said; a device says it again until it is acknowledged.
        until(lambda: (site.send(*first), acked(site.home)[1] == 100)[1], 180)
        victim = _workers(site)[0]
        os.kill(victim, signal.SIGKILL)
        site.send(*(pack(envelope(heartbeat(s))) for s in range(101, 201)))
        until(lambda: acked(site.home)[1] == 200, 180)
        assert victim not in _workers(site)
    finally:
        processes.stop()
    assert _workers(site) == []
    history = open_history(site.home.path, "")
    assert [r.seq for r in history.read(0, 2**60)] == list(range(1, 201))
    history.close()


def _workers(site: Site) -> list[int]:
    """The processes that run `lightship ingest` on this home."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if b"ingest" in words and str(site.home.path).encode() in words:
                    found.append(int(entry.name))
    return sorted(found)
