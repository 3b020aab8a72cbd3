"""Monitoring: the ingest worker on MQTT, and the voice that pokes devices.

Rules:
* one thread owns the connection: it collects, commits a batch in one transaction, then acknowledges in order;
* the socket is not read while a batch is committed, and that is the back-pressure;
* on a database error nothing is acknowledged and the connection is dropped: the broker delivers again;
* acknowledgements never outlive the connection they belong to.
"""

from __future__ import annotations

import logging
import random
import ssl
import threading
import time
from collections import Counter
from typing import Any, Final

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from lightship.fleet.broker import BrokerInfo
from lightship.storage.audit import now_ms
from lightship.storage.database import Database
from lightship_agent.contract import topics
from lightship_agent.contract.codes import LightshipError
from lightship_agent.contract.messages import Command
from lightship_agent.contract.wire import encode

from .ingest import Gap, receive

log = logging.getLogger(__name__)

BATCH_MESSAGES: Final = 500
BATCH_SECONDS: Final = 0.2
SESSION_EXPIRY: Final = 600  # s
COMMAND_SECONDS: Final = 300
#: The least time between two requests to one device to send reports again.
ASK_SECONDS: Final = 15.0


class IngestWorker:
    """One MQTT connection, one thread."""

    def __init__(self, database: Database, broker: BrokerInfo, tls: ssl.SSLContext, client_id: str) -> None:
        """Prepare; `start` connects."""
        self._database = database
        self._broker = broker
        self._batch: list[paho.MQTTMessage] = []
        self._stop = threading.Event()
        self.connected = threading.Event()
        self.counts: Counter[str] = Counter()
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
            self._client.publish(topics.command(tenant, device, "check"), encode(command), qos=1)

    def _make_client(self, tls: ssl.SSLContext, client_id: str) -> paho.Client:
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=MQTTProtocolVersion.MQTTv5,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        if self._broker.auth == "password":
            client.username_pw_set(self._broker.control_username, self._broker.control_password)
        client.tls_set_context(tls)
        client.on_connect = self._connected
        client.on_message = self._received
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
            self._stop.wait(random.uniform(0.1, min(60.0, 0.5 * 2**attempt)))

    def _session(self) -> None:
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = SESSION_EXPIRY
        self._batch = []
        self._client.connect(
            self._broker.host, self._broker.port, keepalive=60, clean_start=False, properties=properties
        )
        flushed = time.monotonic()
        try:
            while not self._stop.is_set():
                if self._client.loop(timeout=0.1) != paho.MQTT_ERR_SUCCESS:
                    return
                if len(self._batch) >= BATCH_MESSAGES or time.monotonic() - flushed > BATCH_SECONDS:
                    self._flush()
                    flushed = time.monotonic()
            self._flush()
        finally:
            self._batch = []
            self._client.disconnect()
            self._client.loop(timeout=0.1)

    def _flush(self) -> None:
        batch, self._batch = self._batch, []
        if not batch:
            return
        gaps: dict[topics.Address, Gap | None] = {}
        with self._database.write() as session:
            for message in batch:
                address = topics.parse(message.topic)
                if address is None:
                    continue
                receipt = receive(session, address.device, address.kind, bytes(message.payload), now_ms())
                self.counts["dead" if receipt.code else "stored"] += 1
                gaps[address] = receipt.gap
        for message in batch:
            self._client.ack(message.mid, message.qos)
        for address, gap in gaps.items():
            if gap is not None:
                self._ask_again(address, gap)

    def _ask_again(self, address: topics.Address, gap: Gap) -> None:
        """Ask a device for the reports we miss, as seldom as it would listen; harmless if it gets lost."""
        now = time.monotonic()
        if now - self._asked.get(address.device, -ASK_SECONDS) < ASK_SECONDS:
            return
        self._asked[address.device] = now
        self.counts["asked-again"] += 1
        expires = int(time.time()) + COMMAND_SECONDS
        command = Command(id=f"resend-{expires}", expires=expires, e=gap.epoch, first=gap.first)
        topic = topics.command(address.tenant, address.device, "resend")
        self._client.publish(topic, encode(command), qos=1)

    def _connected(self, client: paho.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            log.warning("ingest: the broker refuses us: %s", reason)
            return
        client.subscribe([(topic, 1) for topic in topics.ingest_filters()])
        self.connected.set()

    def _received(self, _client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        self._batch.append(message)
