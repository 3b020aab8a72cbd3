"""Bench telemetry: a fleet reports while brokers and ingest are killed, overflow and repeat themselves; what is lost?

Rules: devices are the agent's own outbox, sender and MQTT session, each under its own certificate; ingest is real
`lightship ingest` processes; the broker is a process that is killed. What the server has stored a device hears as over
HTTPS, out of the same query, every `POLL` seconds.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from sqlalchemy import select

from lightship.monitoring.history import open_history
from lightship.monitoring.ingest import acknowledgements
from lightship.storage.audit import now_ms
from lightship.storage.models import FeedbackRow
from lightship_agent.contract.messages import AnyRecord, Command, Envelope, LabelledRows
from lightship_agent.contract.wire import unpack
from lightship_agent.link.identity import (
    Broker,
    Identity,
    IdentityFile,
    certificate_request,
    key_pem,
    new_key,
    store_identity,
)
from lightship_agent.link.mqtt import MqttLink
from lightship_agent.link.outbox import Outbox
from lightship_agent.link.sender import RESEND_SECONDS, Sender

from .reports import beat
from .site import TENANT, Site, site

POLL: Final = 5.0  # seconds between two times at which a device hears what is stored
#: Reports of each device a second.
RATE: Final = 4.0
_ROWS_EVERY: Final = 10  # every so many, a report is of labelled rows, which no unique key keeps from being doubled
_DUPLICATES: Final = 0.05
_SETTLE: Final = 180.0


@dataclass(frozen=True)
class Proof:
    """What came of it."""

    broker: str
    reports: int
    ingest_kills: int
    broker_kills: int
    outage: int  # messages that were sent while no ingest ran
    overflowed: bool  # the broker said that it drops
    injected: int  # messages that were sent twice on purpose
    stored: int
    lost: int
    duplicate_rows: int
    resent: float  # of the reports: those that devices sent again
    seconds: float
    devices: int = 0  # 0: not noted


class _Device:
    """A device's link room, and what it has sent."""

    def __init__(self, identity: Identity, folder: Path) -> None:
        self.name = identity.device
        self.outbox = Outbox(folder, limit_bytes=64_000_000)
        self.sender = Sender((("tele", self.outbox),), 1, time.monotonic(), patience=POLL + RESEND_SECONDS)
        self.link = MqttLink(identity, boot=1, agent="bench", on_command=self._command)
        self.sent: Counter[int] = Counter()
        self.messages = 0
        self.injected = 0

    def _command(self, verb: str, command: Command) -> None:
        if verb == "resend":
            self.sender.missing(command.e, command.ranges or ((command.first, 2**53),))

    def write(self, number: int) -> None:
        """A report, as the agent's reporter does."""
        record: AnyRecord = beat(1, now_ms())
        if number % _ROWS_EVERY == 0:
            said = f"{self.name}-{number}"
            record = LabelledRows(
                s=1, t=now_ms(), model="pump", digest="a" * 64, schema="b" * 64, x=((1.0,),), y=(said,)
            )
        self.outbox.append([record])

    def send(self, chance: random.Random) -> None:
        """What is due, as the agent's reporter does; now and then something comes twice."""
        self.outbox.tick()
        for handle in self.link.refusals():
            self.sender.refused(handle)
        parcel = self.sender.next_batch()
        while parcel is not None and (handle := self.link.publish(*parcel)):
            self.sender.sent(handle)
            self.messages += 1
            self.sent.update(record.s for record in unpack(parcel.packed, Envelope).r)
            if chance.random() < _DUPLICATES:
                self.injected += bool(self.link.publish(*parcel))
            parcel = self.sender.next_batch()


def measure(folder: Path, kind: str, devices: int, each: int, overflow: int = 1_400) -> Proof:
    """A fleet of so many devices with so many reports each, on a broker of that kind.

    `overflow`: ingest is away for so many messages; mosquitto keeps a thousand by itself.
    """
    chance, began = random.Random(kind), time.monotonic()
    with site(folder / kind) as place:
        names = [f"device-{n}" for n in range(devices)]
        place.add_devices(names)
        place.start_broker(kind, default_queue=True)
        fleet = [_Device(_identity(place, folder / f"{kind}-devices", n), folder / f"{kind}-outbox" / n) for n in names]
        try:
            done = _Play(place, fleet, each, overflow, chance).play()
        finally:
            for device in fleet:
                device.link.stop()
                device.outbox.close()
        kept, rows = _kept(place)
        said = "\n".join(p.read_text(errors="replace") for p in place.folder.glob("*.log"))
    shutil.rmtree(folder / f"{kind}-devices")
    shutil.rmtree(folder / f"{kind}-outbox")
    total, sent = devices * each, sum(device.sent.total() for device in fleet)
    again = sent - sum(len(device.sent) for device in fleet)
    wanted = {f"{d.name}-{n}" for d in fleet for n in range(0, each, _ROWS_EVERY)}
    # A report is lost where either of the two places that it belongs to has not got it.
    return Proof(
        broker=kind,
        reports=total,
        ingest_kills=done["ingest kills"],
        broker_kills=done["broker kills"],
        outage=done["outage"],
        overflowed="being dropped" in said,
        injected=sum(device.injected for device in fleet),
        stored=len(kept),
        lost=total - len(kept) + len(wanted - set(rows)),
        duplicate_rows=sum(kept.values()) - len(kept) + len(rows) - len(set(rows)),
        resent=again / total,
        seconds=time.monotonic() - began,
        devices=devices,
    )


