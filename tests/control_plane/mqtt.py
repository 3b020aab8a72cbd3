"""MQTT clients for the tests: they connect, listen and say when they were refused."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from .things import until


class Ear:
    """One connection; what it heard, as (topic, payload)."""

    def __init__(self, client_id: str, tls: ssl.SSLContext, *, user: tuple[str, str] | None = None) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self.said: list[str] = []  # the broker's answers to CONNECT
        self.lost = 0
        self._subscribed = threading.Event()
        self.client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=MQTTProtocolVersion.MQTTv5,
            reconnect_on_failure=False,
        )
        if user:
            self.client.username_pw_set(*user)
        self.client.tls_set_context(tls)
        self.client.on_connect = self._connected
        self.client.on_disconnect = self._disconnected
        self.client.on_message = lambda _c, _u, message: self.heard.append((message.topic, bytes(message.payload)))
        self.client.on_subscribe = lambda *_: self._subscribed.set()

    def subscribe(self, *filters: str) -> None:
        """Returns when the broker has answered, which is no promise that anything will be delivered."""
        for topic in filters:
            self._subscribed.clear()
            self.client.subscribe(topic, qos=1)
            assert self._subscribed.wait(60)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Returns when the broker has answered, which is no promise that anything was delivered."""
        self.client.publish(topic, payload, qos=1, retain=retain).wait_for_publish(10)

    def _connected(self, _client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        self.said.append(str(reason))

    def _disconnected(self, *_: Any) -> None:
        self.lost += 1


@contextmanager
def ear(
    port: int, client_id: str, tls: ssl.SSLContext, *, user: tuple[str, str] | None = None, welcome: bool = True
) -> Iterator[Ear]:
    """An ear that is connected; with `welcome=False`, one that the broker has sent away."""
    made = Ear(client_id, tls, user=user)
    try:
        made.client.connect("127.0.0.1", port, keepalive=30)
        made.client.loop_start()
        until(lambda: made.said or made.lost)
        assert (made.said == ["Success"]) == welcome, made.said
        yield made
    finally:
        made.client.disconnect()
        made.client.loop_stop()


def let_in(port: int, client_id: str, tls: ssl.SSLContext) -> bool:
    """Whether the broker welcomes a device now."""
    try:
        with ear(port, client_id, tls):
            return True
    except AssertionError:
        return False
