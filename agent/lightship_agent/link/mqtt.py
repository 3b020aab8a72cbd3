"""Link: the MQTT session.

Rules:
* MQTT is never trusted for integrity: it brings pokes, and carries reports that the outbox keeps anyway;
* MQTT 5, and 3.1.1 where the broker knows no other; a session that outlives connections; one thread that owns the loop;
* reconnects are driven here, with full jitter, because the library's own doubling has none. Only a connection that held
  for a minute makes us hasty again, and a broker that says it is busy is left alone for longer;
* two programs under one name would take the session from each other for ever: whoever loses it stops, loudly, for an
  hour;
* the library is given no more than it may have on the way: what waits, waits in the outbox;
* callbacks never block and never raise;
* only the loop's thread touches the socket: a TLS connection that two threads use at once corrupts memory, and the
  library would write from whichever thread publishes if it did not think that somebody watches the socket for it.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
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

from .home_assistant import Announcement, HomeAssistant
from .identity import Identity
from .quality import LinkQuality

log = logging.getLogger(__name__)

SESSION_EXPIRY: Final = 86_400  # s
RETRY_BASE: Final = 4.0  # s
RETRY_GROWTH: Final = 1.5
RETRY_CAP: Final = 300.0  # s
#: A connection that held for so long proves that the broker is well again.
GOOD_SECONDS: Final = 60.0
#: The loop wakes up so often to see whether the broker is still there, and at once for what is to be said or heard.
LOOP_SECONDS: Final = 5.0
TAKEN_OVER_SECONDS: Final = 3_600.0
INFLIGHT: Final = 20
TAKEN_OVER: Final = 0x8E
_NOBODY_LISTENS: Final = 0x10
#: Server busy, quota exceeded, connection rate exceeded.
_BUSY: Final = frozenset({0x89, 0x97, 0x9F})
#: What the library says of a connection that just ended.
_UNSPECIFIED: Final = 0x80
_PROTOCOL_ERROR: Final = 0x82
_UNKNOWN_PROTOCOL: Final = frozenset({0x84, 0x01})


class MqttLink:
    """A supervised MQTT connection of one device."""

    def __init__(
        self,
        identity: Identity,
        *,
        boot: int,
        agent: str,
        on_command: Callable[[str, Command], None],
        home: HomeAssistant | None = None,
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
        self._home = home
        self._announced: dict[int, Announcement] = {}
        self._stop = threading.Event()
        self.connected = threading.Event()
        self.taken_over = False
        self.quality = LinkQuality()
        self._v5 = True
        self._mute = 0  # connections that ended before the broker had said anything
        self._since: float | None = None  # monotonic seconds of the present connection's CONNACK
        self._said = 0  # the reason with which the broker ended the connection, or refused it
        self._refusals: deque[int] = deque(maxlen=1_000)
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

    def publish(self, kind: str, payload: bytes) -> int:
        """Hand an envelope to the broker; a handle that `refusals` may name later, or 0 when it can't be sent now.

        Whether it was stored is confirmed by the server, not here.
        """
        if not self.connected.is_set():
            return 0
        topic = {"tele": topics.telemetry, "event": topics.event}[kind](self._tenant, self._device)
        began = time.monotonic()
        sent = self._client.publish(topic, payload, qos=1)
        self.quality.sent(sent.mid, began)
        return sent.mid if sent.rc == paho.MQTT_ERR_SUCCESS else 0

    def reply(self, verb: str, payload: bytes) -> bool:
        """Hand the answer to a command to the broker; False when it can't be sent now."""
        if not self.connected.is_set():
            return False
        topic = topics.response(self._tenant, self._device, verb)
        return self._client.publish(topic, payload, qos=1).rc == paho.MQTT_ERR_SUCCESS

    def announce(self) -> None:
        """Say again that we are here."""
        if self.connected.is_set():
            self._publish_state(on=True)

    def tell_home(self, values: bytes) -> bool:
        """Hand what Home Assistant shows to the broker; False when it can't be sent now, or is not wanted."""
        if self._home is None or not self._home.topic or not self.connected.is_set():
            return False
        return self._client.publish(self._home.topic, values, qos=0).rc == paho.MQTT_ERR_SUCCESS

    def refusals(self) -> list[int]:
        """Handles of what the broker would not take, or what it could give to nobody, since the last call."""
        out = []
        while self._refusals:
            out.append(self._refusals.popleft())
        return out

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
            clean_session=None if self._v5 else False,
            protocol=MQTTProtocolVersion.MQTTv5 if self._v5 else MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
        )
        self._tls = self._identity.server_context()
        if self._broker.auth == "password":
            client.username_pw_set(self._broker.username, self._identity.broker_password)
        client.tls_set_context(self._tls)
        client.max_inflight_messages_set(INFLIGHT)
        client.max_queued_messages_set(INFLIGHT)
        client.will_set(topics.state(self._tenant, self._device), self._state(on=False), qos=1, retain=True)
        client.on_connect = self._connected
        client.on_disconnect = self._disconnected
        client.on_message = self._received
        client.on_publish = self._published
        client.on_socket_register_write = _left_to_the_loop
        return client

    def _state(self, *, on: bool) -> bytes:
        return encode(State(on=on, n=self._boot, agent=self._agent))

    def _publish_state(self, *, on: bool) -> None:
        self._client.publish(topics.state(self._tenant, self._device), self._state(on=on), qos=1, retain=True)

    def _supervise(self) -> None:
        attempt = 0
        while not self._stop.is_set():
            self._since, self._said = None, 0
            try:
                self._connect_once()
                self._mute = 0 if self._since is not None or self._said else self._mute + 1
            except (OSError, ValueError, LightshipError) as e:
                log.info("mqtt: can't connect to %s:%s: %s", self._broker.host, self._broker.port, e)
            except Exception:  # a bug in a callback must not silence the device for ever
                log.exception("mqtt: the loop failed")
            self.connected.clear()
            if self._stop.is_set():
                return
            self._fall_back()
            attempt = 0 if self._held() else attempt + 1
            self._stop.wait(self._pause(attempt))

    def _held(self) -> bool:
        return self._since is not None and time.monotonic() - self._since >= GOOD_SECONDS

    def _pause(self, attempt: int) -> float:
        if self._said == TAKEN_OVER:
            self.taken_over = True
            log.error(
                "mqtt: another client has taken our session: is there a second device under the name %s? "
                "No MQTT for %.0f s; reports go over HTTPS",
                self._device,
                TAKEN_OVER_SECONDS,
            )
            return TAKEN_OVER_SECONDS
        self.taken_over = False
        return retry_pause(attempt, busy=self._said in _BUSY)

    def _fall_back(self) -> None:
        """Speak 3.1.1 to a broker that knows nothing newer: some say so, some just hang up, and so do broken ones."""
        # The library passes no answer on that refuses 3.1.1; it calls it a protocol error.
        refused = self._since is None and self._said == _PROTOCOL_ERROR
        if self._said in _UNKNOWN_PROTOCOL or refused or self._mute >= 2:
            self._v5, self._mute = not self._v5, 0
            log.warning("mqtt: the broker hangs up on us; trying MQTT %s", "5" if self._v5 else "3.1.1")
            self._client = self._make_client()

    def _connect_once(self) -> None:
        if self._broker.auth == "mtls":
            # Read again for every connection: the certificate is renewed while we run.
            self._identity.show_in(self._tls)
        if self._v5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = SESSION_EXPIRY
            self._client.connect(
                self._broker.host, self._broker.port, keepalive=30, clean_start=False, properties=properties
            )
        else:
            self._client.connect(self._broker.host, self._broker.port, keepalive=30)
        # Unlike `loop_forever`, it lets whoever publishes wake it up.
        while self._client.loop(LOOP_SECONDS) == paho.MQTT_ERR_SUCCESS:
            pass

    def _connected(self, client: paho.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            log.warning("mqtt: refused: %s", reason)
            self._said = reason.value
            return
        self._since = time.monotonic()
        self.quality.connected()
        client.subscribe([(topics.command(self._tenant, self._device, "+"), 1), (topics.notify(self._tenant), 1)])
        self._publish_state(on=True)
        said = self._home.announcements() if self._home is not None else []
        self._announced = {client.publish(a.topic, a.payload, qos=1, retain=True).mid: a for a in said}
        self.connected.set()

    def _disconnected(self, _client: paho.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        self.connected.clear()
        if not self._stop.is_set():
            if reason.value != _UNSPECIFIED:
                self._said = self._said or reason.value
            log.info("mqtt: disconnected: %s", reason)

    def _published(self, _client: paho.Client, _data: Any, mid: int, reason: Any, _properties: Any) -> None:
        self.quality.answered(mid, time.monotonic())
        if self._home is not None and (said := self._announced.pop(mid, None)) is not None:
            if reason.is_failure:
                self._home.refused(said, str(reason))
            else:
                self._home.taken(said)
            return
        if reason.is_failure or reason.value == _NOBODY_LISTENS:
            log.info("mqtt: the broker did not pass a report on: %s", reason)
            self._refusals.append(mid)

    def _received(self, _client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        verb = message.topic.rpartition("/")[2]
        try:
            command = decode(bytes(message.payload), Command, max_bytes=4_096)
        except WireError as e:
            log.warning("mqtt: dropped a message on %s: %s", message.topic, e)
            return
        if command.expires and command.expires < time.time():
            log.info("mqtt: %s %s came after its time: link.expired-command", verb, command.id)
            return
        self._on_command("check" if verb == "notify" else verb, command)


def _left_to_the_loop(_client: paho.Client, _data: Any, _socket: Any) -> None:
    """Told that something is to be written: the loop wakes up by itself."""


def retry_ceiling(attempt: int) -> float:
    """The longest pause in seconds before that attempt, from 0: grows up to `RETRY_CAP`, and stays there for ever."""
    # Bounded before it is raised: 1.5**2000 is no float, and a broker can be away for days.
    return min(RETRY_CAP, RETRY_BASE * RETRY_GROWTH ** min(attempt, 40))


def retry_pause(
    attempt: int, *, busy: bool = False, uniform: Callable[[float, float], float] = random.uniform
) -> float:
    """How long to wait before that attempt, from 0; `busy`: the broker said that it is.

    The first is anything up to its longest. From then on none is shorter than a quarter of it: whoever draws short
    pauses again and again would be there at the very moment the broker comes back, and so would a fifth of a fleet.
    """
    ceiling = retry_ceiling(attempt)
    if busy:
        return uniform(ceiling / 2, 2 * ceiling)
    return uniform(ceiling / 4 if attempt else min(0.1, ceiling), ceiling)
