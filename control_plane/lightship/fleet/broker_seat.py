"""Fleet: a seat at a broker that is being checked: one MQTT connection, turned by whoever sits there.

Rules: no thread of its own: whoever checks turns all seats in one loop, so that nothing happens while he looks away,
and a seat that is not turned is as silent as a device without power.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from lightship_agent.contract.codes import LinkError

PATIENCE: Final = 8.0
_TURN: Final = 0.004
_LIMITS: Final = (
    "SessionExpiryInterval",
    "ReceiveMaximum",
    "MaximumQoS",
    "RetainAvailable",
    "MaximumPacketSize",
    "TopicAliasMaximum",
    "WildcardSubscriptionAvailable",
    "SharedSubscriptionAvailable",
    "ServerKeepAlive",
)


@dataclass(frozen=True)
class Credential:
    """As whom we come. `tls` has the certificate in it, if there is one; None: without TLS."""

    tls: ssl.SSLContext | None = None
    username: str = ""
    password: str = field(default="", repr=False)


class Will(NamedTuple):
    """What the broker says when we die."""

    topic: str
    payload: bytes
    delay: int = 0
    retain: bool = False


class Heard(NamedTuple):
    """A message."""

    mid: int
    topic: str
    payload: bytes
    retain: bool
    properties: Any


class RefusedError(LinkError):
    """The broker said no, or said nothing. `reason`: its code, or -1."""

    def __init__(self, message: str, reason: int = -1) -> None:
        """Of the family link.*."""
        super().__init__("link.broker", message)
        self.reason = reason


class Seat:
    """One connection."""

    def __init__(
        self,
        host: str,
        port: int,
        who: Credential,
        client_id: str,
        *,
        v5: bool,
        clean: bool = True,
        expiry: int = 0,
        keepalive: int = 30,
        window: int = 0,
        will: Will | None = None,
        manual: bool = False,
    ) -> None:
        """Prepare; `open` connects.

        Args:
            host: where the broker is.
            port: its port.
            who: as whom.
            client_id: of the session.
            v5: MQTT 5; else 3.1.1, where `clean` alone says whether the session is kept.
            clean: begin anew.
            expiry: seconds for which the session is kept, in MQTT 5.
            keepalive: in seconds.
            window: receive maximum; 0: not said.
            will: last will.
            manual: acknowledge only what `acknowledge` names.
        """
        self.v5, self.client_id = v5, client_id
        self._host, self._port = host, port
        self._clean, self._expiry, self._keepalive, self._window = clean, expiry, keepalive, window
        self.heard: list[Heard] = []
        self.reasons: dict[int, int] = {}  # of publishes, by handle
        self.lost: int | None = None  # the reason, or -1
        self.present = False
        self.granted: dict[str, int] = {}
        self._answer: int | None = None
        self._subscribed: set[int] = set()
        self._client = self._make(who, will, manual=manual)

    def _make(self, who: Credential, will: Will | None, *, manual: bool) -> paho.Client:
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self.client_id,
            clean_session=None if self.v5 else self._clean,
            protocol=MQTTProtocolVersion.MQTTv5 if self.v5 else MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
            manual_ack=manual,
        )
        if who.username:
            client.username_pw_set(who.username, who.password or None)
        if who.tls is not None:
            client.tls_set_context(who.tls)
        if will is not None:
            more = properties(PacketTypes.WILLMESSAGE, WillDelayInterval=will.delay) if self.v5 else None
            client.will_set(will.topic, will.payload, qos=1, retain=will.retain, properties=more)
        client.on_connect = self._connected
        client.on_disconnect = self._disconnected
        client.on_message = self._received
        client.on_publish = self._published
        client.on_subscribe = self._granted
        return client

    def open(self) -> Seat:
        """Connect.

        Raises:
            LinkError: link.unreachable, link.broker (a `RefusedError`).
        """
        more: dict[str, Any] = {}
        if self.v5:
            asked = {"SessionExpiryInterval": self._expiry} if self._expiry else {}
            asked |= {"ReceiveMaximum": self._window} if self._window else {}
            more = {"clean_start": self._clean, "properties": properties(PacketTypes.CONNECT, **asked)}
        try:
            self._client.connect(self._host, self._port, keepalive=self._keepalive, **more)
        except ssl.SSLError as e:
            message = f"No TLS connection with {self._host}:{self._port}: {e}."
            raise RefusedError(message) from e
        except OSError as e:
            raise LinkError("link.unreachable", f"Can't reach {self._host}:{self._port}: {e}.") from e
        connection: Any = self._client.socket()
        if connection is not None:
            # Else each window of publishes waits for a delayed acknowledgement of TCP.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pump([self], lambda: self._answer is not None or self.lost is not None)
        if self._answer is None or self._answer >= 0x80:
            reason = -1 if self._answer is None else self._answer
            message = "The broker hung up, or said nothing."
            if reason >= 0:
                message = f"The broker refused us (0x{reason:02x})."
            raise RefusedError(message, reason)
        return self

    @property
    def tls_version(self) -> str:
        """Of the connection; "" without TLS."""
        connection: Any = self._client.socket()
        return str(connection.version()) if hasattr(connection, "version") else ""

    def turn(self) -> None:
        """Say and hear what there is to be said and heard."""
        if self.lost is None and self._client.loop(_TURN) != paho.MQTT_ERR_SUCCESS and self.lost is None:
            self.lost = -1

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, **more: Any) -> int:
        """Hand it over at QoS 1; its handle. `more`: properties, by their names."""
        packed = properties(PacketTypes.PUBLISH, **more) if self.v5 and more else None
        return self._client.publish(topic, payload, qos=1, retain=retain, properties=packed).mid

    def say(self, topic: str, *payloads: bytes, retain: bool = False, **more: Any) -> int:
        """Publish, and wait until the broker has answered for all; how often it took one."""
        mids = [self.publish(topic, payload, retain=retain, **more) for payload in payloads]
        pump([self], lambda: self.lost is not None or self.reasons.keys() >= set(mids), PATIENCE + len(mids) / 200)
        return sum(1 for mid in mids if self.reasons.get(mid, 0xFF) < 0x80)

    def subscribe(self, *filters: str) -> None:
        """Returns when the broker has answered, which is no promise that anything will be delivered."""
        for each in filters:
            _, mid = self._client.subscribe(each, qos=1)
            pump([self], lambda mid=mid: mid in self._subscribed or self.lost is not None)  # type: ignore[misc]

    def acknowledge(self, heard: Sequence[Heard]) -> None:
        """Say that these were taken; with `manual` alone."""
        for one in heard:
            self._client.ack(one.mid, 1)
        pump([self], lambda: False, 0.2)

    def close(self) -> None:
        """Say goodbye."""
        if self.lost is None:
            self._client.disconnect()
            pump([self], lambda: self.lost is not None, 1.0)

    def kill(self) -> None:
        """Die without a word."""
        connection: Any = self._client.socket()
        self.lost = -1
        if connection is not None:
            with suppress(OSError):  # the broker was faster
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _connected(self, _client: paho.Client, _data: Any, flags: Any, reason: Any, more: Any) -> None:
        self._answer, self.present = reason.value, bool(flags.session_present)
        self.granted = {name: int(getattr(more, name)) for name in _LIMITS if hasattr(more, name)}

    def _disconnected(self, _client: paho.Client, _data: Any, flags: Any, reason: Any, _more: Any) -> None:
        if self.lost is None:
            self.lost = reason.value if flags.is_disconnect_packet_from_server else -1

    def _received(self, _client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        more = getattr(message, "properties", None)
        self.heard.append(Heard(message.mid, message.topic, bytes(message.payload), message.retain, more))

    def _published(self, _client: paho.Client, _data: Any, mid: int, reason: Any, _more: Any) -> None:
        self.reasons[mid] = reason.value

    def _granted(self, _client: paho.Client, _data: Any, mid: int, _reasons: Any, _more: Any) -> None:
        self._subscribed.add(mid)


def pump(seats: Sequence[Seat], until: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    """Turn the seats until it is so, or for so long; whether it is so."""
    end = time.monotonic() + seconds
    while not until():
        if time.monotonic() > end:
            return False
        for seat in seats:
            seat.turn()
        if all(seat.lost is not None for seat in seats):
            time.sleep(_TURN)
    return True


def properties(kind: int, **values: Any) -> Properties:
    """MQTT 5 properties of a packet, by their names."""
    found = Properties(kind)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        setattr(found, name, value)
    return found
