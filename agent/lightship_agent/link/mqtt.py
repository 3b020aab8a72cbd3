"""Link: the MQTT session.

Rules:
* MQTT is never trusted for integrity: it brings pokes, and carries reports that the outbox keeps anyway;
* MQTT 5, a session that outlives connections (`clean_start=False` with expiry), one thread that owns the loop;
* reconnects are driven here, with full jitter, because the library's own doubling has none;
* callbacks never block and never raise.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from lightship_agent.contract import topics
from lightship_agent.contract.codes import LightshipError, WireError
from lightship_agent.contract.messages import Command, State
from lightship_agent.contract.wire import decode, encode

from .identity import Identity

log = logging.getLogger(__name__)

SESSION_EXPIRY: Final = 86_400  # s
RETRY_BASE: Final = 1.0  # s
RETRY_CAP: Final = 300.0  # s


class MqttLink:
    """A supervised MQTT connection of one device."""

    def __init__(
        self, identity: Identity, *, boot: int, agent: str, on_command: Callable[[str, Command], None]
    ) -> None:
        """Prepare; `start` connects. `on_command(verb, command)` runs on the MQTT thread and must not block."""
        if identity.info.broker is None:
            message = "an identity without a broker has no MQTT link"
            raise ValueError(message)
        self._broker = identity.info.broker
        self._identity = identity
        self._boot = boot
        self._agent = agent
        self._on_command = on_command
        self._stop = threading.Event()
        self.connected = threading.Event()
        self._client = self._make_client()
        self._thread = threading.Thread(target=self._supervise, name="mqtt", daemon=True)

    def start(self) -> None:
        """Connect in the background, for as long as it takes."""
        self._thread.start()

    def stop(self) -> None:
        """Say goodbye and stop the thread."""
        self._stop.set()
        if self.connected.is_set():
            self._publish_state(on=False)
        self._client.disconnect()
        self._thread.join(timeout=5)

    def publish(self, kind: str, payload: bytes) -> bool:
        """Hand an envelope to the broker; False when not connected. Delivery is confirmed by the server, not here."""
        if not self.connected.is_set():
            return False
        topic = {"tele": topics.telemetry, "event": topics.event}[kind](self._tenant, self._device)
        return self._client.publish(topic, payload, qos=1).rc == paho.MQTT_ERR_SUCCESS

    @property
    def _tenant(self) -> str:
        return self._identity.info.tenant

    @property
    def _device(self) -> str:
        return self._identity.device

    def _make_client(self) -> paho.Client:
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._device,
            protocol=MQTTProtocolVersion.MQTTv5,
            reconnect_on_failure=False,
        )
        self._tls = self._identity.server_context()
        if self._broker.auth == "password":
            client.username_pw_set(self._broker.username, self._identity.broker_password)
        client.tls_set_context(self._tls)
        client.max_inflight_messages_set(20)
        client.max_queued_messages_set(100)
        client.will_set(topics.state(self._tenant, self._device), self._state(on=False), qos=1, retain=True)
        client.on_connect = self._connected
        client.on_disconnect = self._disconnected
        client.on_message = self._received
        return client

    def _state(self, *, on: bool) -> bytes:
        return encode(State(on=on, n=self._boot, agent=self._agent))

    def _publish_state(self, *, on: bool) -> None:
        self._client.publish(topics.state(self._tenant, self._device), self._state(on=on), qos=1, retain=True)

    def _supervise(self) -> None:
        attempt = 0
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                self._connect_once()
            except (OSError, ValueError, LightshipError) as e:
                log.info("mqtt: can't connect to %s:%s: %s", self._broker.host, self._broker.port, e)
            except Exception:  # a bug in a callback must not silence the device for ever
                log.exception("mqtt: the loop failed")
            self.connected.clear()
            # Only a connection that held for a minute proves that the broker is well again.
            attempt = 0 if time.monotonic() - began > 60 else attempt + 1
            self._stop.wait(random.uniform(0.1, retry_ceiling(attempt)))

    def _connect_once(self) -> None:
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = SESSION_EXPIRY
        if self._broker.auth == "mtls":
            # Read again for every connection: the certificate is renewed while we run.
            self._identity.show_in(self._tls)
        self._client.connect(
            self._broker.host, self._broker.port, keepalive=30, clean_start=False, properties=properties
        )
        self._client.loop_forever()

    def _connected(self, client: paho.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            log.warning("mqtt: refused: %s", reason)
            return
        client.subscribe([(topics.command(self._tenant, self._device, "+"), 1), (topics.notify(self._tenant), 1)])
        self._publish_state(on=True)
        self.connected.set()

    def _disconnected(self, _client: paho.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        self.connected.clear()
        if not self._stop.is_set():
            log.info("mqtt: disconnected: %s", reason)

    def _received(self, _client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        verb = message.topic.rpartition("/")[2]
        try:
            command = decode(bytes(message.payload), Command, max_bytes=4_096)
        except WireError as e:
            log.warning("mqtt: dropped a message on %s: %s", message.topic, e)
            return
        if command.expires and command.expires < time.time():
            return
        self._on_command("check" if verb == "notify" else verb, command)


def retry_ceiling(attempt: int) -> float:
    """The longest pause in seconds before that attempt, from 1: doubles up to `RETRY_CAP`, and stays there for ever."""
    # Bounded before it is raised: 2**1024 is no float, and a broker can be away for days.
    return min(RETRY_CAP, RETRY_BASE * (1 << min(attempt, 10)))
