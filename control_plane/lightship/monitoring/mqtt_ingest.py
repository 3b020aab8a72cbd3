"""Monitoring: the ingest worker on MQTT, and the voice that pokes devices.

Rules:
* one thread owns the connection: it collects, commits a batch in one transaction, then acknowledges in order;
* the socket is not read while a batch is committed, and that is the back-pressure;
* on a database error nothing is acknowledged and the connection is dropped: the broker delivers again;
* acknowledgements never outlive the connection they belong to: their numbers mean something else in the next one;
* a gap is asked for only when it has lasted: another worker may be storing what seems to be missing. What is asked for
  is what the database misses then, and nothing else;
* several workers share one subscription; each has a name of its own that it keeps, so that what the broker holds for
  it is there after a restart.
"""

from __future__ import annotations

import logging
import random
import ssl
import threading
import time
from collections import Counter
from typing import Any, Final, NamedTuple

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from sqlalchemy import select

from lightship.fleet.broker import BrokerInfo
from lightship.storage.audit import now_ms
from lightship.storage.database import Database
from lightship.storage.models import DeviceEpoch
from lightship_agent.contract import topics
from lightship_agent.contract.codes import LightshipError
from lightship_agent.contract.messages import Command
from lightship_agent.contract.wire import encode

from . import ingest, tallies
from .cursors import Cursor, Span
from .history import History, remember
from .mqtt_client import IngestClient, Message

log = logging.getLogger(__name__)

BATCH_MESSAGES: Final = 500
#: Of payloads; what they inflate to is some times as much, and is held until it is stored.
BATCH_BYTES: Final = 512 * 1024
BATCH_SECONDS: Final = 0.2
#: When nothing more comes for so long, the broker may be waiting for us: many give out twenty messages and no more
#: before the first is acknowledged, and a batch that waits for the next one would make that a hundred a second.
QUIET_SECONDS: Final = 0.02
SESSION_EXPIRY: Final = 600  # s
COMMAND_SECONDS: Final = 300
#: A gap that lasts for less may be no gap at all.
GAP_SECONDS: Final = 2.0
#: The least time between two requests to one device to send reports again.
ASK_SECONDS: Final = 15.0
_MAX_GAPS: Final = 10_000


class _Waiting(NamedTuple):
    """A gap that may have to be asked for."""

    tenant: str
    epoch: str
    since: float  # monotonic seconds


