"""Client: frames over a broker, for the agent whose MQTT face listens there.

Rules:
* a question is a publish on the model's topic, with a topic of ours below the topic of answers to answer on, and a
  number that the answer brings back: answers may come in any order, and one that nobody waits for is dropped;
* the question is a frame's body, and so is the answer (see serving.frames): what can be asked is the same;
* nothing is sent before our own subscription is in force, or the answer would be lost;
* paho's thread carries the bytes; who waits, waits on a future, from a thread or a coroutine.
"""

from __future__ import annotations

import itertools
import secrets
import threading
from concurrent.futures import Future
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from lightship_agent.contract import topics
from lightship_agent.contract.codes import LinkError, ServingError
from lightship_agent.contract.topics import FRAME_TYPE

_KEEP_ALIVE: Final = 30  # seconds


class Broker:
    """A connection to the broker, made by the first question.

    Args:
        url: `mqtt://[user:password@]host[:port]`, or `mqtts://` for TLS with the system's authorities.
        model: which model is asked: the topic names it.
    """

    def __init__(self, url: str, model: str | None) -> None:
        """Nothing is connected yet.

        Raises:
            LinkError: link.unreachable for an address that can't be one.
            ServingError: serving.unknown-model without a model.
        """
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError as e:
            raise LinkError("link.unreachable", f"Expected mqtt://host:port, found {url[:80]!r}: {e}.") from e
        if not parts.hostname or parts.path.strip("/"):
            raise LinkError("link.unreachable", f"Expected mqtt://host:port, found {url[:80]!r}.")
        if model is None:
            raise ServingError("serving.unknown-model", "Over a broker the topic names the model.", remedy="Name it.")
        secure = parts.scheme == "mqtts"
        self._where = (parts.hostname, port or (8883 if secure else 1883))
        self._question = topics.local_request(model)
        self._answers = f"{topics.local_answer(model)}/{secrets.token_hex(8)}"
        self._numbers = itertools.count(1)
        self._waiting: dict[bytes, Future[bytes]] = {}
        self._listening = threading.Event()
        self._lock = threading.Lock()
        self._begun = False
        self._client = paho.Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        if parts.username:
            password = None if parts.password is None else unquote(parts.password)
            self._client.username_pw_set(unquote(parts.username), password)
        if secure:
            self._client.tls_set()
        self._client.reconnect_delay_set(1, 5)
        self._client.on_connect = self._connected
        self._client.on_subscribe = lambda *_: self._listening.set()
        self._client.on_disconnect = lambda *_: self._listening.clear()
        self._client.on_message = self._received

    @property
    def listening(self) -> bool:
        """Whether answers would reach us."""
        return self._listening.is_set()

    def listen(self, seconds: float) -> None:
        """Connect, and wait until answers would reach us.

        Raises:
            LinkError: link.unreachable when that takes longer.
        """
        with self._lock:
            if not self._begun:
                self._client.connect_async(*self._where, keepalive=_KEEP_ALIVE)
                self._client.loop_start()
                self._begun = True
        if not self._listening.wait(seconds):
            host, port = self._where
            raise LinkError("link.unreachable", f"The broker at {host}:{port} did not take us within {seconds:.3g} s.")

    def ask(self, body: bytes) -> Future[bytes]:
        """Publish a question; the future is the body of its answer. Whoever gives up on it tells `forget`.

        Raises:
            LinkError: link.unreachable.
        """
        number = b"%d" % next(self._numbers)
        told = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        told.ResponseTopic, told.CorrelationData, told.ContentType = self._answers, number, FRAME_TYPE
        answer: Future[bytes] = Future()
        self._waiting[number] = answer
        answer.add_done_callback(lambda _: self._waiting.pop(number, None))
        sent = self._client.publish(self._question, body, qos=0, properties=told)
        if sent.rc != paho.MQTT_ERR_SUCCESS:
            answer.cancel()
            raise LinkError("link.unreachable", f"The broker can't be reached: {paho.error_string(sent.rc)}.")
        return answer

    def close(self) -> None:
        """Give the connection back."""
        with self._lock:
            if self._begun:
                self._client.disconnect()
                self._client.loop_stop()
                self._begun = False
                self._listening.clear()

    def _connected(self, client: paho.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if not reason.is_failure:
            client.subscribe(self._answers, qos=1)

    def _received(self, _client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        number = getattr(message.properties, "CorrelationData", b"")
        answer = self._waiting.get(number)
        # Who waits may give up at this very moment.
        if answer is not None and answer.set_running_or_notify_cancel():
            answer.set_result(bytes(message.payload))