class _Play:
    """The course of events, by how many reports were written."""

    def __init__(self, place: Site, fleet: list[_Device], each: int, overflow: int, chance: random.Random) -> None:
        self._place, self._fleet, self._each, self._chance = place, fleet, each, chance
        self._overflow = overflow
        self._away = -1  # messages that had been sent when the outage began
        self.done: Counter[str] = Counter()
        self._restart = 0.0  # when the broker is to come back, monotonic

    def play(self) -> Counter[str]:
        """All of it."""
        self._place.start_worker()
        for device in self._fleet:
            device.link.start()
        time.sleep(5)  # nobody listens yet, and the first connections are made: the proof is about what follows
        acts: list[tuple[float, Callable[[], object]]] = [
            (0.05, self._kill_ingest), (0.15, self._kill_ingest), (0.25, self._kill_ingest),
            (0.33, self._kill_broker), (0.46, self._begin_outage),
            (0.68, self._kill_ingest), (0.76, self._kill_broker), (0.86, self._kill_ingest), (0.94, self._kill_ingest),
        ]  # fmt: skip
        total, written, heard, began = len(self._fleet) * self._each, 0, 0.0, time.monotonic()
        while written < total or self._away >= 0 or any(device.outbox.depth for device in self._fleet):
            now = time.monotonic()
            while written < total and now - began >= written / (RATE * len(self._fleet)):
                self._fleet[written % len(self._fleet)].write(written // len(self._fleet))
                written += 1
            while acts and written >= acts[0][0] * total and self._away < 0:
                acts.pop(0)[1]()
            if self._away >= 0 and self._messages() - self._away >= self._overflow:
                self._end_outage()
            if self._restart and now >= self._restart:
                self._restart = 0.0
                self._place.restart_broker()
            for device in self._fleet:
                device.send(self._chance)
            if now - heard >= POLL:
                heard = now
                self._hear()
            if now - began > total / (RATE * len(self._fleet)) + _SETTLE:
                break
            time.sleep(0.02)
        return self.done

    def _messages(self) -> int:
        return sum(device.messages for device in self._fleet)

    def _kill_ingest(self) -> None:
        self._place.kill_worker()
        self._place.start_worker()
        self.done["ingest kills"] += 1

    def _kill_broker(self) -> None:
        self._place.kill_broker()
        self._restart = time.monotonic() + 1.0
        self.done["broker kills"] += 1

    def _begin_outage(self) -> None:
        self._place.kill_worker()
        self.done["ingest kills"] += 1
        self._away = self._messages()

    def _end_outage(self) -> None:
        self._place.start_worker()
        self.done["outage"] = self._messages() - self._away
        self._away = -1

    def _hear(self) -> None:
        with self._place.home.database.read() as session:
            for device in self._fleet:
                acks = acknowledgements(session, device.name)
                for said in (acks.newest, *acks.others.split(",")):
                    epoch, _, seq = said.partition(":")
                    if seq:
                        device.outbox.acknowledge(epoch, int(seq))


def _kept(place: Site) -> tuple[Counter[tuple[str, str, int]], list[str]]:
    """How often each report is in the history, and the labelled rows that were taken into account."""
    history = open_history(place.home.path, "")
    kept = Counter((r.device, r.epoch, r.seq) for r in history.read(0, 2**60))
    history.close()
    with place.home.database.read() as session:
        return kept, list(session.scalars(select(FeedbackRow.y)))


def _identity(place: Site, folder: Path, name: str) -> Identity:
    """As enrolment leaves it."""
    assert place.broker is not None
    broker, key = place.broker.info, new_key()
    issued = place.home.ca.issue_device(certificate_request(key, name).decode(), name)
    info = IdentityFile(
        device=name,
        tenant=TENANT,
        server="https://127.0.0.1",
        broker=Broker(host=broker.host, port=broker.port, auth=broker.auth, username=broker.device_username),
    )
    files = {
        "identity.json": msgspec.json.encode(info),
        "key.pem": key_pem(key),
        "cert.pem": issued.chain,
        "ca.pem": place.home.ca.certificate_pem(),
        "tuf-root.json": b"{}",
    }
    store_identity(folder / name, files)
    return Identity(
        folder=folder / name / "identity", info=info, tuf_root=b"{}", broker_password=broker.device_password
    )