class IngestWorker:
    """One MQTT connection, one thread.

    Args:
        database: where reports go.
        broker: which broker.
        tls: as whom we come.
        client_id: the name of this worker at the broker, the same after every restart.
        history: where reports are kept as they came, if anywhere.
        protocol: MQTT 5, or 3.1.1, which costs a third less; None: 3.1.1 where the broker is known to share
            subscriptions among such clients too.
        listening: False for a voice alone, which only pokes.
    """

    def __init__(
        self,
        database: Database,
        broker: BrokerInfo,
        tls: ssl.SSLContext | None,
        client_id: str,
        *,
        history: History | None = None,
        protocol: str = "auto",
        listening: bool = True,
    ) -> None:
        """Prepare; `start` connects."""
        self._database = database
        self._broker = broker
        self._history = history
        self._listening = listening
        self._v5 = protocol == "5" or (protocol == "auto" and broker.kind != "mosquitto")
        self._generation = 0  # of the connection
        self._batch: list[tuple[int, Message]] = []  # with the generation of each
        self._bytes = 0  # of their payloads
        self._stop = threading.Event()
        self.connected = threading.Event()
        self.counts: Counter[str] = Counter()
        self._tallies = tallies.Tallies(database, client_id if listening else "")
        self._gaps: dict[str, _Waiting] = {}  # by device
        self._asked: dict[str, float] = {}  # monotonic seconds, by device
        self._client = self._make_client(tls, client_id)
        self._thread = threading.Thread(target=self._supervise, name="ingest", daemon=True)

    def start(self) -> None:
        """Connect in the background."""
        self._thread.start()

    def stop(self) -> None:
        """Commit what was received and disconnect."""
        self._stop.set()
        self._thread.join(timeout=10)

    def poke(self, tenant: str, devices: tuple[str, ...]) -> None:
        """Ask devices to look for an assignment now; harmless if it gets lost."""
        expires = int(time.time()) + COMMAND_SECONDS
        for device in devices:
            command = Command(id=f"check-{expires}", expires=expires)
            self._command(topics.command(tenant, device, "check"), command)

    def ask(self, tenant: str, device: str, verb: str, command: Command) -> None:
        """Put a command on its way; harmless if it gets lost, for it goes with the answer to the next poll too."""
        self._command(topics.command(tenant, device, verb), command)

    def _make_client(self, tls: ssl.SSLContext | None, client_id: str) -> IngestClient:
        client = IngestClient(client_id, v5=self._v5, heard=self._received)
        if self._broker.auth == "password":
            client.username_pw_set(self._broker.control_username, self._broker.control_password)
        if tls is not None:
            client.tls_set_context(tls)
        client.on_connect = self._connected
        # What is said before the broker has noted who listens is said to nobody.
        client.on_subscribe = lambda *_: self.connected.set()
        # `poke` comes from other threads: with it, only the loop's thread writes. Two at once in one TLS connection
        # would corrupt memory.
        client.on_socket_register_write = _left_to_the_loop
        return client

    def _supervise(self) -> None:
        attempt = 0
        while not self._stop.is_set():
            try:
                self._session()
                attempt = 0
            except (OSError, LightshipError) as e:
                log.warning("ingest: %s: %s", type(e).__name__, e)
                attempt += 1
            except Exception:  # whatever one batch met, reports must go on being stored
                log.exception("ingest: the session failed")
                attempt += 1
            self.connected.clear()
            self._stop.wait(random.uniform(0.1, min(60.0, 0.5 * 2 ** min(attempt, 10))))

    def _session(self) -> None:
        self._batch, self._bytes = [], 0
        self._generation += 1
        self._connect()
        flushed = asked = time.monotonic()
        try:
            while not self._stop.is_set():
                had = len(self._batch)
                waits = QUIET_SECONDS if had else 0.1
                if self._client.loop(timeout=waits) != paho.MQTT_ERR_SUCCESS or not self._read_on():
                    return
                now, quiet = time.monotonic(), 0 < had == len(self._batch)
                if quiet or self._is_full() or now - flushed > BATCH_SECONDS:
                    self._flush()
                    flushed = now
                if self.connected.is_set():
                    self._tallies.flush()
                if self._gaps and now - asked > GAP_SECONDS / 4:
                    self._ask(now)
                    asked = now
            self._flush()
            self._tallies.flush(now=True)
        finally:
            self._batch = []
            self._client.disconnect()
            self._client.loop(timeout=0.1)

    def _read_on(self) -> bool:
        """Read what has come with the last message: to ask the system for each costs as much as to read it."""
        had = -1
        while had < len(self._batch) and not self._is_full():
            had = len(self._batch)
            if self._client.loop_read() != paho.MQTT_ERR_SUCCESS:
                return False
        return True

    def _is_full(self) -> bool:
        return len(self._batch) >= BATCH_MESSAGES or self._bytes >= BATCH_BYTES

    def _connect(self) -> None:
        if not self._v5:
            self._client.connect(self._broker.host, self._broker.port, keepalive=60)
            return
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = SESSION_EXPIRY
        self._client.connect(
            self._broker.host, self._broker.port, keepalive=60, clean_start=False, properties=properties
        )

    def _flush(self) -> None:
        batch, self._batch, self._bytes = self._batch, [], 0
        if not batch:
            return
        understood = []
        for _, message in batch:
            address = topics.parse(message.topic)
            if address is not None:
                incoming = ingest.Incoming(address.device, address.kind, message.payload, address.tenant)
                understood.append((incoming, ingest.understand(incoming)))
        now = now_ms()
        if self._history is not None:
            self.counts["remembered"] += remember(self._database, self._history, understood, now)
        with self._database.write() as session:
            receipts = ingest.store_all(session, understood, now)
        self._tallies.take(tallies.counted(session))
        self._client.acknowledge([m.mid for generation, m in batch if generation == self._generation])
        for (incoming, _), receipt in zip(understood, receipts, strict=True):
            self.counts["dead" if receipt.code else "stored"] += 1
            if receipt.gap is None:
                self._gaps.pop(incoming.device, None)
            elif incoming.device not in self._gaps and len(self._gaps) < _MAX_GAPS:
                self._gaps[incoming.device] = _Waiting(incoming.tenant, receipt.gap.epoch, time.monotonic())

    def _ask(self, now: float) -> None:
        """Ask for what is still missing, as seldom as a device would listen; harmless if it gets lost."""
        due = {
            device: gap
            for device, gap in self._gaps.items()
            if now - gap.since >= GAP_SECONDS and now - self._asked.get(device, -ASK_SECONDS) >= ASK_SECONDS
        }
        if not due:
            return
        with self._database.read() as session:
            e = DeviceEpoch
            rows = session.execute(select(e.device, e.epoch, e.next_seq, e.ahead).where(e.device.in_(list(due)[:500])))
            found = {(device, epoch): _missing(next_seq, ahead) for device, epoch, next_seq, ahead in rows}
        expires = int(time.time()) + COMMAND_SECONDS
        for device, gap in list(due.items())[:500]:
            del self._gaps[device]
            missing = found.get((device, gap.epoch), [])
            if not missing:
                continue
            self._asked[device] = now
            self.counts["asked-again"] += 1
            self._tallies.take({tallies.key("lightship_ingest_resend_requests_total"): 1})
            command = Command(
                id=f"resend-{expires}", expires=expires, e=gap.epoch, first=missing[0][0], ranges=tuple(missing)
            )
            self._command(topics.command(gap.tenant, device, "resend"), command)

    def _command(self, topic: str, command: Command) -> None:
        self._client.publish(topic, encode(command), qos=1)

    def _connected(self, client: paho.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            log.warning("ingest: the broker refuses us: %s", reason)
            return
        if self._listening:
            # The embedded broker's router dies, and with it the broker, when a client that shares a subscription is
            # killed. There each worker hears everything; what two of them store is stored once all the same.
            shared = self._broker.kind != "embedded"
            client.subscribe([(topic, 1) for topic in topics.ingest_filters(shared=shared)])
        else:
            self.connected.set()

    def _received(self, message: Message) -> None:
        self._batch.append((self._generation, message))
        self._bytes += len(message.payload)


def _left_to_the_loop(_client: paho.Client, _data: Any, _socket: Any) -> None:
    """Told that something is to be written: the loop looks by itself."""


def _missing(next_seq: int, ahead: list[list[int]]) -> list[Span]:
    return Cursor(next_seq, 0, [(first, last) for first, last in ahead]).missing()
